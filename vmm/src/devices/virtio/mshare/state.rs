//! What the threads of the device share, under two locks.
//!
//! `queues` is held while a queue is walked, which a guest can make long by
//! refilling it. `state` is not: it is all that the `pool-client` thread takes,
//! so that no guest can keep its memslots from being removed. Who needs both
//! takes `queues` first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mshare_pool::client::Acker;
use mshare_protocol::device::{
    VIRTIO_MSHARE_E_INVALIDATE, VIRTIO_MSHARE_E_REVOKED, virtio_mshare_event,
};
use mshare_protocol::report::chain;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::attachment::{AttachError, Attachment, RemoveError};
use crate::devices::virtio::{Interrupt, QueueError, VirtQueue};
use crate::exit::{Exit, GuestExit, PanicGuard};

/// Events that wait for a buffer. A driver that does not return buffers loses
/// the pool's patience (the broker's limit) long before this many.
const MAX_WAITING: usize = 4096;

/// The queues of one activation, from DRIVER_OK to reset.
#[derive(Debug)]
pub(super) struct Active {
    generation: u64,
    pub(super) mem: GuestMemoryMmap,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) ctrl: VirtQueue,
    pub(super) event: VirtQueue,
    pub(super) ack: VirtQueue,
}

impl Active {
    pub(super) fn new(
        mem: GuestMemoryMmap,
        interrupt: Arc<Interrupt>,
        [ctrl, event, ack]: [VirtQueue; 3],
    ) -> Self {
        Self {
            generation: 0,
            mem,
            interrupt,
            ctrl,
            event,
            ack,
        }
    }
}

/// The doorbells of one activation, and what is needed without its queues.
#[derive(Debug)]
pub(super) struct Doorbells {
    /// Which activation.
    pub(super) generation: u64,
    pub(super) mem: GuestMemoryMmap,
    pub(super) interrupt: Arc<Interrupt>,
    /// Whether the driver understands the entries of this pool.
    pub(super) may_attach: bool,
    pub(super) ctrl: EventFd,
    pub(super) event: EventFd,
    pub(super) ack: EventFd,
    /// Rings once, when the activation ends.
    pub(super) stop: EventFd,
}

