//! The VMM's side of a broker's socket.
//!
//! A [`Client`] survives the death of its broker: calls wait, the reader
//! thread connects again every [`RETRY`] until a broker that serves the same
//! pool answers, says what the client still holds, and the calls go on. A
//! request that may or may not have been executed before the death is sent
//! again; the answers are mended so that the caller sees one execution.
//!
//! Threads: any number may call; one thread of the client's own
//! (`pool-client`) reads the socket and delivers [`Event`]s.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mshare_protocol::broker::{
    Failure, FromBroker, Geometry, PoolStat, Region, Reply, Request, Role, ToBroker,
};
use mshare_protocol::entry::Prot;
use mshare_protocol::frame::{self, FrameError, MAX_FRAME};
use mshare_protocol::report::chain;
use rustix::io::Errno;

use crate::failure::{failure, is};
use crate::memory::PoolFiles;
pub use crate::session::ClientError;
use crate::session::{self, Held};
use crate::wire;

/// Pause between two attempts to reach a new broker.
pub const RETRY: Duration = Duration::from_millis(100);

/// What the broker says without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Rights in a range were taken away. A guest with private tables must
    /// drop what it derived from them; then [`Acker::ack`] `seq`. If the guest
    /// has nothing of region `id` mapped (or no driver is bound), acknowledge
    /// at once: the event may even come before the answer to the ATTACH. After
    /// 2 s (and 250 ms for each GiB) without an acknowledgement the broker gives
    /// this client up.
    Invalidate {
        /// Region.
        id: u64,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// To be acknowledged.
        seq: u64,
    },
    /// The broker has given this client up, or what it held is gone: **before
    /// the callback returns, every region must be unmapped from the guest**
    /// (remove the memslots). Nothing is attached afterwards; the client
    /// connects anew and later requests work.
    Dropped(Failure),
    /// The broker died. Memory stays mapped; calls wait. For information.
    Lost,
    /// A broker serves the pool again, all attachments are kept. For
    /// information.
    Resumed,
}

/// Acknowledges events; cheap to clone, may be used from any thread.
#[derive(Clone, Debug)]
pub struct Acker(Arc<Inner>);

impl Acker {
    /// Tells the broker that event `seq` has been acted on. Without a
    /// connection nothing is to be told: the next broker asks again.
    pub fn ack(&self, seq: u64) {
        self.0.send(None, &ToBroker::Ack { seq });
    }
}

/// A connection to a pool. Dropping it ends the connection, and with it every
/// attachment: unmap first.
#[derive(Debug)]
pub struct Client {
    inner: Arc<Inner>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    role: Role,
    geometry: Geometry,
    files: PoolFiles,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a frame is written; never together with `state`, so that a
    /// broker that is slow to read does not keep its own answers from us.
    writer: Mutex<Writer>,
}

#[derive(Debug)]
struct Writer {
    /// Which connection this is.
    generation: u64,
    stream: Option<UnixStream>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Counts connections; a call that sees it change sends again.
    generation: u64,
    next_tag: u64,
    calls: HashMap<u64, Call>,
    held: Held,
}

#[derive(Debug)]
enum Phase {
    Up,
    Down,
    Ended(Failure),
}

#[derive(Debug)]
struct Call {
    request: Request,
    result: Option<Result<Reply, Failure>>,
}

impl Client {
    /// Connects to the broker at `path`. `on_event` runs on the client's
    /// reader thread; it must not call [`Client::call`] (the answer would be
    /// read by the same thread).
    ///
    /// A client of [`Role::Guest`] reconnects when its broker dies; one of
    /// [`Role::Admin`] fails its calls instead.
    ///
    /// # Errors
    /// [`ClientError`]; nothing is retried here.
    pub fn connect(
        path: &Path,
        role: Role,
        on_event: impl FnMut(Event, &Acker) + Send + 'static,
    ) -> Result<Self, ClientError> {
        let (stream, geometry, files) = session::open(path, &role, None)?;
        let reading = stream.try_clone().map_err(ClientError::Thread)?;
        let inner = Arc::new(Inner {
            path: path.to_owned(),
            role,
            geometry,
            files,
            state: Mutex::new(State {
                phase: Phase::Up,
                generation: 0,
                next_tag: 1,
                calls: HashMap::new(),
                held: Held::default(),
            }),
            changed: Condvar::new(),
            writer: Mutex::new(Writer {
                generation: 0,
                stream: Some(stream),
            }),
        });
        let acker = Acker(Arc::clone(&inner));
        let reader = std::thread::Builder::new()
            .name("pool-client".to_owned())
            .spawn(move || read_loop(&acker, reading, on_event))
            .map_err(ClientError::Thread)?;
        Ok(Self {
            inner,
            reader: Some(reader),
        })
    }

