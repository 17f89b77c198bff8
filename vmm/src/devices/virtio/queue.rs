//! A virtqueue with its doorbell, as a handler owns it.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;

/// One request of the driver: a chain of descriptors.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The driver has broken a queue: nothing in it can be trusted any more and
/// the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available ring's index is out of reach, or the ring unreadable.
    #[error("the available ring is not usable")]
    Avail(#[source] virtio_queue::Error),
    /// A used element names no descriptor, or the ring is not writable.
    #[error("the used ring is not usable")]
    Used(#[source] virtio_queue::Error),
}

/// A queue that the driver has set up.
///
/// Its addresses have been checked to lie in guest memory. The descriptors in
/// it have not: an invalid one ends its chain early, and
/// [`DescriptorChain::reader`] and [`DescriptorChain::writer`] refuse buffers
/// outside guest memory.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    notify: EventFd,
}

impl VirtQueue {
    /// Joins a queue with the eventfd that the driver's notifications arrive
    /// on. The eventfd must not block.
    pub fn new(queue: Queue, notify: EventFd) -> Self {
        Self { queue, notify }
    }

    /// The eventfd that becomes readable when the driver has added chains.
    pub fn notify_fd(&self) -> &EventFd {
        &self.notify
    }

    /// Forgets the notifications so far. Call it before looking at the queue.
    pub fn clear_notify(&self) {
        // It fails only if there was none, which is the state asked for.
        let _ = self.notify.read();
    }

    /// Rings the doorbell from the device's side, to come back to the queue
    /// after other work had its turn.
    pub fn notify_self(&self) {
        if let Err(error) = self.notify.write(1) {
            log::error!("cannot notify a virtio queue: {error}");
        }
    }

    /// Size in descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    ///
    /// The available ring makes no sense.
    pub fn pop<'m>(&mut self, mem: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, QueueError> {
        Ok(self.queue.iter(mem).map_err(QueueError::Avail)?.next())
    }

    /// Puts the chain taken last back, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns the chain that starts at descriptor `head`, with `len` bytes
    /// written into it.
    ///
    /// # Errors
    ///
    /// `head` is not a descriptor of this queue.
    pub fn add_used(
        &mut self,
        mem: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        self.queue
            .add_used(mem, head, len)
            .map_err(QueueError::Used)
    }

    /// Whether the driver wants an interrupt for what was added to the used
    /// ring since the last time this was asked.
    ///
    /// # Errors
    ///
    /// The ring is not readable.
    pub fn needs_interrupt(&mut self, mem: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue
            .needs_notification(mem)
            .map_err(QueueError::Avail)
    }

    /// Asks the driver not to notify while the queue is being served.
    ///
    /// # Errors
    ///
    /// The used ring is not writable.
    pub fn disable_notify(&mut self, mem: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.queue
            .disable_notification(mem)
            .map_err(QueueError::Used)
    }

    /// Asks the driver to notify again; returns whether chains arrived
    /// meanwhile, for which no notification will come.
    ///
    /// # Errors
    ///
    /// The used ring is not writable.
    pub fn enable_notify(&mut self, mem: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(mem)
            .map_err(QueueError::Used)
    }

    /// Serves the available chains one by one: `serve` returns the number of
    /// bytes it wrote into the chain, which then goes to the used ring.
    ///
    /// After as many chains as the queue is long it rings its own doorbell and
    /// returns, so that a driver that never rests does not hold the thread.
    ///
    /// # Errors
    ///
    /// The driver broke the queue; the device needs a reset.
    pub fn serve_all(
        &mut self,
        mem: &GuestMemoryMmap,
        interrupt: &Interrupt,
        mut serve: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<(), QueueError> {
        let mut budget = self.size();
        self.disable_notify(mem)?;
        loop {
            while let Some(chain) = self.pop(mem)? {
                let head = chain.head_index();
                let len = serve(chain);
                self.add_used(mem, head, len)?;
                if self.needs_interrupt(mem)? {
                    interrupt.signal_used();
                }
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    self.notify_self();
                    return Ok(());
                }
            }
            if !self.enable_notify(mem)? {
                return Ok(());
            }
            self.disable_notify(mem)?;
        }
    }
}
