//! One connection: its credit, its shutdown, its data.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use zerocopy::little_endian::U32;

use super::packet::{
    Header, Key, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND,
};
use super::{BUF_ALLOC, MAX_PAYLOAD};

/// The guest is told about space in the buffer when this much has become free
/// since it last heard of it; by then it has half its credit left to go on.
const UPDATE_AFTER: u32 = BUF_ALLOC / 2;

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Keep,
    /// The guest gets an RST and the host's stream is closed.
    Abort,
    /// The guest gets an RST; the host's stream still gets what the guest sent.
    Finish,
    /// As [`Abort`](Self::Abort) without an RST: the guest knows.
    Gone,
    /// As [`Finish`](Self::Finish) without an RST: the guest knows.
    Finished,
}

/// Bytes on their way to the host's stream.
#[derive(Debug)]
pub(super) struct Outbox {
    stream: UnixStream,
    waiting: VecDeque<u8>,
    /// The event loop tells when the stream takes more. It is asked to only
    /// while bytes wait, for else every read of the host's program would wake
    /// it.
    pub(super) watched: bool,
}

impl Outbox {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            waiting: VecDeque::new(),
            watched: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Bytes that wait for the stream.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Sends what the stream takes of `data` and keeps the rest; returns how
    /// much left for the stream, of this or of earlier data.
    pub(super) fn send(&mut self, data: &[u8]) -> io::Result<usize> {
        let sent = if self.waiting.is_empty() {
            send_some(&self.stream, data)?
        } else {
            0
        };
        self.waiting.extend(&data[sent..]);
        Ok(sent)
    }

    /// Sends what the stream takes of the waiting bytes; returns how many.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let mut total = 0;
        while !self.waiting.is_empty() {
            let sent = send_some(&self.stream, self.waiting.as_slices().0)?;
            if sent == 0 {
                break;
            }
            self.waiting.drain(..sent);
            total += sent;
        }
        if self.waiting.is_empty() {
            // A stall should not cost its memory for the connection's life.
            self.waiting = VecDeque::new();
        }
        Ok(total)
    }
}

/// Sends what `stream` takes of `data` without waiting.
fn send_some(stream: &UnixStream, data: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < data.len() {
        match send(
            stream,
            &data[sent..],
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Ok(n) => sent += n,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sent)
}

/// Who has agreed to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The host asked; REQUEST is to be sent.
    Requesting,
    /// The host asked; the guest's answer is awaited.
    Requested,
    /// The guest asked; RESPONSE is to be sent.
    Accepting,
    /// Both.
    Established,
}

/// A connection between a program in the guest and a stream of the host.
#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    guest_cid: u64,
    state: State,
    outbox: Outbox,
    /// In the mux's list of connections with something to send.
    pub(super) queued: bool,

    // From the guest to the host.
    /// Bytes that left for the stream.
    forwarded: Wrapping<u32>,
    /// What the guest knows of `forwarded`.
    forwarded_told: Wrapping<u32>,
    /// The guest asked for a credit update.
    update_asked: bool,
    /// SHUTDOWN_* of the guest.
    guest_shutdown: u32,
    /// The stream has been told that no more will come.
    write_ended: bool,

    // From the host to the guest.
    /// The stream may have something to read, or has ended.
    readable: bool,
    /// The stream has been read to its end.
    ended: bool,
    /// The stream takes nothing any more either.
    hung_up: bool,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// `buf_alloc` and `fwd_cnt` as the guest last told them.
    guest_buf: u32,
    guest_forwarded: Wrapping<u32>,
    /// A credit request is unanswered.
    credit_asked: bool,
    /// SHUTDOWN_* the guest has been told.
    shutdown_told: u32,
}

impl Connection {
    /// A client of the host wants to reach the guest.
    pub(super) fn to_guest(key: Key, guest_cid: u64, stream: UnixStream) -> Self {
        Self::new(key, guest_cid, stream, State::Requesting)
    }