    /// Where the pool lies.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.inner.geometry
    }

    /// The pool's files, to map what is attached.
    #[must_use]
    pub fn files(&self) -> &PoolFiles {
        &self.inner.files
    }

    /// A handle to acknowledge events with.
    #[must_use]
    pub fn acker(&self) -> Acker {
        Acker(Arc::clone(&self.inner))
    }

    /// See [`Acker::ack`].
    pub fn ack(&self, seq: u64) {
        self.inner.send(None, &ToBroker::Ack { seq });
    }

    /// Sends a request and waits for its answer, through deaths of the broker
    /// if need be; [`Client::close`] from another thread ends the wait.
    ///
    /// # Errors
    /// The broker's [`Failure`]; ESHUTDOWN once the client is closed or, for
    /// an admin, the broker is gone.
    pub fn call(&self, request: Request) -> Result<Reply, Failure> {
        let mut state = self.inner.state();
        let mut tries = 0;
        loop {
            state = self.inner.wait_up(state)?;
            let generation = state.generation;
            let tag = state.next_tag;
            state.next_tag += 1;
            state.held.before(&request);
            let call = Call {
                request: request.clone(),
                result: None,
            };
            state.calls.insert(tag, call);
            drop(state);
            let message = ToBroker::Request {
                tag,
                request: request.clone(),
            };
            self.inner.send(Some(generation), &message);
            tries += 1;
            state = self.inner.state();
            loop {
                if let Some(result) = state.calls.get_mut(&tag).and_then(|c| c.result.take()) {
                    state.calls.remove(&tag);
                    drop(state);
                    return if tries > 1 {
                        mend(&request, result)
                    } else {
                        result
                    };
                }
                let ended = matches!(state.phase, Phase::Ended(_));
                if ended || state.generation != generation {
                    break;
                }
                state = self.inner.wait(state, None);
            }
            state.calls.remove(&tag);
        }
    }

    fn region(&self, request: Request) -> Result<Region, Failure> {
        match self.call(request)? {
            Reply::Region(region) => Ok(region),
            other => Err(unexpected(&other)),
        }
    }

    fn done(&self, request: Request) -> Result<(), Failure> {
        self.call(request).map(|_| ())
    }

    /// Finds a region by name.
    ///
    /// # Errors
    /// ENOENT; as [`Client::call`].
    pub fn lookup(&self, name: &[u8]) -> Result<Region, Failure> {
        let name = name.to_vec();
        self.region(Request::Lookup { name })
    }

    /// Creates an unsized region. It dies with this client unless it is sized.
    ///
    /// # Errors
    /// EINVAL, ENAMETOOLONG, EEXIST, EROFS, ENOSPC; as [`Client::call`].
    pub fn create(&self, name: &[u8], mode: u32, uid: u32, gid: u32) -> Result<Region, Failure> {
        let name = name.to_vec();
        self.region(Request::Create {
            name,
            mode,
            uid,
            gid,
        })
    }

    /// Gives a region its address and length.
    ///
    /// # Errors
    /// EINVAL, ENOENT, ENOSPC, ENOMEM, EADDRINUSE, EROFS; as [`Client::call`].
    pub fn size(&self, id: u64, start: u64, len: u64) -> Result<Region, Failure> {
        self.region(Request::Size { id, start, len })
    }

    /// Attaches. Map the region's tables and data after it.
    ///
    /// # Errors
    /// ENOENT, EAGAIN (unsized), EALREADY; as [`Client::call`].
    pub fn attach(&self, id: u64) -> Result<Region, Failure> {
        self.region(Request::Attach { id })
    }

    /// Detaches. Unmap the region before it.
    ///
    /// # Errors
    /// ENOTCONN if it is not attached; as [`Client::call`].
    pub fn detach(&self, id: u64) -> Result<(), Failure> {
        self.done(Request::Detach { id })
    }

    /// Sets the protection of a range for everybody.
    ///
    /// # Errors
    /// EINVAL, ENOENT, EAGAIN (unsized), ENOTCONN (not attached), EROFS, ENOMEM,
    /// ETIMEDOUT (a guest may still use what was taken away); as
    /// [`Client::call`].
    pub fn protect(&self, id: u64, offset: u64, len: u64, prot: Prot) -> Result<(), Failure> {
        self.done(Request::Protect {
            id,
            offset,
            len,
            prot,
        })
    }

    /// Frees the memory of a range.
    ///
    /// # Errors
    /// EINVAL, ENOENT, EAGAIN (unsized), ENOTCONN (not attached), EROFS; as
    /// [`Client::call`].
    pub fn discard(&self, id: u64, offset: u64, len: u64) -> Result<(), Failure> {
        self.done(Request::Discard { id, offset, len })
    }

    /// Removes a name; with `id`, only if it is that region's.
    ///
    /// # Errors
    /// ENOENT, ESTALE (another region's name), EROFS; as [`Client::call`].
    pub fn unlink(&self, name: &[u8], id: Option<u64>) -> Result<(), Failure> {
        let name = name.to_vec();
        self.done(Request::Unlink { name, id })
    }

    /// Reports on a region, its resident bytes included.
    ///
    /// # Errors
    /// ENOENT; as [`Client::call`].
    pub fn stat(&self, id: u64) -> Result<Region, Failure> {
        self.region(Request::Stat { id })
    }

    /// Lists named regions from id `from` on: some of them, at most `max` (not
    /// zero), in order of id; none when the list has ended.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn list(&self, from: u64, max: u32) -> Result<Vec<Region>, Failure> {
        match self.call(Request::List { from, max })? {
            Reply::List(regions) => Ok(regions),
            other => Err(unexpected(&other)),
        }
    }

    /// Reports on the pool.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn pool_stat(&self) -> Result<PoolStat, Failure> {
        match self.call(Request::PoolStat)? {
            Reply::Pool(stat) => Ok(stat),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends the connection; calls in progress and later ones fail with
    /// ESHUTDOWN. Unmap what is attached first.
    pub fn close(&self) {
        self.inner.end(failure(
            Errno::SHUTDOWN,
            "the connection to the broker is closed",
        ));
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
        if let Some(reader) = self.reader.take()
            && reader.thread().id() != std::thread::current().id()
            && reader.join().is_err()
        {
            log::error!("the reader thread of a pool client panicked");
        }
    }
}

