//! The queues of the socket device.

use std::io::{Read, Write};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use zerocopy::{FromZeros, IntoBytes};

use super::MAX_PAYLOAD;
use super::host::HostSocket;
use super::mux::Mux;
use super::packet::{HEADER_LEN, Header};
use crate::devices::virtio::{
    ActivateError, Activation, Chain, Interrupt, QueueError, VirtQueue, give_up, watch,
};

/// Tokens of the event loop; from [`super::mux::FIRST_TOKEN`] on, streams.
const RX: u32 = 0;
const TX: u32 = 1;
const LISTENER: u32 = 2;

/// Packets moved in each direction before other devices have their turn.
const BUDGET: u32 = 128;

/// Moves packets between the guest's queues and the host's streams.
#[derive(Debug)]
pub(super) struct VsockHandler {
    mem: GuestMemoryMmap,
    rx: VirtQueue,
    tx: VirtQueue,
    /// It must exist. Events are for guests that were moved (section
    /// 5.10.6.7), so nothing is ever sent on it.
    _event: VirtQueue,
    interrupt: Arc<Interrupt>,
    mux: Mux,
    /// One payload.
    payload: Box<[u8]>,
    /// The tx queue may hold packets that were not served yet.
    tx_waiting: bool,
    /// The guest broke a queue; rest until the reset.
    broken: bool,
}

impl VsockHandler {
    pub(super) fn new(
        mut activation: Activation,
        guest_cid: u64,
        host: Arc<HostSocket>,
    ) -> Result<Self, ActivateError> {
        let [rx, tx, event] = activation.take_queues()?;
        Ok(Self {
            mem: activation.mem,
            rx,
            tx,
            _event: event,
            interrupt: activation.interrupt,
            mux: Mux::new(guest_cid, host),
            payload: vec![0; MAX_PAYLOAD].into_boxed_slice(),
            tx_waiting: false,
            broken: false,
        })
    }

    /// Moves what can be moved.
    fn serve(&mut self) -> Result<(), QueueError> {
        if self.tx_waiting {
            self.serve_tx()?;
        }
        self.serve_rx()?;
        if self.tx_waiting && !self.mux.is_congested() {
            self.tx.notify_self();
        }
        Ok(())
    }

