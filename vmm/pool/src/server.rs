//! The broker's socket.
//!
//! Threads: `pool-accept` takes connections; each has `pool-read-N` (frames,
//! acknowledgements) and `pool-work-N` (requests, in order), so that a client
//! whose own request waits for its own acknowledgement can send it;
//! `pool-settle` watches after a recovery who resumes, and who is dead.
//!
//! Locks: a connection's `writer`, then `broker`, then `connections`, then a
//! connection's `state`; nothing is written to a socket while `broker` or
//! `connections` is held.
//!
//! A client that breaks the rules (malformed or long messages, no
//! acknowledgement in time, answers not read) is *given up*: it is told so,
//! nothing more is sent or taken, and the connection is watched until the
//! client closes it. Only then is its memory reused: the client's VMM closes
//! after it has removed its memslots, the kernel closes after it is dead.

mod listener;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mshare_protocol::broker::{Failure, FromBroker, Hello, Reply, Request, ToBroker, VERSION};
use mshare_protocol::frame::{self, FrameError};
use mshare_protocol::report::chain;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::broker::{Broker, Invalidate, SessionId};
use crate::failure::failure;
use crate::marks;
use crate::memory::{self, PoolFiles};
use crate::wire::{self, FdReader};
pub use listener::{Listener, ServerError};

/// Longest message that a client may send, in bytes.
pub const MAX_REQUEST: usize = 64 << 10;
/// Requests of one client that may wait for their turn.
const MAX_QUEUED: usize = 16;
/// How long the reader of a connection may take to find an acknowledgement
/// that was sent in time.
const DRAIN: Duration = Duration::from_millis(250);
const STACK: usize = 256 << 10;
/// How often it is looked whether all clients of a former broker have resumed
/// or are dead, in the time of grace and after it.
const SETTLE: Duration = Duration::from_millis(20);
const SETTLE_LATE: Duration = Duration::from_millis(500);

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most connections at a time.
    pub max_connections: usize,
    /// How long a client may take to acknowledge an event, and then again to
    /// close once it is given up.
    pub ack_limit: Duration,
    /// What is added to that for each GiB of the range: who has many processes
    /// attached drops as many entries of their tables.
    pub ack_per_gib: Duration,
    /// How long a client may take to say hello, or to read an answer.
    pub io_limit: Duration,
    /// How long requests wait after a recovery for clients that have not
    /// resumed yet.
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_connections: 256,
            ack_limit: Duration::from_secs(2),
            ack_per_gib: Duration::from_millis(250),
            io_limit: Duration::from_secs(5),
            grace: Duration::from_secs(5),
        }
    }
}

impl Options {
    /// How long a client may take to act on a change of `len` bytes.
    fn patience(&self, len: u64) -> Duration {
        let mib = u32::try_from(len >> 20).unwrap_or(u32::MAX);
        self.ack_limit + self.ack_per_gib.saturating_mul(mib) / 1024
    }
}

/// Where the pool comes from.
#[derive(Debug)]
pub enum Start {
    /// A broker that is ready.
    Ready(Box<Broker>),
    /// The first client that resumes brings it.
    Recover {
        /// Most regions that may exist at a time.
        max_regions: usize,
    },
}

impl From<Broker> for Start {
    fn from(broker: Broker) -> Self {
        Self::Ready(Box::new(broker))
    }
}

/// A broker at work. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

/// Stops a server from anywhere.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Stops the server: connections end, the socket file goes. What guests
    /// have attached stays theirs; another broker may recover the pool.
    pub fn stop(&self) {
        self.0.stop();
    }
}

