//! All connections of one guest, and the order in which they are served.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::HOST_CID;
use super::connection::{Connection, Fate, Outbox};
use super::host::HostSocket;
use super::packet::{Header, Key, OP_REQUEST, OP_RST, TYPE_STREAM};

/// Streams of the host at one time: clients, connections and rests.
pub(super) const MAX_PEERS: usize = 1024;
/// Answers to unknown or refused packets that may wait for the guest.
pub(super) const MAX_REPLIES: usize = 256;
/// Longest command of a client: "CONNECT 4294967295\n", and some blanks.
const MAX_COMMAND: usize = 32;
/// The host's ports for connections that a client asked for.
const CLIENT_PORTS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x7fff_ffff;
/// Tokens below are the handler's own.
pub(super) const FIRST_TOKEN: u32 = 16;

/// What a stream of the host is for.
#[derive(Debug)]
enum Peer {
    /// It has not said yet where it wants to go.
    Client(UnixStream),
    /// It is connected, or about to be.
    Connection(Box<Connection>),
    /// The guest is done with it, its last bytes are on their way.
    Rest(Outbox),
}

/// What a client has sent first.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Incomplete,
    Connect(u32),
    Bad,
    Closed,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty() && self.changed.is_empty()
    }
}

/// The connections of one guest.
///
/// It does no waiting and knows no queues: the handler brings packets and
/// readiness, and takes packets ([`next_packet`](Self::next_packet)) and
/// changes to the set of streams ([`take_changes`](Self::take_changes)).
#[derive(Debug)]
pub(super) struct Mux {
    guest_cid: u64,
    host: Arc<HostSocket>,
    peers: HashMap<u32, Peer>,
    by_key: HashMap<Key, u32>,
    /// Connections with something to send, each once, in turn.
    ready: VecDeque<u32>,
    replies: VecDeque<Header>,
    next_token: u32,
    next_port: u32,
    /// The host could not give us a client's stream. Try again when one of
    /// ours is closed.
    accept_again: bool,
    added: Vec<u32>,
    /// Streams whose outbox became empty or ceased to be.
    changed: Vec<u32>,
    removed: Vec<UnixStream>,
}

/// What the event loop has to do about the streams, in this order.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Stop watching these and close them.
    pub(super) removed: Vec<UnixStream>,
    /// Watch the streams of these tokens.
    pub(super) added: Vec<u32>,
    /// Ask [`Mux::stream`] again about the streams of these tokens.
    pub(super) changed: Vec<u32>,
}

impl Mux {
    pub(super) fn new(guest_cid: u64, host: Arc<HostSocket>) -> Self {
        Self {
            guest_cid,
            host,
            peers: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: *CLIENT_PORTS.start(),
            accept_again: false,
            added: Vec::new(),
            changed: Vec::new(),
            removed: Vec::new(),
        }
    }

