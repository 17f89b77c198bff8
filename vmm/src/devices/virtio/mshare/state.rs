//! What the threads of the device share, under one lock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mshare_pool::client::Acker;
use mshare_protocol::device::{
    VIRTIO_MSHARE_E_INVALIDATE, VIRTIO_MSHARE_E_REVOKED, virtio_mshare_event,
};
use vm_memory::GuestMemoryMmap;
use zerocopy::IntoBytes;

use super::attachment::Attachment;
use crate::devices::virtio::{Interrupt, QueueError, VirtQueue};

/// Events that wait for a buffer. A driver that does not return buffers loses
/// the pool's patience (the broker's limit) long before this many.
const MAX_WAITING: usize = 4096;

/// One activation, from DRIVER_OK to reset.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) mem: GuestMemoryMmap,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) ctrl: VirtQueue,
    pub(super) event: VirtQueue,
    pub(super) ack: VirtQueue,
    /// Whether the driver understands the entries of this pool.
    pub(super) may_attach: bool,
    waiting: VecDeque<virtio_mshare_event>,
    /// Events that the driver was told and has not acknowledged.
    unacked: BTreeSet<u64>,
}

impl Active {
    pub(super) fn new(
        mem: GuestMemoryMmap,
        interrupt: Arc<Interrupt>,
        [ctrl, event, ack]: [VirtQueue; 3],
    ) -> Self {
        Self {
            mem,
            interrupt,
            ctrl,
            event,
            ack,
            may_attach: true,
            waiting: VecDeque::new(),
            unacked: BTreeSet::new(),
        }
    }

    /// Gives waiting events to the driver while it has buffers for them.
    pub(super) fn deliver(&mut self) -> Result<(), QueueError> {
        let mut delivered = false;
        while let Some(event) = self.waiting.front() {
            let Some(chain) = self.event.pop(&self.mem)? else {
                // The driver is to ring when it has buffers again.
                if self.event.enable_notify(&self.mem)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = chain
                .writer(&self.mem)
                .map_err(std::io::Error::other)
                .and_then(|mut writer| {
                    use std::io::Write;
                    writer.write_all(event.as_bytes())
                });
            match written {
                Ok(()) => {
                    let len = u32::try_from(size_of::<virtio_mshare_event>()).unwrap_or(0);
                    self.event.add_used(&self.mem, head, len)?;
                    self.waiting.pop_front();
                }
                // A buffer that is too small for an event goes back unused.
                Err(_) => self.event.add_used(&self.mem, head, 0)?,
            }
            delivered = true;
        }
        if delivered && self.event.needs_interrupt(&self.mem)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Queues an event; false if the driver has let too many pile up.
    fn post(&mut self, event: virtio_mshare_event) -> bool {
        if self.waiting.len() >= MAX_WAITING {
            return false;
        }
        if event.seq.get() != 0 {
            self.unacked.insert(event.seq.get());
        }
        self.waiting.push_back(event);
        if let Err(error) = self.deliver() {
            log::warn!("the mshare driver broke its event queue: {error}");
            self.interrupt.fail();
        }
        true
    }

    /// Takes an acknowledgement; whether the driver owed it.
    pub(super) fn acknowledge(&mut self, seq: u64) -> bool {
        self.unacked.remove(&seq)
    }
}

/// The state.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Counts activations and resets; work begun under another number must
    /// not touch the queues.
    pub(super) generation: u64,
    pub(super) active: Option<Active>,
    /// Regions the guest sees. Dropping an entry removes its memslots.
    pub(super) attached: BTreeMap<u64, Attachment>,
    /// Counts the times that the broker gave this guest up.
    pub(super) revocations: u64,
    /// Regions whose memslots are gone but of which the broker was not told.
    pub(super) to_detach: Vec<u64>,
}

/// A state that several threads share.
#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<State>);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker took rights in a range away: the driver is to drop what it
    /// derived from the old entries. With nothing attached there is nothing.
    pub(super) fn invalidate(&self, id: u64, offset: u64, len: u64, seq: u64, acker: &Acker) {
        let mut state = self.lock();
        let State {
            active, attached, ..
        } = &mut *state;
        let posted = match active {
            Some(active) if attached.contains_key(&id) => active.post(virtio_mshare_event {
                r#type: VIRTIO_MSHARE_E_INVALIDATE.into(),
                id: id.into(),
                offset: offset.into(),
                len: len.into(),
                seq: seq.into(),
                ..Default::default()
            }),
            // Without an acknowledgement the broker would give the guest up.
            _ => false,
        };
        let nothing_to_drop = !posted && !attached.contains_key(&id);
        drop(state);
        if nothing_to_drop {
            acker.ack(seq);
        }
    }

    /// The broker has given this guest up: it must see no region any more.
    pub(super) fn revoke_all(&self) {
        let mut state = self.lock();
        let State {
            active, attached, ..
        } = &mut *state;
        for id in attached.keys() {
            if let Some(active) = active {
                active.post(virtio_mshare_event {
                    r#type: VIRTIO_MSHARE_E_REVOKED.into(),
                    id: (*id).into(),
                    ..Default::default()
                });
            }
        }
        attached.clear();
        state.revocations += 1;
    }

    /// Ends an activation: no thread touches its queues once this returns.
    pub(super) fn deactivate(&self) {
        let mut state = self.lock();
        state.generation += 1;
        state.active = None;
        let gone = std::mem::take(&mut state.attached);
        state.to_detach.extend(gone.keys());
    }
}