fn unexpected(reply: &Reply) -> Failure {
    failure(
        Errno::PROTO,
        format!("the broker answered another request: {reply:?}"),
    )
}

/// Turns the answer to a request that was sent more than once into the answer
/// of a single execution.
fn mend(request: &Request, result: Result<Reply, Failure>) -> Result<Reply, Failure> {
    match (request, &result) {
        (Request::Detach { .. }, Err(e)) if is(e, Errno::NOTCONN) || is(e, Errno::NOENT) => {
            Ok(Reply::Done)
        }
        (Request::Unlink { id: Some(_), .. }, Err(e)) if is(e, Errno::NOENT) => Ok(Reply::Done),
        _ => result,
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        match limit {
            None => self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                self.changed
                    .wait_timeout(state, limit)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        }
    }

    fn wait_up<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
    ) -> Result<MutexGuard<'a, State>, Failure> {
        loop {
            match &state.phase {
                Phase::Up => return Ok(state),
                Phase::Ended(why) => return Err(why.clone()),
                Phase::Down => state = self.wait(state, None),
            }
        }
    }

    /// Writes one frame; with a generation, only if that connection is still
    /// the one (a request must not reach two brokers unnoticed). A failure
    /// needs no report: it ends the connection, which the reader notices.
    fn send(&self, generation: Option<u64>, message: &ToBroker) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if generation.is_some_and(|g| g != writer.generation) {
            return;
        }
        let Some(stream) = writer.stream.as_mut() else {
            return;
        };
        let sent = frame::encode(message).and_then(|bytes| Ok(stream.write_all(&bytes)?));
        if sent.is_err() {
            let _ = stream.shutdown(Shutdown::Both);
            writer.stream = None;
        }
    }

    fn set_writer(&self, generation: u64, stream: Option<UnixStream>) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = writer.stream.take() {
            let _ = old.shutdown(Shutdown::Both);
        }
        *writer = Writer { generation, stream };
    }

    fn end(&self, why: Failure) {
        let mut state = self.state();
        if !matches!(state.phase, Phase::Ended(_)) {
            state.phase = Phase::Ended(why);
        }
        let generation = state.generation;
        drop(state);
        self.set_writer(generation, None);
        self.changed.notify_all();
    }

    fn reply(&self, tag: u64, result: Result<Reply, Failure>) {
        let mut state = self.state();
        let State { calls, held, .. } = &mut *state;
        if let Some(call) = calls.get_mut(&tag) {
            if let Ok(reply) = &result {
                held.after(&call.request, reply);
            }
            call.result = Some(result);
            self.changed.notify_all();
        }
    }

    /// Takes a new connection into use; false if the client was closed.
    fn up(&self, stream: UnixStream) -> bool {
        let generation = self.state().generation;
        self.set_writer(generation, Some(stream));
        let mut state = self.state();
        if matches!(state.phase, Phase::Ended(_)) {
            drop(state);
            self.set_writer(generation, None);
            return false;
        }
        state.phase = Phase::Up;
        self.changed.notify_all();
        log::info!("a broker serves {} again", self.path.display());
        true
    }

    /// Waits for [`RETRY`], or until something changes.
    fn pause(&self) {
        let state = self.state();
        if !matches!(state.phase, Phase::Ended(_)) {
            drop(self.wait(state, Some(RETRY)));
        }
    }

    /// Forgets the connection; false if there will be no other.
    fn down(&self) -> bool {
        let mut state = self.state();
        state.generation += 1;
        let generation = state.generation;
        let again = match state.phase {
            Phase::Ended(_) => false,
            _ if self.role == Role::Admin => {
                state.phase = Phase::Ended(failure(
                    Errno::SHUTDOWN,
                    format!("the broker at {} ended the connection", self.path.display()),
                ));
                false
            }
            _ => {
                state.phase = Phase::Down;
                true
            }
        };
        drop(state);
        self.set_writer(generation, None);
        self.changed.notify_all();
        again
    }
}

