//! The broker: sessions and requests. It decides what is allowed and in which
//! order files, tables and directory change; sockets are in [`crate::server`].
//!
//! A region ends when it has no name and no attachment. An attachment ends
//! with a DETACH or with its client's connection. A client that is *silent*
//! (given up for not answering) no longer counts for anybody, but what it had
//! attached stays until its connection has ended: until then its guest may
//! still have the memory mapped.

mod recovery;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mshare_protocol::broker::{Failure, Geometry, Policy, PoolStat, Region, Reply, Request, Role};
use mshare_protocol::entry::{PAGE_SIZE, Prot};
use mshare_protocol::report::chain;
use rustix::io::Errno;

use crate::directory::{Counts, Directory, DirectoryError, Entry, Intent, OpenError, State};
use crate::editor::{EditError, Tables, page_range};
use crate::failure::{failure, show};
use crate::layout::{LayoutError, PoolConfig};
use crate::memory::{self, MemoryError, PoolFiles, SharedFile};

/// Longest name of a guest in bytes.
pub const GUEST_NAME_MAX: usize = 64;
/// Bytes after which an answer to LIST ends.
const LIST_BYTES: usize = 512 << 10;

/// Why there is no broker.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The pool cannot be as asked for.
    #[error("bad pool")]
    Layout(#[from] LayoutError),
    /// No memory, or wrong files.
    #[error("cannot set up the pool's memory")]
    Memory(#[from] MemoryError),
    /// No random numbers.
    #[error("cannot make an identity for the pool")]
    Identity(#[source] std::io::Error),
    /// The directory cannot be used.
    #[error("cannot open the pool's directory")]
    Directory(#[from] OpenError),
    /// The tables cannot be recovered.
    #[error("cannot recover the tables of region {id}")]
    Tables {
        /// Of the region.
        id: u64,
        /// Cause.
        #[source]
        source: EditError,
    },
}

/// A connection, as the broker numbers them.
pub type SessionId = u64;

#[derive(Debug)]
struct Session {
    role: Role,
    attached: BTreeSet<u64>,
    silent: bool,
    /// Not one that has resumed and may not know it yet.
    confirmed: bool,
}

/// Guests to be told that rights are gone. There may be others that have not
/// resumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalidate {
    /// Region.
    pub id: u64,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whom to tell, or to wait for if they are silent.
    pub sessions: Vec<SessionId>,
}

/// What came of a request.
#[derive(Debug)]
pub struct Answer {
    /// For the client, once `invalidate` is done.
    pub result: Result<Reply, Failure>,
    /// To be done before the answer is sent.
    pub invalidate: Option<Invalidate>,
    /// The region's resident bytes are to be filled in (outside of any lock).
    pub count_resident: bool,
}

/// A pool and who uses it.
#[derive(Debug)]
pub struct Broker {
    files: Arc<PoolFiles>,
    table_file: SharedFile,
    directory: Directory,
    tables: BTreeMap<u64, Tables>,
    /// Who created an unsized region. Without an entry it is an orphan of a
    /// former broker.
    creators: BTreeMap<u64, SessionId>,
    sessions: BTreeMap<SessionId, Session>,
    next_session: SessionId,
    /// After recovery, until [`Broker::end_grace`]: requests may wait for
    /// clients that have not resumed yet.
    grace: bool,
    /// Attachments of clients that may live and have not resumed.
    awaited: BTreeMap<u64, Counts>,
    /// Every client of former brokers has resumed or is dead.
    settled: bool,
    #[cfg(feature = "ablation")]
    ablation: Option<crate::editor::Ablation>,
}

fn refuse(error: &DirectoryError) -> Failure {
    failure(error.errno(), error.to_string())
}

impl From<DirectoryError> for Refusal {
    fn from(error: DirectoryError) -> Self {
        Self(refuse(&error))
    }
}

impl From<EditError> for Refusal {
    fn from(error: EditError) -> Self {
        let errno = match error {
            EditError::NoMemory(_) => Errno::NOMEM,
            EditError::Punch(_) => Errno::IO,
        };
        Self(failure(errno, chain(&error)))
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

/// A [`Failure`] that `?` can make from this crate's errors.
struct Refusal(Failure);

type Outcome<T> = Result<T, Refusal>;

impl Broker {
    /// Creates a pool.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub fn new(config: &PoolConfig) -> Result<Self, BrokerError> {
        let uuid = memory::random_id().map_err(BrokerError::Identity)?;
        let geometry = config.geometry(uuid)?;
        let files = PoolFiles::create(&geometry)?;
        let directory = Directory::create(&files, &geometry, config.max_regions)?;
        let broker = Self::with(files, directory)?;
        #[cfg(feature = "ablation")]
        let broker = Self {
            ablation: config.ablation,
            ..broker
        };
        Ok(broker)
    }

    fn with(files: PoolFiles, directory: Directory) -> Result<Self, BrokerError> {
        Ok(Self {
            table_file: SharedFile::open(files.tables())?,
            files: Arc::new(files),
            directory,
            tables: BTreeMap::new(),
            creators: BTreeMap::new(),
            sessions: BTreeMap::new(),
            next_session: 1,
            grace: false,
            awaited: BTreeMap::new(),
            settled: true,
            #[cfg(feature = "ablation")]
            ablation: None,
        })
    }

    /// The pool's place.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        self.directory.geometry()
    }

    /// Which broker of the pool this is, for [`crate::marks`].
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.directory.generation()
    }

    /// The pool's files.
    #[must_use]
    pub fn files(&self) -> Arc<PoolFiles> {
        Arc::clone(&self.files)
    }

    /// A client has come.
    ///
    /// # Errors
    /// EINVAL if its name cannot be.
    pub fn connect(&mut self, role: Role) -> Result<SessionId, Failure> {
        if let Role::Guest { name, .. } = &role
            && (name.is_empty() || name.len() > GUEST_NAME_MAX)
        {
            return Err(failure(
                Errno::INVAL,
                format!(
                    "the guest's name has {} bytes; use 1 to {GUEST_NAME_MAX}",
                    name.len()
                ),
            ));
        }
        let id = self.next_session;
        self.next_session += 1;
        let session = Session {
            role,
            attached: BTreeSet::new(),
            silent: false,
            confirmed: true,
        };
        self.sessions.insert(id, session);
        Ok(id)
    }

    /// Why rights in a region may not be gone: the guests of `late` have not
    /// acknowledged and still have it attached, or others have not resumed.
    ///
    /// # Errors
    /// ETIMEDOUT, naming them.
    pub fn check_revoked(&self, id: u64, late: &[SessionId]) -> Result<(), Failure> {
        let mut holders: Vec<String> = late
            .iter()
            .filter_map(|session| self.sessions.get(session))
            .filter_map(|s| match &s.role {
                Role::Guest { name, .. } if s.attached.contains(&id) => Some(name.clone()),
                _ => None,
            })
            .collect();
        match self.private_awaited(id) {
            0 => {}
            away => holders.push(format!("{away} not seen since the former broker")),
        }
        if holders.is_empty() {
            return Ok(());
        }
        let text = format!(
            "guests that have not acknowledged may still use what was taken away from region \
             {id}: {}; try again, or end their VMMs",
            holders.join(", ")
        );
        Err(failure(Errno::TIMEDOUT, text))
    }

    /// How many private attachments of a region have not resumed.
    fn private_awaited(&self, id: u64) -> u32 {
        self.awaited.get(&id).map_or(0, |a| a.private)
    }

    /// Sessions of guests that have a region attached privately.
    fn private_attached(&self, id: u64) -> impl Iterator<Item = SessionId> {
        self.sessions
            .iter()
            .filter(move |(_, s)| s.is_private() && s.attached.contains(&id))
            .map(|(&session, _)| session)
    }

    /// Keeps the directory's count of attachments.
    fn note_attached(&mut self, id: u64) {
        let mut counts = self.awaited.get(&id).copied().unwrap_or_default();
        for session in self.sessions.values().filter(|s| s.attached.contains(&id)) {
            counts.all += 1;
            counts.private += u32::from(session.is_private());
        }
        self.directory.set_attached(id, counts);
    }

    /// A client is given up. Its attachments no longer count for anybody; they
    /// hold the memory until [`Broker::disconnect`].
    pub fn silence(&mut self, session: SessionId) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.silent = true;
        }
    }

    /// A client's connection has ended: it holds nothing any more.
    pub fn disconnect(&mut self, session: SessionId) {
        let Some(gone) = self.sessions.remove(&session) else {
            return;
        };
        let created: Vec<u64> = self
            .creators
            .iter()
            .filter(|&(_, &by)| by == session)
            .map(|(&id, _)| id)
            .collect();
        for id in created {
            self.destroy(id);
        }
        for &id in &gone.attached {
            if !gone.confirmed && !self.settled {
                // It does not know that it is back, and will try again.
                let awaited = self.awaited.entry(id).or_default();
                awaited.all += 1;
                awaited.private += u32::from(gone.is_private());
            }
            self.note_attached(id);
            self.end_if_unused(id);
        }
    }

    fn end_if_unused(&mut self, id: u64) {
        let Ok(entry) = self.directory.get(id) else {
            return;
        };
        let wanted = match entry.state {
            State::Unsized => !self.settled || self.creators.contains_key(&id),
            _ => !entry.name.is_empty() || entry.attached.all > 0,
        };
        if !wanted {
            self.destroy(id);
        }
    }

    /// Ends a region. If memory cannot be freed, the region keeps its ranges
    /// (they are lost until a recovery) rather than giving them to another.
    fn destroy(&mut self, id: u64) {
        self.creators.remove(&id);
        self.tables.remove(&id);
        let Ok(span) = self.directory.begin_destroy(id) else {
            return;
        };
        if let Some(span) = span {
            let freed = Tables::destroy(&self.table_file, &span)
                .map_err(|e| chain(&e))
                .and_then(|()| {
                    memory::punch(self.files.data(), span.data_off, span.len).map_err(|e| chain(&e))
                });
            if let Err(reason) = freed {
                log::error!("region {id} cannot be freed: {reason}");
                return;
            }
        }
        self.directory.end_destroy(id);
    }

    /// Carries out a request.
    pub fn handle(&mut self, session: SessionId, request: Request) -> Answer {
        let mut answer = Answer {
            count_resident: matches!(request, Request::Stat { .. }),
            invalidate: None,
            result: Ok(Reply::Done),
        };
        match self.dispatch(session, request, &mut answer.invalidate) {
            Ok(reply) => answer.result = Ok(reply),
            Err(Refusal(failure)) => answer.result = Err(failure),
        }
        answer
    }

    fn dispatch(
        &mut self,
        session: SessionId,
        request: Request,
        invalidate: &mut Option<Invalidate>,
    ) -> Outcome<Reply> {
        self.check_rights(session, &request)?;
        match request {
            Request::Lookup { name } => Ok(self.report(self.directory.find(&name)?)),
            Request::Create {
                name,
                mode,
                uid,
                gid,
            } => {
                self.bury_orphan(&name);
                let id = self.directory.create_region(&name, mode, uid, gid)?;
                self.creators.insert(id, session);
                Ok(self.report(self.directory.get(id)?))
            }
            Request::Size { id, start, len } => {
                self.size(id, start, len)?;
                Ok(self.report(self.directory.get(id)?))
            }
            Request::Attach { id } => {
                self.attach(session, id)?;
                Ok(self.report(self.directory.get(id)?))
            }
            Request::Detach { id } => {
                let attached = self.sessions.get_mut(&session).map(|s| &mut s.attached);
                if !attached.is_some_and(|a| a.remove(&id)) {
                    let text = format!("region {id} is not attached");
                    return Err(failure(Errno::NOTCONN, text).into());
                }
                self.note_attached(id);
                self.end_if_unused(id);
                Ok(Reply::Done)
            }
            Request::Protect {
                id,
                offset,
                len,
                prot,
            } => {
                self.check_attached(session, id)?;
                self.protect(id, &Intent { offset, len, prot }, invalidate)?;
                Ok(Reply::Done)
            }
            Request::Discard { id, offset, len } => {
                self.check_attached(session, id)?;
                let (entry, span) = self.directory.live(id)?;
                check_range(entry, offset, len)?;
                memory::punch(self.files.data(), span.data_off + offset, len)
                    .map_err(EditError::Punch)?;
                Ok(Reply::Done)
            }
            Request::Unlink { name, id } => {
                let id = self.directory.unlink(&name, id)?;
                if self.directory.get(id)?.state == State::Unsized {
                    self.destroy(id);
                } else {
                    self.end_if_unused(id);
                }
                Ok(Reply::Done)
            }
            Request::Stat { id } => Ok(self.report(self.directory.get(id)?)),
            Request::List { from, max } => Ok(Reply::List(self.list(from, max))),
            Request::PoolStat => Ok(Reply::Pool(self.pool_stat())),
        }
    }

    fn check_rights(&self, session: SessionId, request: &Request) -> Outcome<()> {
        let role = match self.sessions.get(&session) {
            Some(s) if !s.silent => &s.role,
            _ => {
                let text = "the client's connection has ended";
                return Err(failure(Errno::SHUTDOWN, text).into());
            }
        };
        let writes = matches!(
            request,
            Request::Create { .. }
                | Request::Size { .. }
                | Request::Protect { .. }
                | Request::Discard { .. }
                | Request::Unlink { .. }
        );
        match role {
            Role::Guest { name, policy } if writes && !policy.writes() => {
                let text =
                    format!("guest {name} may only read this pool (its policy is read-only)");
                Err(failure(Errno::ROFS, text).into())
            }
            _ => Ok(()),
        }
    }

    /// A guest changes only regions that it has attached: its driver attaches
    /// before it lets a process ask.
    fn check_attached(&self, session: SessionId, id: u64) -> Outcome<()> {
        let (entry, _) = self.directory.live(id)?;
        match self.sessions.get(&session) {
            Some(s) if matches!(s.role, Role::Guest { .. }) && !s.attached.contains(&id) => {
                let name = show(&entry.name);
                let text = format!("region {id} ({name}) is not attached; attach it first");
                Err(failure(Errno::NOTCONN, text).into())
            }
            _ => Ok(()),
        }
    }

    fn size(&mut self, id: u64, start: u64, len: u64) -> Outcome<()> {
        let Some(span) = self.directory.begin_build(id, start, len)? else {
            return Ok(());
        };
        match Tables::build(&self.table_file, span, Prot::ReadWrite) {
            Ok(tables) => {
                self.directory.end_build(id)?;
                #[cfg(feature = "ablation")]
                let tables = {
                    let mut tables = tables;
                    tables.ablate(self.ablation);
                    tables
                };
                self.tables.insert(id, tables);
                self.creators.remove(&id);
                Ok(())
            }
            // Pages that could not be freed must not be found by a successor.
            Err(e @ EditError::Punch(_)) => Err(e.into()),
            Err(e) => {
                self.directory.undo_build(id)?;
                Err(e.into())
            }
        }
    }

    fn attach(&mut self, session: SessionId, id: u64) -> Outcome<()> {
        let (entry, _) = self.directory.live(id)?;
        let name = show(&entry.name);
        let attached = self.sessions.get_mut(&session).map(|s| &mut s.attached);
        if !attached.is_some_and(|a| a.insert(id)) {
            let text = format!("region {id} ({name}) is attached already; attach once");
            return Err(failure(Errno::ALREADY, text).into());
        }
        self.note_attached(id);
        Ok(())
    }

    fn protect(
        &mut self,
        id: u64,
        intent: &Intent,
        invalidate: &mut Option<Invalidate>,
    ) -> Outcome<()> {
        let (entry, _) = self.directory.live(id)?;
        let (first, pages) = check_range(entry, intent.offset, intent.len)?;
        let Some(tables) = self.tables.get_mut(&id) else {
            return Err(refuse(&DirectoryError::NoId(id)).into());
        };
        self.directory.set_intent(id, Some(intent))?;
        let edit = tables.protect(&self.table_file, first, pages, intent.prot);
        self.directory.set_intent(id, None)?;
        // Guests are told even if the tables had lost the right before: another
        // call may still wait for them, or a former broker have told nobody.
        // After an error some of the rights may be gone.
        let told = intent.prot != Prot::ReadWrite || edit.as_ref().map_or(true, |e| e.revoked);
        if told {
            let sessions: Vec<SessionId> = self.private_attached(id).collect();
            if !sessions.is_empty() || self.private_awaited(id) > 0 {
                *invalidate = Some(Invalidate {
                    id,
                    offset: intent.offset,
                    len: intent.len,
                    sessions,
                });
            }
        }
        edit?;
        Ok(())
    }

    fn report(&self, entry: &Entry) -> Reply {
        Reply::Region(self.region(entry))
    }

    fn region(&self, entry: &Entry) -> Region {
        Region {
            id: entry.id,
            name: entry.name.clone(),
            start: entry.start,
            len: entry.len,
            table_off: entry.table_off,
            table_len: entry.table_len,
            data_off: entry.data_off,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            resident: 0,
            table_bytes: self.tables.get(&entry.id).map_or(0, Tables::bytes),
            attached: self
                .guests()
                .filter(|(_, s)| s.attached.contains(&entry.id))
                .map(|(name, _)| name.clone())
                .collect(),
        }
    }

    fn guests(&self) -> impl Iterator<Item = (&String, &Session)> {
        self.sessions.values().filter_map(|s| match &s.role {
            Role::Guest { name, .. } if !s.silent => Some((name, s)),
            _ => None,
        })
    }

    fn list(&self, from: u64, max: u32) -> Vec<Region> {
        let mut bytes = 0;
        self.directory
            .regions_from(from)
            .filter(|e| !e.name.is_empty())
            .take(usize::try_from(max).unwrap_or(usize::MAX))
            .map(|e| self.region(e))
            .take_while(|r| {
                let fits = bytes < LIST_BYTES;
                let guests: usize = r.attached.iter().map(|name| name.len() + 2).sum();
                bytes += 128 + r.name.len() + guests;
                fits
            })
            .collect()
    }

    fn pool_stat(&self) -> PoolStat {
        let (data_free, data_free_run) = self.directory.data_free();
        PoolStat {
            geometry: *self.geometry(),
            data_free,
            data_free_run,
            resident: memory::occupied(self.files.data()),
            table_bytes: memory::occupied(self.files.tables()),
            regions: self.directory.regions().count() as u64,
            guests: self.guests().map(|(name, _)| name.clone()).collect(),
        }
    }
}

impl Session {
    fn is_private(&self) -> bool {
        matches!(
            &self.role,
            Role::Guest {
                policy: Policy::Private | Policy::PrivateRo,
                ..
            }
        )
    }
}

fn check_range(entry: &Entry, offset: u64, len: u64) -> Outcome<(u64, u64)> {
    page_range(entry.len, offset, len).ok_or_else(|| {
        let text = format!(
            "the range of {len:#x} bytes at offset {offset:#x} is not one of {}; use multiples \
             of {PAGE_SIZE}, not empty, that end at most at {:#x}",
            show(&entry.name),
            entry.len
        );
        failure(Errno::INVAL, text).into()
    })
}

#[cfg(test)]
mod tests;