impl Doorbells {
    fn of(active: &Active, may_attach: bool) -> io::Result<Self> {
        Ok(Self {
            generation: active.generation,
            mem: active.mem.clone(),
            interrupt: Arc::clone(&active.interrupt),
            may_attach,
            ctrl: active.ctrl.notify_fd().try_clone()?,
            event: active.event.notify_fd().try_clone()?,
            ack: active.ack.notify_fd().try_clone()?,
            stop: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }
}

/// The state.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Counts activations and resets; work begun under another number must
    /// not touch the queues.
    pub(super) generation: u64,
    /// The doorbells of the present activation.
    pub(super) bells: Option<Arc<Doorbells>>,
    /// Regions the guest sees. An entry has its memslots, and a memslot its
    /// entry, whenever the lock is free.
    pub(super) attached: BTreeMap<u64, Attachment>,
    /// Counts the times that the broker gave this guest up.
    pub(super) revocations: u64,
    /// Regions whose memslots are gone but of which the broker was not told.
    pub(super) to_detach: Vec<u64>,
    /// Events that the driver has not been told.
    waiting: VecDeque<virtio_mshare_event>,
    /// Events, told or not, that the driver has not acknowledged.
    unacked: BTreeSet<u64>,
    /// Those that a reset has acted on: the guest sees no region any more.
    to_ack: Vec<u64>,
    /// KVM has not removed a memslot, for which the run ends.
    stuck: bool,
    /// The device is gone, and no vCPU runs any more.
    ended: bool,
}

impl State {
    /// Has `mshare-ack` tell the driver of an event; false without a driver.
    fn post(&mut self, event: virtio_mshare_event) -> bool {
        let Some(bells) = &self.bells else {
            return false;
        };
        if event.seq.get() != 0 {
            self.unacked.insert(event.seq.get());
        }
        self.waiting.push_back(event);
        ring(&bells.event);
        true
    }
}

/// A state that several threads share.
#[derive(Debug)]
pub(super) struct Shared {
    exit: Exit,
    queues: Mutex<Option<Active>>,
    state: Mutex<State>,
    /// An activation began, or the device ended.
    changed: Condvar,
}

impl Shared {
    /// A state before any activation. The run ends through `exit` if the guest
    /// keeps a region that it must not have.
    pub(super) fn new(exit: Exit) -> Self {
        Self {
            exit,
            queues: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queues; `None` inside while no driver has set them up.
    pub(super) fn queues(&self) -> MutexGuard<'_, Option<Active>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an activation. On an error nothing has changed.
    pub(super) fn activate(&self, mut active: Active, may_attach: bool) -> io::Result<()> {
        let mut queues = self.queues();
        let mut state = self.lock();
        active.generation = state.generation + 1;
        state.bells = Some(Arc::new(Doorbells::of(&active, may_attach)?));
        state.generation = active.generation;
        *queues = Some(active);
        self.changed.notify_all();
        Ok(())
    }

    /// Ends an activation: no thread touches its queues once this returns.
    pub(super) fn deactivate(&self) {
        *self.queues() = None;
        let mut state = self.lock();
        state.generation += 1;
        state.waiting.clear();
        let gone = self.remove_all(&mut state);
        state.to_detach.extend(gone);
        // Nobody else will acknowledge them; the broker would wait for nothing and
        // then give this guest up.
        let owed = std::mem::take(&mut state.unacked);
        if state.attached.is_empty() {
            state.to_ack.extend(owed);
        }
        if let Some(bells) = state.bells.take() {
            ring(&bells.stop);
        }
    }

    /// Shows region `id` to the guest by `show`, unless the driver's activation
    /// has ended or the guest was given up since `revocations` was read.
    pub(super) fn attach(
        &self,
        id: u64,
        bells: &Doorbells,
        revocations: u64,
        show: impl FnOnce() -> Result<Attachment, AttachError>,
    ) -> Result<(), AttachError> {
        let mut state = self.lock();
        if state.generation != bells.generation || state.revocations != revocations {
            return Err(AttachError::Overtaken { id });
        }
        let attachment = show().inspect_err(|error| {
            if let AttachError::Remove(error) = error {
                self.fail(&mut state, error);
            }
        })?;
        // The driver knows that an earlier attachment is gone.
        state
            .waiting
            .retain(|event| !(is_revocation(event) && event.id.get() == id));
        state.attached.insert(id, attachment);
        Ok(())
    }

    /// Takes region `id` away from the guest; false if it does not have it.
    pub(super) fn detach(&self, id: u64) -> Result<bool, RemoveError> {
        let mut state = self.lock();
        let Some(attachment) = state.attached.get_mut(&id) else {
            return Ok(false);
        };
        let removed = attachment.remove();
        match &removed {
            Ok(()) => drop(state.attached.remove(&id)),
            Err(error) => self.fail(&mut state, error),
        }
        removed.map(|()| true)
    }

    /// Takes all regions away from the guest; returns those it has no more.
    fn remove_all(&self, state: &mut State) -> Vec<u64> {
        let (mut gone, mut failed) = (Vec::new(), None);
        state
            .attached
            .retain(|id, attachment| match attachment.remove() {
                Ok(()) => {
                    gone.push(*id);
                    false
                }
                Err(error) => {
                    failed = Some(error);
                    true
                }
            });
        if let Some(error) = failed {
            self.fail(state, &error);
        }
        gone
    }

    fn fail(&self, state: &mut State, error: &RemoveError) {
        state.stuck = true;
        self.exit.report(GuestExit::VmmFailed(chain(error)));
    }

    /// For a thread without which guests would wait for ever.
    pub(super) fn unless_panic(&self, thread: &str) -> PanicGuard {
        self.exit.unless_panic(thread)
    }

    /// Ends the device. No vCPU may run any more.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits for an activation younger than `last`; `None` at the device's end.
    pub(super) fn next_activation(&self, last: u64) -> Option<Arc<Doorbells>> {
        let mut state = self.lock();
        loop {
            match &state.bells {
                _ if state.ended => return None,
                Some(bells) if bells.generation > last => return Some(Arc::clone(bells)),
                _ => {}
            }
            state = self.wait(state);
        }
    }

    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker took rights in a range away: the driver is to drop what it
    /// derived from the old entries. With nothing attached there is nothing.
    pub(super) fn invalidate(&self, id: u64, offset: u64, len: u64, seq: u64, acker: &Acker) {
        let mut state = self.lock();
        if state.attached.contains_key(&id) {
            // Without an acknowledgement the broker will give the guest up.
            if state.waiting.len() < MAX_WAITING {
                state.post(virtio_mshare_event {
                    r#type: VIRTIO_MSHARE_E_INVALIDATE.into(),
                    id: id.into(),
                    offset: offset.into(),
                    len: len.into(),
                    seq: seq.into(),
                    ..Default::default()
                });
            }
            return;
        }
        drop(state);
        acker.ack(seq);
    }

    /// The broker has given this guest up: it sees no region any more when this
    /// returns, by when the broker may use the memory for others.
    pub(super) fn revoke_all(&self) {
        let mut state = self.lock();
        // The memslots first: nothing that the guest does can keep them.
        let gone = self.remove_all(&mut state);
        state.revocations += 1;
        // What else there was to tell is about these regions.
        state.waiting.retain(is_revocation);
        state.unacked.clear();
        for id in gone {
            state.post(virtio_mshare_event {
                r#type: VIRTIO_MSHARE_E_REVOKED.into(),
                id: id.into(),
                ..Default::default()
            });
        }
        while state.stuck && !state.ended {
            state = self.wait(state);
        }
    }

    /// Gives waiting events to the driver while it has buffers for them, at
    /// most as many as the queue is long; then the queue's bell rings again.
    pub(super) fn deliver(&self, active: &mut Active) -> Result<(), QueueError> {
        let (mem, queue) = (&active.mem, &mut active.event);
        let mut delivered = false;
        let mut budget = queue.size();
        while !self.lock().waiting.is_empty() {
            if budget == 0 {
                queue.notify_self();
                break;
            }
            budget -= 1;
            let Some(buffer) = queue.pop(mem)? else {
                // The driver is to ring when it has buffers again.
                if queue.enable_notify(mem)? {
                    continue;
                }
                break;
            };
            let head = buffer.head_index();
            let size = size_of::<virtio_mshare_event>();
            let writer = buffer.writer(mem).ok();
            let Some(mut writer) = writer.filter(|w| w.available_bytes() >= size) else {
                // A buffer that is too small for an event goes back unused.
                queue.add_used(mem, head, 0)?;
                delivered = true;
                continue;
            };
            let Some(event) = self.lock().waiting.pop_front() else {
                queue.undo_pop();
                break;
            };
            let len = match writer.write_all(event.as_bytes()) {
                Ok(()) => u32::try_from(size).unwrap_or(0),
                Err(_) => 0,
            };
            queue.add_used(mem, head, len)?;
            delivered = true;
        }
        if delivered && queue.needs_interrupt(mem)? {
            active.interrupt.signal_used();
        }
        Ok(())
    }

    /// Takes the acknowledgements that a reset owes the broker.
    pub(super) fn acks_of_reset(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().to_ack)
    }

    /// Takes an acknowledgement; whether the driver owed it.
    pub(super) fn acknowledge(&self, seq: u64) -> bool {
        self.lock().unacked.remove(&seq)
    }
}

/// The activation that `bells` belong to, if it has not ended or broken.
pub(super) fn current<'q>(
    queues: &'q mut Option<Active>,
    bells: &Doorbells,
) -> Option<&'q mut Active> {
    queues
        .as_mut()
        .filter(|active| active.generation == bells.generation)
}

fn is_revocation(event: &virtio_mshare_event) -> bool {
    event.r#type.get() == VIRTIO_MSHARE_E_REVOKED
}

fn ring(bell: &EventFd) {
    if let Err(error) = bell.write(1) {
        log::error!("cannot wake a thread of the mshare device: {error}");
    }
}
