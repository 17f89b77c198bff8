//! How a device calls its driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::complaints::Complaints;

/// The interrupt line of one device, and the part of its state that a handler
/// on another thread changes.
#[derive(Debug)]
pub struct Interrupt {
    /// InterruptStatus register.
    status: AtomicU32,
    /// NEEDS_RESET bit of the Status register.
    broken: AtomicBool,
    complaints: Complaints,
    /// KVM injects the line's interrupt when this is written.
    irq: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that goes out through `irq`, the irqfd of the device's GSI.
    pub fn new(irq: Arc<EventFd>) -> Self {
        Self {
            status: AtomicU32::new(0),
            broken: AtomicBool::new(false),
            complaints: Complaints::default(),
            irq,
        }
    }

    /// Tells the driver that a queue has used buffers. Ask
    /// [`VirtQueue::needs_interrupt`](super::VirtQueue::needs_interrupt) first.
    pub fn signal_used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Gives the device up until the driver resets it: sets NEEDS_RESET and
    /// says so to the driver (virtio 1.2, section 2.1.2).
    pub fn fail(&self) {
        self.set_broken();
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Warnings about this device; their limit lasts over resets.
    pub fn complaints(&self) -> &Complaints {
        &self.complaints
    }

    /// Whether NEEDS_RESET is set.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Sets NEEDS_RESET without an interrupt, for a driver that is not yet up.
    pub(super) fn set_broken(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Pending causes, as the InterruptStatus register shows them.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Clears the causes that the driver has seen.
    pub(super) fn acknowledge(&self, causes: u32) {
        self.status.fetch_and(!causes, Ordering::SeqCst);
    }

    /// Forgets pending causes and NEEDS_RESET. Only while no handler runs.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.broken.store(false, Ordering::SeqCst);
    }

    fn raise(&self, cause: u32) {
        // The cause must be visible before the interrupt: the driver reads the
        // register, acknowledges what it read and then looks at the queues.
        self.status.fetch_or(cause, Ordering::SeqCst);
        if let Err(error) = self.irq.write(1) {
            log::error!("cannot raise the interrupt of a virtio device: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupt() -> (Interrupt, Arc<EventFd>) {
        let irq = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        (Interrupt::new(irq.clone()), irq)
    }

    #[test]
    fn signals_set_their_cause_and_reach_the_irqfd() {
        let (interrupt, irq) = interrupt();
        interrupt.signal_used();
        assert_eq!(interrupt.status(), 1);
        interrupt.fail();
        assert_eq!(interrupt.status(), 3);
        assert_eq!(irq.read().unwrap(), 2);
    }

    #[test]
    fn acknowledge_clears_only_what_was_seen() {
        let (interrupt, _irq) = interrupt();
        interrupt.signal_used();
        interrupt.fail();
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
    }

    #[test]
    fn fail_sets_needs_reset_until_reset() {
        let (interrupt, irq) = interrupt();
        interrupt.fail();
        assert!(interrupt.is_broken());
        assert_eq!(irq.read().unwrap(), 1);
        interrupt.reset();
        assert!(!interrupt.is_broken());
        assert_eq!(interrupt.status(), 0);
    }
}