    /// The guest's REQUEST reached a server of the host.
    pub(super) fn from_guest(guest_cid: u64, request: &Header, stream: UnixStream) -> Self {
        let mut connection = Self::new(Key::of(request), guest_cid, stream, State::Accepting);
        connection.note_credit(request);
        connection
    }

    fn new(key: Key, guest_cid: u64, stream: UnixStream, state: State) -> Self {
        Self {
            key,
            guest_cid,
            state,
            outbox: Outbox::new(stream),
            queued: false,
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            update_asked: false,
            guest_shutdown: 0,
            write_ended: false,
            readable: true,
            ended: false,
            hung_up: false,
            sent: Wrapping(0),
            guest_buf: 0,
            guest_forwarded: Wrapping(0),
            credit_asked: false,
            shutdown_told: 0,
        }
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(super) fn outbox_mut(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// What is left to deliver once the guest is done with the connection.
    pub(super) fn into_outbox(self) -> Outbox {
        self.outbox
    }

    /// The stream became readable, writable or hung up.
    pub(super) fn on_stream(&mut self, hung_up: bool) -> Fate {
        self.readable = true;
        self.hung_up |= hung_up;
        match self.state {
            // The client gave up before the guest knew of it.
            State::Requesting if self.hung_up => return Fate::Gone,
            // The client gave up; the guest learns it from the RST.
            State::Requested if self.hung_up => return Fate::Abort,
            // A server that is done at once may have sent something first.
            State::Requesting | State::Requested | State::Accepting | State::Established => {}
        }
        let result = self.outbox.flush();
        self.after_send(result)
    }

    /// Serves a packet of the guest. `payload` is all of it.
    pub(super) fn on_packet(&mut self, header: &Header, payload: &[u8]) -> Fate {
        self.note_credit(header);
        match (header.op.get(), self.state) {
            (OP_RST, _) if self.guest_shutdown & SHUTDOWN_SEND != 0 => Fate::Finished,
            (OP_RST, _) => Fate::Gone,
            (OP_RESPONSE, State::Requested) => {
                self.state = State::Established;
                // This does not count as forwarded: the guest did not send it.
                let greeting = format!("OK {}\n", self.key.host_port);
                match self.outbox.send(greeting.as_bytes()) {
                    Ok(sent) if sent == greeting.len() => Fate::Keep,
                    _ => Fate::Abort,
                }
            }
            (OP_RW, State::Established | State::Accepting) => self.deliver(payload),
            (OP_SHUTDOWN, State::Established | State::Accepting) => {
                self.guest_shut_down(header.flags.get() & SHUTDOWN_BOTH)
            }
            (OP_CREDIT_UPDATE, _) => Fate::Keep,
            (OP_CREDIT_REQUEST, _) => {
                self.update_asked = true;
                Fate::Keep
            }
            _ => Fate::Abort,
        }
    }

    fn note_credit(&mut self, header: &Header) {
        self.guest_buf = header.buf_alloc.get();
        self.guest_forwarded = Wrapping(header.fwd_cnt.get());
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Bytes the guest has room for. None if its own numbers make no sense.
    fn credit(&self) -> usize {
        let in_flight = (self.sent - self.guest_forwarded).0;
        self.guest_buf.saturating_sub(in_flight) as usize
    }

    fn deliver(&mut self, payload: &[u8]) -> Fate {
        let over_credit = self.outbox.len() + payload.len() > BUF_ALLOC as usize;
        if over_credit || self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Fate::Abort;
        }
        let result = self.outbox.send(payload);
        self.after_send(result)
    }

    fn guest_shut_down(&mut self, flags: u32) -> Fate {
        self.guest_shutdown |= flags;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            return Fate::Finish;
        }
        if self.guest_shutdown & SHUTDOWN_RCV != 0 {
            // The host's program gets EPIPE. An error means that it is gone.
            let _ = self.outbox.stream().shutdown(Shutdown::Read);
        }
        self.after_send(Ok(0))
    }

    /// Accounts for what left for the stream.
    fn after_send(&mut self, result: io::Result<usize>) -> Fate {
        let Ok(sent) = result else {
            return Fate::Abort;
        };
        // Never more than the outbox's limit, so it fits.
        self.forwarded += u32::try_from(sent).unwrap_or(u32::MAX);
        let no_more = self.outbox.len() == 0 && self.guest_shutdown & SHUTDOWN_SEND != 0;
        if no_more && !self.write_ended {
            // Once only: it is an event of the stream by itself.
            self.write_ended = true;
            // An error means that nobody is left to learn it.
            let _ = self.outbox.stream().shutdown(Shutdown::Write);
        }
        Fate::Keep
    }

    /// Whether the guest is owed a packet, apart from data.
    fn control(&self) -> Option<u16> {
        match self.state {
            State::Requesting => return Some(OP_REQUEST),
            State::Accepting => return Some(OP_RESPONSE),
            State::Requested | State::Established => {}
        }
        if self.shutdown() & !self.shutdown_told != 0 {
            Some(OP_SHUTDOWN)
        } else if self.update_asked || (self.forwarded - self.forwarded_told).0 >= UPDATE_AFTER {
            Some(OP_CREDIT_UPDATE)
        } else {
            None
        }
    }

    /// The SHUTDOWN_* that the guest should know of.
    fn shutdown(&self) -> u32 {
        match (self.ended, self.hung_up) {
            (false, _) => 0,
            (true, false) => SHUTDOWN_SEND,
            (true, true) => SHUTDOWN_BOTH,
        }
    }

    fn may_read(&self) -> bool {
        self.state == State::Established
            && self.readable
            && !self.ended
            && self.guest_shutdown & SHUTDOWN_RCV == 0
    }

    /// Whether [`next_packet`](Self::next_packet) may have something.
    pub(super) fn has_output(&self) -> bool {
        self.control().is_some() || (self.may_read() && (self.credit() > 0 || !self.credit_asked))
    }

    /// The next packet for the guest; its payload, at most `buf.len()` bytes,
    /// is put into `buf`.
    ///
    /// # Errors
    ///
    /// The host's stream failed; the connection is to be aborted.
    pub(super) fn next_packet(&mut self, buf: &mut [u8]) -> io::Result<Option<Header>> {
        // Data first: it carries the credit with it.
        if self.may_read() {
            let room = self.credit().min(buf.len()).min(MAX_PAYLOAD);
            if room == 0 && !self.credit_asked {
                self.credit_asked = true;
                return Ok(Some(self.packet(OP_CREDIT_REQUEST, 0)));
            }
            if room > 0 {
                match self.read(&mut buf[..room])? {
                    0 => {}
                    len => return Ok(Some(self.packet(OP_RW, len))),
                }
            }
        }
        let Some(op) = self.control() else {
            return Ok(None);
        };
        match self.state {
            State::Requesting => self.state = State::Requested,
            State::Accepting => self.state = State::Established,
            State::Requested | State::Established => {}
        }
        let mut packet = self.packet(op, 0);
        if op == OP_SHUTDOWN {
            self.shutdown_told = self.shutdown();
            packet.flags = U32::new(self.shutdown_told);
        }
        Ok(Some(packet))
    }

    /// Reads from the stream; returns zero if there is nothing or nothing more.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.outbox.stream(), &mut *buf, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => self.ended = true,
                Ok((_, len)) => {
                    // At most MAX_PAYLOAD, so it fits.
                    self.sent += u32::try_from(len).unwrap_or(u32::MAX);
                    return Ok(len);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            return Ok(0);
        }
    }

    /// A header with this connection's credit, which the guest then knows.
    fn packet(&mut self, op: u16, len: usize) -> Header {
        self.forwarded_told = self.forwarded;
        self.update_asked = false;
        let mut header = self.key.header(self.guest_cid, op);
        header.fwd_cnt = U32::new(self.forwarded.0);
        // At most MAX_PAYLOAD, so it fits.
        header.len = U32::new(u32::try_from(len).unwrap_or(u32::MAX));
        header
    }
}