    pub(super) fn host(&self) -> &HostSocket {
        &self.host
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Whether the guest must take answers before it may send more.
    pub(super) fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// Takes the clients that have connected.
    pub(super) fn accept(&mut self) {
        self.accept_again = false;
        loop {
            match self.host.accept() {
                Ok(Some(stream)) if self.peers.len() < MAX_PEERS => {
                    self.insert(Peer::Client(stream));
                }
                Ok(Some(_)) => log::warn!("vsock: more than {MAX_PEERS} connections; refused one"),
                Ok(None) => return,
                Err(error) => {
                    log::warn!("vsock: cannot take a connection: {error}");
                    self.accept_again = true;
                    return;
                }
            }
        }
    }

    fn insert(&mut self, peer: Peer) -> u32 {
        // There are far fewer peers than tokens, so one is free.
        while self.next_token < FIRST_TOKEN || self.peers.contains_key(&self.next_token) {
            self.next_token = self.next_token.wrapping_add(1);
        }
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        self.peers.insert(token, peer);
        self.added.push(token);
        token
    }

    /// The stream of `token` became readable, writable or hung up.
    pub(super) fn on_stream(&mut self, token: u32, hung_up: bool) {
        match self.peers.get_mut(&token) {
            None => {}
            Some(Peer::Client(stream)) => match read_command(stream) {
                Command::Connect(port) => self.client_connects(token, port),
                Command::Incomplete if !hung_up => {}
                Command::Incomplete | Command::Closed => self.remove(token),
                Command::Bad => {
                    // It is about to be closed, so what does not fit is lost.
                    let _ = send(
                        stream,
                        b"ERROR expected \"CONNECT <port>\"\n",
                        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
                    );
                    self.remove(token);
                }
            },
            Some(Peer::Connection(connection)) => {
                let fate = connection.on_stream(hung_up);
                self.settle(token, fate);
            }
            Some(Peer::Rest(outbox)) => {
                let done = outbox.flush().is_err() || outbox.len() == 0 || hung_up;
                if done {
                    self.remove(token);
                }
            }
        }
    }

    fn client_connects(&mut self, token: u32, guest_port: u32) {
        let Some(Peer::Client(stream)) = self.peers.remove(&token) else {
            return;
        };
        let key = self.free_key(guest_port);
        self.by_key.insert(key, token);
        let connection = Connection::to_guest(key, self.guest_cid, stream);
        self.peers
            .insert(token, Peer::Connection(Box::new(connection)));
        self.settle(token, Fate::Keep);
    }

    /// A name for a new connection to `guest_port`. There are far fewer
    /// connections than ports, so one is free.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let host_port = self.next_port;
            self.next_port = if host_port == *CLIENT_PORTS.end() {
                *CLIENT_PORTS.start()
            } else {
                host_port + 1
            };
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    /// Serves a packet of the guest. `payload` is all of it.
    pub(super) fn on_packet(&mut self, header: &Header, payload: &[u8]) {
        let op = header.op.get();
        if header.src_cid.get() != self.guest_cid {
            // Not from this guest: an answer would not reach its sender.
            log::debug!("vsock: a packet from CID {}", header.src_cid);
            return;
        }
        let for_us = header.dst_cid.get() == HOST_CID && header.kind.get() == TYPE_STREAM;
        let token = self.by_key.get(&Key::of(header)).copied();
        match token {
            Some(token) if for_us => {
                let fate = match self.peers.get_mut(&token) {
                    Some(Peer::Connection(connection)) => connection.on_packet(header, payload),
                    _ => Fate::Keep,
                };
                self.settle(token, fate);
            }
            None if for_us && op == OP_REQUEST => self.guest_connects(header),
            _ if op == OP_RST => {}
            _ => self.replies.push_back(header.reset()),
        }
    }

    /// Serves a packet whose payload cannot be had: the stream would have a
    /// hole, so the connection ends.
    pub(super) fn on_bad_packet(&mut self, header: &Header) {
        match self.by_key.get(&Key::of(header)).copied() {
            Some(token) if header.src_cid.get() == self.guest_cid => {
                self.settle(token, Fate::Abort);
            }
            _ if header.op.get() == OP_RST => {}
            _ => self.replies.push_back(header.reset()),
        }
    }

    fn guest_connects(&mut self, request: &Header) {
        let port = request.dst_port.get();
        let stream = if self.peers.len() < MAX_PEERS {
            self.host.connect(port)
        } else {
            Err(Errno::MFILE.into())
        };
        match stream {
            Ok(stream) => {
                let connection = Connection::from_guest(self.guest_cid, request, stream);
                let token = self.insert(Peer::Connection(Box::new(connection)));
                self.by_key.insert(Key::of(request), token);
                self.settle(token, Fate::Keep);
            }
            Err(error) => {
                log::debug!("vsock: no connection to port {port} of the host: {error}");
                self.replies.push_back(request.reset());
            }
        }
    }

    /// The next packet for the guest; its payload, of the length the header
    /// says and at most `buf.len()` bytes, is put into `buf`.
    pub(super) fn next_packet(&mut self, buf: &mut [u8]) -> Option<Header> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Some(reply);
            }
            let token = self.ready.pop_front()?;
            let Some(Peer::Connection(connection)) = self.peers.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            match connection.next_packet(buf) {
                Ok(packet) => {
                    self.settle(token, Fate::Keep);
                    if packet.is_some() {
                        return packet;
                    }
                }
                Err(error) => {
                    log::debug!("vsock: a stream failed: {error}");
                    self.settle(token, Fate::Abort);
                }
            }
        }
    }

    /// Does with the connection of `token` what was decided.
    fn settle(&mut self, token: u32, fate: Fate) {
        if fate == Fate::Keep {
            if let Some(Peer::Connection(connection)) = self.peers.get_mut(&token)
                && !connection.queued
                && connection.has_output()
            {
                connection.queued = true;
                self.ready.push_back(token);
            }
            self.update_interest(token);
            return;
        }
        let Some(Peer::Connection(connection)) = self.peers.remove(&token) else {
            return;
        };
        self.forget(token, &connection);
        let key = connection.key();
        if matches!(fate, Fate::Abort | Fate::Finish) {
            self.replies.push_back(key.header(self.guest_cid, OP_RST));
        }
        let outbox = connection.into_outbox();
        let deliver = matches!(fate, Fate::Finish | Fate::Finished);
        if deliver && outbox.len() > 0 {
            self.peers.insert(token, Peer::Rest(outbox));
            self.update_interest(token);
        } else {
            self.removed.push(outbox.into_stream());
        }
    }

    /// Forgets a peer without a word to the guest; its stream is to be closed.
    fn remove(&mut self, token: u32) {
        let stream = match self.peers.remove(&token) {
            Some(Peer::Client(stream)) => stream,
            Some(Peer::Rest(outbox)) => outbox.into_stream(),
            Some(Peer::Connection(connection)) => {
                self.forget(token, &connection);
                connection.into_outbox().into_stream()
            }
            None => return,
        };
        self.removed.push(stream);
    }

    /// Takes a connection that has ended out of the tables. It may not stay in
    /// the list of those with output, or a guest that takes no packets could
    /// make that grow without end.
    fn forget(&mut self, token: u32, connection: &Connection) {
        self.by_key.remove(&connection.key());
        if connection.queued {
            self.ready.retain(|&queued| queued != token);
        }
    }

    /// The changes since the last time this was asked.
    pub(super) fn take_changes(&mut self) -> Changes {
        Changes {
            removed: std::mem::take(&mut self.removed),
            added: std::mem::take(&mut self.added),
            changed: std::mem::take(&mut self.changed),
        }
    }

    /// Whether clients wait that could not be taken before.
    pub(super) fn wants_accept(&self) -> bool {
        self.accept_again
    }

    /// The stream of `token`, if it still exists, and whether it matters when
    /// it takes more.
    pub(super) fn stream(&self, token: u32) -> Option<(&UnixStream, bool)> {
        Some(match self.peers.get(&token)? {
            Peer::Client(stream) => (stream, false),
            Peer::Connection(connection) => {
                (connection.outbox().stream(), connection.outbox().watched)
            }
            Peer::Rest(outbox) => (outbox.stream(), outbox.watched),
        })
    }

    /// Has the event loop watch for space in the stream while bytes wait.
    fn update_interest(&mut self, token: u32) {
        let outbox = match self.peers.get_mut(&token) {
            Some(Peer::Connection(connection)) => connection.outbox_mut(),
            Some(Peer::Rest(outbox)) => outbox,
            Some(Peer::Client(_)) | None => return,
        };
        let wanted = outbox.len() > 0;
        if outbox.watched != wanted {
            outbox.watched = wanted;
            self.changed.push(token);
        }
    }

    /// Ends everything without a word to the guest, which cannot hear it.
    pub(super) fn close_all(&mut self) {
        let tokens: Vec<u32> = self.peers.keys().copied().collect();
        for token in tokens {
            self.remove(token);
        }
        self.ready.clear();
        self.replies.clear();
    }

    /// A stream that cannot be watched is of no use.
    pub(super) fn drop_stream(&mut self, token: u32) {
        self.settle(token, Fate::Abort);
        self.remove(token);
    }
}