#[derive(Debug)]
struct Shared {
    listener: Mutex<Option<Listener>>,
    options: Options,
    max_regions: usize,
    broker: Mutex<Option<Broker>>,
    connections: Mutex<HashMap<SessionId, Arc<Connection>>>,
    count: AtomicUsize,
    next_thread: AtomicU64,
    /// Of events; starts at a random number so that an acknowledgement for a
    /// former broker matches nothing.
    next_seq: AtomicU64,
    stopping: AtomicBool,
    stopped: Mutex<bool>,
    stop_changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Starts to serve.
    ///
    /// # Errors
    /// [`ServerError::Thread`], [`ServerError::Bind`].
    pub fn start(
        listener: Listener,
        start: impl Into<Start>,
        options: Options,
    ) -> Result<Self, ServerError> {
        let (broker, max_regions) = match start.into() {
            Start::Ready(broker) => (Some(*broker), 0),
            Start::Recover { max_regions } => (None, max_regions),
        };
        let socket = listener.socket().try_clone().map_err(ServerError::Thread)?;
        let seed = memory::random_id().map_err(ServerError::Thread)?;
        let [a, b, c, d, e, f, ..] = seed;
        let shared = Arc::new(Shared {
            listener: Mutex::new(Some(listener)),
            options,
            max_regions,
            broker: Mutex::new(broker),
            connections: Mutex::new(HashMap::new()),
            count: AtomicUsize::new(0),
            next_thread: AtomicU64::new(1),
            next_seq: AtomicU64::new(u64::from_le_bytes([0, a, b, c, d, e, f, 0])),
            stopping: AtomicBool::new(false),
            stopped: Mutex::new(false),
            stop_changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        let accept = spawn("pool-accept".to_owned(), move || {
            accept_loop(&accepting, &socket);
        })
        .map_err(ServerError::Thread)?;
        Ok(Self {
            shared,
            accept: Some(accept),
        })
    }

    /// A handle to stop it with.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Waits until somebody stops it.
    pub fn wait(&self) {
        let mut stopped = lock(&self.shared.stopped);
        while !*stopped {
            stopped = self
                .shared
                .stop_changed
                .wait(stopped)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(accept) = self.accept.take() {
            let _ = accept.join();
        }
        let limit = Instant::now() + Duration::from_secs(3);
        while self.shared.count.load(Ordering::Acquire) > 0 && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .stack_size(STACK)
        .spawn(run)
}

fn accept_loop(shared: &Arc<Shared>, socket: &UnixListener) {
    loop {
        let accepted = socket.accept();
        if shared.stopping() {
            return;
        }
        match accepted {
            Ok((stream, _)) => shared.admit(stream),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                // Out of descriptors, most likely: give others time to close.
                log::warn!("cannot accept a connection: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// A client.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// Held while a frame is written.
    writer: Mutex<()>,
    state: Mutex<ConnectionState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ConnectionState {
    /// The client's own description of the directory, from a resume until the
    /// client confirms it: it carries the client's mark.
    directory: Option<OwnedFd>,
    /// Events that await their acknowledgement.
    pending: HashSet<u64>,
    given_up: bool,
    /// The broker knows that it has ended.
    gone: bool,
}

impl Connection {
    fn send(&self, message: &FromBroker) -> Result<(), FrameError> {
        let bytes = frame::encode(message)?;
        let _writer = lock(&self.writer);
        io::Write::write_all(&mut &self.stream, &bytes)?;
        Ok(())
    }

    fn given_up(&self) -> bool {
        lock(&self.state).given_up
    }

    /// Waits until `done` or the deadline; whether it is done.
    fn wait(&self, deadline: Instant, done: impl Fn(&ConnectionState) -> bool) -> bool {
        let mut state = lock(&self.state);
        loop {
            if done(&state) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until the peer has closed, without reading what it sends.
    fn wait_hangup(&self) {
        loop {
            // POLLHUP comes when both directions are shut: ours is.
            let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
            match rustix::event::poll(&mut fds, None) {
                Err(Errno::INTR) => {}
                Err(e) => {
                    log::error!("cannot watch a client that was given up: {e}");
                    return;
                }
                Ok(_) => return,
            }
        }
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // An edit that is under way ends first: once the socket is free, another
        // broker may recover the pool, and there must be one writer.
        drop(lock(&self.broker).take());
        if let Some(listener) = lock(&self.listener).take() {
            // Wakes the accepting thread.
            let _ = rustix::net::shutdown(listener.socket(), rustix::net::Shutdown::Both);
        }
        for connection in lock(&self.connections).values() {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        *lock(&self.stopped) = true;
        self.stop_changed.notify_all();
    }

    /// Starts the threads of a new connection, if there is room for it.
    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let count = self.count.fetch_add(1, Ordering::AcqRel);
        let max = self.options.max_connections;
        let refuse = |why: Failure| {
            let bytes = frame::encode(&FromBroker::Refused(why)).unwrap_or_default();
            let _ = stream.set_nonblocking(true);
            let _ = io::Write::write_all(&mut &stream, &bytes);
        };
        if count >= max {
            refuse(failure(
                Errno::USERS,
                format!("the broker has {max} clients, which is its limit"),
            ));
            self.count.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let number = self.next_thread.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::clone(self);
        let run = stream.try_clone().and_then(|stream| {
            spawn(format!("pool-read-{number}"), move || {
                shared.serve(stream, number);
                shared.count.fetch_sub(1, Ordering::AcqRel);
            })
        });
        if let Err(e) = run {
            log::warn!("cannot serve a connection: {e}");
            refuse(failure(Errno::AGAIN, "the broker has no thread left"));
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn serve(self: &Arc<Self>, stream: UnixStream, number: u64) {
        let limit = Some(self.options.io_limit);
        if stream.set_read_timeout(limit).is_err() || stream.set_write_timeout(limit).is_err() {
            return;
        }
        let connection = Arc::new(Connection {
            stream,
            writer: Mutex::new(()),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let session = match self.handshake(&connection) {
            Ok(session) => session,
            Err(why) => {
                log::info!("refused a client: {why}");
                let _ = connection.send(&FromBroker::Refused(why));
                return;
            }
        };
        let (sender, receiver) = sync_channel(MAX_QUEUED);
        let shared = Arc::clone(self);
        let working = Arc::clone(&connection);
        let worker = spawn(format!("pool-work-{number}"), move || {
            shared.work(session, &working, &receiver);
        });
        match &worker {
            Ok(_) => self.read(session, &connection, &sender),
            Err(e) => self.give_up(
                session,
                &connection,
                failure(Errno::AGAIN, format!("the broker has no thread left: {e}")),
            ),
        }
        if connection.given_up() {
            connection.wait_hangup();
        }
        drop(sender);
        // A broker that stops takes nothing from guests that go on.
        if !self.stopping()
            && let Some(broker) = lock(&self.broker).as_mut()
        {
            broker.disconnect(session);
        }
        lock(&self.connections).remove(&session);
        let mut state = lock(&connection.state);
        state.gone = true;
        // It must not keep the mark of a client that is dead.
        state.directory = None;
        drop(state);
        connection.changed.notify_all();
        if let Ok(worker) = worker {
            let _ = worker.join();
        }
    }

    /// Hello and welcome.
    fn handshake(self: &Arc<Self>, connection: &Arc<Connection>) -> Result<SessionId, Failure> {
        let broken = |e: FrameError| {
            let text = format!("no hello that this broker understands: {}", chain(&e));
            failure(Errno::PROTO, text)
        };
        let mut reader = FdReader::new(&connection.stream);
        let hello = match wire::receive(&mut reader, MAX_REQUEST).map_err(broken)? {
            ToBroker::Hello(hello) => hello,
            _ => return Err(failure(Errno::PROTO, "the first message must be a hello")),
        };
        if hello.version != VERSION {
            let text = format!(
                "the client speaks version {}, the broker {VERSION}; use the same release",
                hello.version
            );
            return Err(failure(Errno::PROTO, text));
        }
        let fds = reader.into_fds();
        if let (Some(_), Some(directory)) = (&hello.resume, fds.get(2)) {
            let directory = directory.try_clone().map_err(no_descriptor)?;
            lock(&connection.state).directory = Some(directory);
        }
        // The welcome comes first, whatever others have to say to this client.
        let writer = lock(&connection.writer);
        let (session, events, geometry, files, marked) = {
            let mut guard = lock(&self.broker);
            let broker = match &mut *guard {
                Some(broker) => broker,
                empty => empty.insert(self.recover(&hello, fds)?),
            };
            let files = broker.files();
            let marked =
                marks::for_client(files.directory(), broker.generation()).map_err(no_descriptor)?;
            let (session, events) = match &hello.resume {
                None => (broker.connect(hello.role)?, Vec::new()),
                Some(resume) => broker.resume(hello.role, resume)?,
            };
            lock(&self.connections).insert(session, Arc::clone(connection));
            (session, events, *broker.geometry(), files, marked)
        };
        // `stop` shuts down the connections that it finds in the list.
        if self.stopping() {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        let welcome = FromBroker::Welcome(geometry);
        let fds = [files.data(), files.tables(), marked.as_fd()];
        let sent = wire::send_with_fds(&connection.stream, &welcome, &fds)
            .and_then(|()| Ok(connection.stream.set_read_timeout(None)?));
        drop(writer);
        if let Err(e) = sent {
            // The reader finds the end of the connection.
            log::info!("a client left during the handshake: {}", chain(&e));
        }
        for event in events {
            // Nobody waits for these: whoever repeats a protection that the
            // former broker had begun causes an event of its own.
            let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
            let _ = connection.send(&message(&event, seq));
        }
        Ok(session)
    }

    fn recover(self: &Arc<Self>, hello: &Hello, fds: Vec<OwnedFd>) -> Result<Broker, Failure> {
        // Then there is no broker because `stop` has taken it: the pool is the next
        // one's to recover.
        if self.stopping() {
            return Err(failure(Errno::AGAIN, "the broker stops; try again"));
        }
        let Some(resume) = &hello.resume else {
            return Err(failure(
                Errno::AGAIN,
                "the broker is recovering and waits for a client of the former broker; try again",
            ));
        };
        let files = PoolFiles::from_received(fds).map_err(|e| failure(Errno::BADF, chain(&e)))?;
        let broker =
            Broker::recover(files, self.max_regions).map_err(|e| failure(Errno::IO, chain(&e)))?;
        if broker.geometry().uuid != resume.uuid {
            let text = "the client's descriptors are not those of the pool that it names";
            return Err(failure(Errno::BADF, text));
        }
        let shared = Arc::clone(self);
        let deadline = Instant::now() + self.options.grace;
        spawn("pool-settle".to_owned(), move || shared.settle(deadline))
            .map_err(|e| failure(Errno::AGAIN, e.to_string()))?;
        log::info!("recovered the pool");
        Ok(broker)
    }

    /// Waits until every client of the former broker has resumed or is dead.
    fn settle(&self, deadline: Instant) {
        let mut grace = true;
        let mut stopped = lock(&self.stopped);
        while !*stopped {
            drop(stopped);
            if let Some(broker) = lock(&self.broker).as_mut() {
                if broker.settle() {
                    return;
                }
                if grace && Instant::now() >= deadline {
                    grace = false;
                    broker.end_grace();
                    log::warn!(
                        "clients of the former broker live and have not come back: what they \
                         had attached stays theirs"
                    );
                }
            }
            stopped = lock(&self.stopped);
            if !*stopped {
                stopped = self
                    .stop_changed
                    .wait_timeout(stopped, if grace { SETTLE } else { SETTLE_LATE })
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
    }

    /// A client knows that it has resumed: its mark moves on.
    fn confirm(&self, session: SessionId, connection: &Connection) {
        let Some(directory) = lock(&connection.state).directory.take() else {
            return;
        };
        let guard = &mut *lock(&self.broker);
        if let Some(broker) = guard {
            broker.confirm(session);
            if let Err(e) = marks::set(directory.as_fd(), broker.generation()) {
                log::error!("cannot move the mark of client {session}: {e}");
            }
        }
    }

    /// Reads frames until the connection ends or the client is given up.
    fn read(
        &self,
        session: SessionId,
        connection: &Connection,
        queue: &SyncSender<(u64, Request)>,
    ) {
        loop {
            let received = wire::receive(&mut &connection.stream, MAX_REQUEST);
            if connection.given_up() {
                return;
            }
            let why = match received {
                Ok(ToBroker::Request { tag, request }) => {
                    // A full queue makes the client wait; nobody else.
                    if queue.send((tag, request)).is_ok() {
                        continue;
                    }
                    failure(Errno::IO, "the broker cannot serve this client any more")
                }
                Ok(ToBroker::Ack { seq }) => {
                    lock(&connection.state).pending.remove(&seq);
                    connection.changed.notify_all();
                    continue;
                }
                Ok(ToBroker::Resumed) => {
                    self.confirm(session, connection);
                    continue;
                }
                Ok(ToBroker::Hello(_)) => failure(Errno::PROTO, "a second hello"),
                Err(FrameError::Closed | FrameError::Io(_)) => return,
                Err(e) => failure(Errno::PROTO, chain(&e)),
            };
            self.give_up(session, connection, why);
            return;
        }
    }

    /// Carries out requests in order.
    fn work(&self, session: SessionId, connection: &Connection, queue: &Receiver<(u64, Request)>) {
        while let Ok((tag, request)) = queue.recv() {
            self.wait_settled(&request);
            let (answer, files) = {
                let mut guard = lock(&self.broker);
                let Some(broker) = guard.as_mut() else {
                    return;
                };
                if self.stopping() {
                    return;
                }
                (broker.handle(session, request), broker.files())
            };
            let mut result = answer.result;
            if let Some(event) = &answer.invalidate
                && let Err(why) = self.invalidate(event)
                && result.is_ok()
            {
                log::warn!("{why}");
                result = Err(why);
            }
            if let (true, Ok(Reply::Region(region))) = (answer.count_resident, &mut result) {
                region.resident =
                    memory::resident(files.data(), region.data_off, region.len).unwrap_or(0);
            }
            // Without an answer the client asks the next broker again.
            if connection.given_up() || self.stopping() {
                return;
            }
            if let Err(e) = connection.send(&FromBroker::Reply { tag, result }) {
                let text = format!("the client does not read its answers: {}", chain(&e));
                self.give_up(session, connection, failure(Errno::TIMEDOUT, text));
                return;
            }
        }
    }

    /// After a recovery, lets a request wait that must reach guests which have
    /// not resumed yet.
    fn wait_settled(&self, request: &Request) {
        let unsettled = || {
            let guard = lock(&self.broker);
            guard.as_ref().is_some_and(|b| b.awaits_resume(request))
        };
        while !self.stopping() && unsettled() {
            let stopped = lock(&self.stopped);
            let pause = Duration::from_millis(20);
            drop(self.stop_changed.wait_timeout(stopped, pause));
        }
    }

    /// Tells clients that rights are gone, and returns when each of them has
    /// acted on it or is gone. Who does not acknowledge is given up; who was
    /// given up has its memory mapped until its connection ends.
    ///
    /// # Errors
    /// ETIMEDOUT if one has done neither in time.
    fn invalidate(&self, event: &Invalidate) -> Result<(), Failure> {
        let told: Vec<_> = {
            let connections = lock(&self.connections);
            event
                .sessions
                .iter()
                .filter_map(|id| Some((*id, Arc::clone(connections.get(id)?))))
                .map(|(id, c)| (id, c, self.next_seq.fetch_add(1, Ordering::Relaxed)))
                .collect()
        };
        for (_, connection, seq) in &told {
            let mut state = lock(&connection.state);
            state.pending.insert(*seq);
            let told = !state.given_up;
            drop(state);
            if told {
                // If it cannot be told, it will not acknowledge.
                let _ = connection.send(&message(event, *seq));
            }
        }
        let limit = self.options.patience(event.len);
        let deadline = after(limit);
        let mut late = Vec::new();
        for (session, connection, seq) in told {
            let acted = |s: &ConnectionState| s.gone || !s.pending.contains(&seq);
            let heard = |s: &ConnectionState| s.given_up || acted(s);
            // This process may have stood still for all the time: then what the
            // client has sent is still to be read.
            if !connection.wait(deadline, heard) && !connection.wait(after(DRAIN), heard) {
                let text = format!(
                    "no acknowledgement of event {seq} (region {}) within {limit:?}",
                    event.id
                );
                self.give_up(session, &connection, failure(Errno::TIMEDOUT, text));
            }
            if !acted(&lock(&connection.state)) {
                late.push((session, connection));
            }
        }
        let deadline = after(self.options.ack_limit);
        late.retain(|(_, connection)| !connection.wait(deadline, |s| s.gone));
        let late: Vec<SessionId> = late.into_iter().map(|(session, _)| session).collect();
        match &*lock(&self.broker) {
            Some(broker) => broker.check_revoked(event.id, &late),
            None => Ok(()),
        }
    }

    /// Gives a client up; the reader thread watches for its end.
    fn give_up(&self, session: SessionId, connection: &Connection, why: Failure) {
        {
            let mut state = lock(&connection.state);
            if state.given_up || state.gone {
                return;
            }
            state.given_up = true;
        }
        log::warn!("giving client {session} up: {why}");
        if let Some(broker) = lock(&self.broker).as_mut() {
            broker.silence(session);
        }
        let _ = connection.send(&FromBroker::Refused(why));
        let _ = connection.stream.shutdown(Shutdown::Write);
    }
}

fn after(time: Duration) -> Instant {
    Instant::now() + time
}

fn no_descriptor(error: io::Error) -> Failure {
    let text = format!("the broker cannot open the pool's directory anew: {error}");
    failure(Errno::AGAIN, text)
}

fn message(event: &Invalidate, seq: u64) -> FromBroker {
    FromBroker::Invalidate {
        id: event.id,
        offset: event.offset,
        len: event.len,
        seq,
    }
}