    /// Takes packets from the guest until there are none, the budget is spent
    /// or too many answers wait.
    fn serve_tx(&mut self) -> Result<(), QueueError> {
        let mut served = 0;
        self.tx.disable_notify(&self.mem)?;
        while served < BUDGET && !self.mux.is_congested() {
            let Some(chain) = self.tx.pop(&self.mem)? else {
                if self.tx.enable_notify(&self.mem)? {
                    self.tx.disable_notify(&self.mem)?;
                    continue;
                }
                self.tx_waiting = false;
                break;
            };
            served += 1;
            let head = chain.head_index();
            take_packet(&self.mem, chain, &mut self.mux, &mut self.payload);
            self.tx.add_used(&self.mem, head, 0)?;
        }
        if served > 0 && self.tx.needs_interrupt(&self.mem)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Gives packets to the guest until there are none, the budget is spent or
    /// the guest has no buffers left.
    fn serve_rx(&mut self) -> Result<(), QueueError> {
        let mut used = 0;
        while self.mux.has_output() {
            if used == BUDGET {
                self.rx.notify_self();
                break;
            }
            let Some(chain) = self.rx.pop(&self.mem)? else {
                if self.rx.enable_notify(&self.mem)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let Some(len) = give_packet(&self.mem, chain, &mut self.mux, &mut self.payload) else {
                self.rx.undo_pop();
                continue;
            };
            self.rx.add_used(&self.mem, head, len)?;
            used += 1;
        }
        if used > 0 && self.rx.needs_interrupt(&self.mem)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Makes the event loop watch the streams that the mux has, no others.
    fn update_streams(&mut self, ops: &mut EventOps) {
        loop {
            let changes = self.mux.take_changes();
            if changes.is_empty() {
                return;
            }
            let closed_some = !changes.removed.is_empty();
            for stream in changes.removed {
                // It fails for a stream that came and went unwatched.
                let _ = ops.remove(Events::empty(&stream));
            }
            for token in changes.added {
                let Some(events) = stream_events(&self.mux, token) else {
                    continue;
                };
                if let Err(error) = ops.add(events) {
                    log::warn!("vsock: cannot watch a stream: {error}");
                    self.mux.drop_stream(token);
                }
            }
            for token in changes.changed {
                if let Some(events) = stream_events(&self.mux, token)
                    && let Err(error) = ops.modify(events)
                {
                    log::warn!("vsock: cannot watch a stream: {error}");
                    self.mux.drop_stream(token);
                }
            }
            if closed_some && self.mux.wants_accept() {
                self.mux.accept();
            }
        }
    }
}

/// What to watch of the stream of `token`.
///
/// Edge-triggered: the mux remembers what is readable, and reads only when the
/// guest has room.
fn stream_events(mux: &Mux, token: u32) -> Option<Events> {
    let (stream, out) = mux.stream(token)?;
    let mut set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if out {
        set |= EventSet::OUT;
    }
    Some(Events::with_data(stream, token, set))
}

/// Takes the guest's packet in `chain`. One that makes no sense is dropped, or
/// answered with an RST if its header can be read.
fn take_packet(mem: &GuestMemoryMmap, chain: Chain<'_>, mux: &mut Mux, payload: &mut [u8]) {
    let Ok(mut reader) = chain.reader(mem) else {
        return;
    };
    let mut header = Header::new_zeroed();
    if reader.read_exact(header.as_mut_bytes()).is_err() {
        return;
    }
    let payload = usize::try_from(header.len.get())
        .ok()
        .and_then(|len| payload.get_mut(..len));
    match payload.map(|payload| (reader.read_exact(&mut *payload).is_ok(), payload)) {
        Some((true, payload)) => mux.on_packet(&header, payload),
        // Too long, or longer than the buffers.
        _ => mux.on_bad_packet(&header),
    }
}

/// Puts the next packet for the guest into `chain` and returns its length;
/// none if there is no packet, zero if the chain has no room for one.
fn give_packet(
    mem: &GuestMemoryMmap,
    chain: Chain<'_>,
    mux: &mut Mux,
    payload: &mut [u8],
) -> Option<u32> {
    let Ok(mut writer) = chain.writer(mem) else {
        return Some(0);
    };
    let room = writer.available_bytes().saturating_sub(HEADER_LEN);
    if room == 0 {
        return Some(0);
    }
    let room = room.min(payload.len());
    let header = mux.next_packet(&mut payload[..room])?;
    let len = header.len.get() as usize;
    // The writer has room for both, see above.
    let _ = writer.write_all(header.as_bytes());
    let _ = writer.write_all(&payload[..len]);
    u32::try_from(HEADER_LEN + len).ok()
}

impl MutEventSubscriber for VsockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.rx, RX, &self.interrupt);
        watch(ops, &self.tx, TX, &self.interrupt);
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let events = Events::with_data(self.mux.host().listener(), LISTENER, set);
        if let Err(error) = ops.add(events) {
            log::error!("vsock: cannot watch the socket: {error}");
            self.interrupt.fail();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.broken {
            return;
        }
        match events.data() {
            RX => self.rx.clear_notify(),
            TX => {
                self.tx.clear_notify();
                self.tx_waiting = true;
            }
            LISTENER => self.mux.accept(),
            token => {
                let hung_up = events
                    .event_set()
                    .intersects(EventSet::HANG_UP | EventSet::ERROR);
                self.mux.on_stream(token, hung_up);
            }
        }
        if let Err(error) = self.serve() {
            self.broken = true;
            give_up("vsock", &error, &self.interrupt, ops, [&self.rx, &self.tx]);
            self.mux.close_all();
        }
        self.update_streams(ops);
    }
}