/// Reads messages, and connects again when they end.
fn read_loop(
    acker: &Acker,
    mut stream: UnixStream,
    mut on_event: impl FnMut(Event, &Acker) + Send,
) {
    let inner = &*acker.0;
    loop {
        let given_up = read_messages(acker, &mut stream, &mut on_event);
        if let Some(why) = &given_up {
            log::warn!("the broker gave this client up: {why}");
            inner.state().held = Held::default();
            on_event(Event::Dropped(why.clone()), acker);
        }
        let again = inner.down();
        drop(stream);
        if !again {
            return;
        }
        if given_up.is_none() {
            log::warn!("lost the broker at {}", inner.path.display());
            on_event(Event::Lost, acker);
        }
        match reconnect(acker, &mut on_event) {
            Some(next) => stream = next,
            None => return,
        }
        if given_up.is_none() {
            on_event(Event::Resumed, acker);
        }
    }
}

/// Reads until the connection ends; the reason, if the broker gave one.
fn read_messages(
    acker: &Acker,
    stream: &mut UnixStream,
    on_event: &mut impl FnMut(Event, &Acker),
) -> Option<Failure> {
    loop {
        match wire::receive(stream, MAX_FRAME) {
            Ok(FromBroker::Reply { tag, result }) => acker.0.reply(tag, result),
            Ok(FromBroker::Invalidate {
                id,
                offset,
                len,
                seq,
            }) => on_event(
                Event::Invalidate {
                    id,
                    offset,
                    len,
                    seq,
                },
                acker,
            ),
            Ok(FromBroker::Refused(why)) => return Some(why),
            Ok(FromBroker::Welcome(_)) => log::warn!("a second welcome from the broker"),
            Err(e) => {
                log::debug!("the broker's messages end: {}", chain(&e));
                return torn(&e).then(|| failure(Errno::PROTO, chain(&e)));
            }
        }
    }
}

/// Whether the broker's messages ended within one. A broker that lives may have
/// tried to give this client up, and takes the end of the connection for the end of
/// its memslots.
fn torn(error: &FrameError) -> bool {
    match error {
        FrameError::Closed => false,
        FrameError::Io(error) => error.kind() == io::ErrorKind::UnexpectedEof,
        FrameError::TooLong(_) | FrameError::Codec(_) => true,
    }
}

/// Tries until a broker takes this client back; `None` once it is closed.
fn reconnect(acker: &Acker, on_event: &mut impl FnMut(Event, &Acker)) -> Option<UnixStream> {
    let inner = &*acker.0;
    let mut said = None;
    loop {
        let mut state = inner.state();
        if matches!(state.phase, Phase::Ended(_)) {
            return None;
        }
        let held = std::mem::take(&mut state.held);
        drop(state);
        // Nobody else changes `held` meanwhile: calls wait for the phase.
        let tried = session::open(
            &inner.path,
            &inner.role,
            Some((&inner.geometry, &held, &inner.files)),
        );
        inner.state().held = held;
        match tried {
            Ok((stream, geometry, _)) if geometry == inner.geometry => {
                if let Ok(reading) = stream.try_clone() {
                    let up = inner.up(stream);
                    inner.send(None, &ToBroker::Resumed);
                    return up.then_some(reading);
                }
            }
            Err(ClientError::Refused(why)) if is(&why, Errno::STALE) => {
                log::warn!("what this client held is gone: {why}");
                inner.state().held = Held::default();
                on_event(Event::Dropped(why), acker);
                continue;
            }
            other => {
                let reason = match other {
                    Err(e) => chain(&e),
                    Ok(_) => "the broker there serves another pool".to_owned(),
                };
                if said.as_ref() != Some(&reason) {
                    log::warn!("waiting for a broker: {reason}");
                    said = Some(reason);
                }
            }
        }
        inner.pause();
    }
}
