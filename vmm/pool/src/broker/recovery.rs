//! Taking a pool over from a broker that was killed.
//!
//! What clients had attached stays theirs until they have resumed or are proven
//! dead: [`crate::marks`].

use mshare_protocol::broker::{Failure, Request, Resume, Role};
use mshare_protocol::entry::Prot;
use rustix::io::Errno;

use super::{Broker, BrokerError, Invalidate, SessionId};
use crate::directory::{Directory, Entry, State};
use crate::editor::{Tables, page_range};
use crate::failure::{failure, show};
use crate::marks;
use crate::memory::PoolFiles;

impl Broker {
    /// Takes over a pool whose broker was killed, whatever it was doing:
    /// completes protections and destructions that it had begun, undoes
    /// regions whose tables are not complete, frees table pages that nothing
    /// refers to. Clients may resume; [`Broker::settle`] tells when all have.
    ///
    /// # Errors
    /// [`BrokerError`]; the files are as they were, or further recovered.
    pub fn recover(files: PoolFiles, max_regions: usize) -> Result<Self, BrokerError> {
        let files = files.unmarked()?;
        let (directory, intents) = Directory::open(&files, max_regions)?;
        let mut broker = Self::with(files, directory)?;
        broker.grace = true;
        broker.settled = false;
        let left: Vec<Entry> = broker.directory.regions().cloned().collect();
        for entry in left {
            let id = entry.id;
            let span = broker.directory.span(&entry);
            let failed = |source| BrokerError::Tables { id, source };
            match entry.state {
                // The former broker was removing it: nobody can name it.
                State::Unsized if entry.name.is_empty() => broker.destroy(id),
                State::Unsized => {}
                State::Building => {
                    Tables::destroy(&broker.table_file, &span).map_err(failed)?;
                    let undone = broker.directory.undo_build(id);
                    debug_assert!(undone.is_ok());
                }
                State::Live => {
                    let (tables, found) =
                        Tables::recover(&broker.table_file, span).map_err(failed)?;
                    if found.damaged > 0 {
                        log::error!(
                            "region {}: {} table entries were damaged; their 2 MiB each \
                             are without access now",
                            show(&entry.name),
                            found.damaged
                        );
                    }
                    broker.tables.insert(id, tables);
                    broker.awaited.insert(id, entry.attached);
                }
                State::Destroying => broker.destroy(id),
            }
        }
        for (id, intent) in intents {
            let Some(tables) = broker.tables.get_mut(&id) else {
                continue;
            };
            let span = *tables.span();
            if let Some((first, pages)) = page_range(span.len, intent.offset, intent.len) {
                tables
                    .protect(&broker.table_file, first, pages, intent.prot)
                    .map_err(|source| BrokerError::Tables { id, source })?;
            }
            let cleared = broker.directory.set_intent(id, None);
            debug_assert!(cleared.is_ok());
        }
        Ok(broker)
    }

    /// A client is back: what it holds counts again. Returns what a guest with
    /// private tables must drop, because it may have missed events.
    ///
    /// # Errors
    /// ENXIO if it comes from another pool, ESTALE if something that it holds
    /// is gone.
    pub fn resume(
        &mut self,
        role: Role,
        resume: &Resume,
    ) -> Result<(SessionId, Vec<Invalidate>), Failure> {
        if resume.uuid != self.geometry().uuid {
            return Err(failure(
                Errno::NXIO,
                "this broker serves another pool; the client's pool is not here",
            ));
        }
        if role == Role::Admin && !resume.attached.is_empty() {
            return Err(failure(Errno::PERM, "an admin does not resume"));
        }
        let mut stale = Vec::new();
        for &id in &resume.attached {
            let span = self.directory.live(id).map_err(|_| {
                failure(
                    Errno::STALE,
                    format!("region {id} is gone; unmap what is attached and start anew"),
                )
            })?;
            stale.push((id, span.1.len));
        }
        let session = self.connect(role)?;
        let mut private = false;
        if let Some(s) = self.sessions.get_mut(&session) {
            s.attached = resume.attached.iter().copied().collect();
            s.confirmed = false;
            private = s.is_private();
        }
        for &id in &resume.attached {
            if let Some(awaited) = self.awaited.get_mut(&id) {
                awaited.all = awaited.all.saturating_sub(1);
                awaited.private = awaited.private.saturating_sub(private.into());
            }
            self.note_attached(id);
        }
        for &id in &resume.created {
            if self
                .directory
                .get(id)
                .is_ok_and(|e| e.state == State::Unsized)
            {
                self.creators.insert(id, session);
            }
        }
        let events = stale
            .into_iter()
            .filter(|_| private)
            .map(|(id, len)| Invalidate {
                id,
                offset: 0,
                len,
                sessions: vec![session],
            })
            .collect();
        Ok((session, events))
    }

    /// A client that has resumed knows it: the end of its connection is the end
    /// of what it holds.
    pub fn confirm(&mut self, session: SessionId) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.confirmed = true;
        }
    }

    /// Whether every client of former brokers has resumed or is dead. Once that
    /// is so, unlinked regions and unsized ones that nobody holds end.
    pub fn settle(&mut self) -> bool {
        if self.settled {
            return true;
        }
        match marks::any_before(self.files.directory(), self.generation()) {
            Ok(false) => {}
            Ok(true) => return false,
            Err(e) => {
                log::error!("cannot find out whether clients of the former broker live: {e}");
                return false;
            }
        }
        self.settled = true;
        self.grace = false;
        self.awaited.clear();
        let ids: Vec<u64> = self.directory.regions().map(|e| e.id).collect();
        for id in ids {
            self.note_attached(id);
            self.end_if_unused(id);
        }
        true
    }

    /// Requests no longer wait for clients that have not resumed. What those
    /// had attached stays theirs until [`Broker::settle`].
    pub fn end_grace(&mut self) {
        self.grace = false;
    }

    /// Whether `request` takes rights from guests with private tables, or the
    /// name from an unsized region's creator, and some have not resumed yet: it
    /// must wait for them, or for [`Broker::end_grace`].
    #[must_use]
    pub fn awaits_resume(&self, request: &Request) -> bool {
        self.grace
            && match request {
                Request::Protect { id, prot, .. } if *prot != Prot::ReadWrite => {
                    self.private_awaited(*id) > 0
                }
                Request::Create { name, .. } => !self.settled && self.orphan(name).is_some(),
                _ => false,
            }
    }

    /// An unsized region of a former broker that no client has claimed.
    fn orphan(&self, name: &[u8]) -> Option<u64> {
        let entry = self.directory.find(name).ok()?;
        (entry.state == State::Unsized && !self.creators.contains_key(&entry.id))
            .then_some(entry.id)
    }

    /// Removes an orphan whose name is wanted anew. While its creator may live
    /// and claim it, the name exists.
    pub(super) fn bury_orphan(&mut self, name: &[u8]) {
        if self.settled
            && let Some(id) = self.orphan(name)
        {
            self.destroy(id);
        }
    }
}