/// Reads a client's command, and nothing after it: that is for the guest.
fn read_command(stream: &UnixStream) -> Command {
    let mut bytes = [0; MAX_COMMAND];
    let flags = RecvFlags::DONTWAIT;
    let len = match recv(stream, &mut bytes, flags | RecvFlags::PEEK) {
        Ok((_, 0)) => return Command::Closed,
        Ok((_, len)) => len,
        Err(Errno::AGAIN | Errno::INTR) => return Command::Incomplete,
        Err(_) => return Command::Closed,
    };
    let Some(end) = bytes[..len].iter().position(|&byte| byte == b'\n') else {
        return if len == MAX_COMMAND {
            Command::Bad
        } else {
            Command::Incomplete
        };
    };
    let port = parse_command(&bytes[..end]);
    // The bytes are there, so they come at once.
    match recv(stream, &mut bytes[..=end], flags) {
        Ok((_, taken)) if taken == end + 1 => port.map_or(Command::Bad, Command::Connect),
        _ => Command::Closed,
    }
}

/// The port of "CONNECT <port>".
fn parse_command(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let port = line.strip_prefix("CONNECT ")?.trim();
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // The highest number means "any port" to a guest.
    port.parse().ok().filter(|&port| port != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn command_is_read_up_to_its_end_only() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        assert_eq!(read_command(&stream), Command::Incomplete);
        client.write_all(b"CONN").unwrap();
        assert_eq!(read_command(&stream), Command::Incomplete);
        client.write_all(b"ECT 52\r\ndata").unwrap();
        assert_eq!(read_command(&stream), Command::Connect(52));
        drop(client);
        let mut rest = String::new();
        (&stream).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "data");
        assert_eq!(read_command(&stream), Command::Closed);
    }

    #[test]
    fn bad_commands_are_told_from_good_ones() {
        for (line, port) in [
            ("CONNECT 0", Some(0)),
            ("CONNECT 4294967294", Some(u32::MAX - 1)),
            ("CONNECT 4294967295", None),
            ("CONNECT 4294967296", None),
            ("CONNECT -1", None),
            ("CONNECT +1", None),
            ("CONNECT", None),
            ("CONNECT ", None),
            ("connect 1", None),
            ("CONNECT 1 2", None),
            ("GET / HTTP/1.1", None),
            ("", None),
        ] {
            assert_eq!(parse_command(line.as_bytes()), port, "{line}");
        }
        assert_eq!(parse_command(&[b'C', 0xff]), None);
    }

    #[test]
    fn endless_command_is_bad() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        client.write_all(&[b'x'; 100]).unwrap();
        assert_eq!(read_command(&stream), Command::Bad);
    }
}
