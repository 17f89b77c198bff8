//! The directory: which regions there are, what they are called, where they
//! lie. Every change is in the directory's file when a method returns, in the
//! order that [`crate::record`] describes.

use std::collections::{BTreeMap, BTreeSet};

use mshare_protocol::broker::Geometry;
use mshare_protocol::entry::{PMD_SIZE, PUD_SIZE};
use rustix::io::Errno;

use crate::alloc::RangeAllocator;
use crate::failure::show;
use crate::layout::{Span, USER_END, region_table_len};
use crate::memory::{MemoryError, PoolFiles, SharedFile};
pub use crate::record::{Counts, Entry, Intent, MAX_RECORDS, NAME_MAX, RecordError, State};
use crate::record::{RecordError as E, Records};

/// Why the directory refuses a change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// Longer than a name may be.
    #[error("the name has {0} bytes; use at most {NAME_MAX}")]
    NameTooLong(usize),
    /// Not a name.
    #[error("{name} cannot be the name of a region: {reason}", name = show(.name))]
    BadName {
        /// As given.
        name: Vec<u8>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Not permission bits.
    #[error("{0:#o} are no permission bits; use at most 0777")]
    BadMode(u32),
    /// Taken.
    #[error("there is a region called {name} already", name = show(.0))]
    Exists(Vec<u8>),
    /// No region of that name.
    #[error("there is no region called {name}", name = show(.0))]
    NoName(Vec<u8>),
    /// No region of that id.
    #[error("there is no region with id {0}")]
    NoId(u64),
    /// The name belongs to another region.
    #[error("{name} is now region {is}, not {asked}", name = show(.name))]
    Stale {
        /// The name.
        name: Vec<u8>,
        /// Whose it is.
        is: u64,
        /// Whose it should have been.
        asked: u64,
    },
    /// No record is left.
    #[error("the pool holds {0} regions, which is its limit; unlink one")]
    Full(usize),
    /// Not a length.
    #[error("a region cannot have {0} bytes; use a multiple of 2 MiB ({PMD_SIZE}), not 0")]
    BadLength(u64),
    /// Not an address.
    #[error(
        "a region of {len:#x} bytes cannot be at {start:#x}; use a multiple of 1 GiB, \
         not 0, so that it ends below {USER_END:#x}"
    )]
    BadAddress {
        /// As given.
        start: u64,
        /// As given.
        len: u64,
    },
    /// It is sized differently.
    #[error("{name} is {len:#x} bytes at {start:#x} already and cannot change", name = show(.name))]
    Sized {
        /// Of the region.
        name: Vec<u8>,
        /// Its address.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// It is not sized yet.
    #[error("{name} has no length yet; size it first, or try again", name = show(.0))]
    Unsized(Vec<u8>),
    /// Another region is there.
    #[error(
        "{start:#x} overlaps {name}, which has the addresses {at:#x} to {end:#x}",
        name = show(.name)
    )]
    Overlap {
        /// Address asked for.
        start: u64,
        /// The other region.
        name: Vec<u8>,
        /// Its first address.
        at: u64,
        /// The address after its last GiB.
        end: u64,
    },
    /// No range is free.
    #[error(
        "{len} bytes do not fit in the pool's {what} area: of {size} bytes, {free} are free, \
         {longest} of them in one piece"
    )]
    NoSpace {
        /// Which area.
        what: &'static str,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the area.
        size: u64,
        /// Bytes free.
        free: u64,
        /// Longest run.
        longest: u64,
    },
}

impl DirectoryError {
    /// The errno that a system call returns for it.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NameTooLong(_) => Errno::NAMETOOLONG,
            Self::BadName { .. }
            | Self::BadMode(_)
            | Self::BadLength(_)
            | Self::BadAddress { .. }
            | Self::Sized { .. } => Errno::INVAL,
            Self::Exists(_) => Errno::EXIST,
            Self::NoName(_) | Self::NoId(_) => Errno::NOENT,
            Self::Stale { .. } => Errno::STALE,
            Self::Full(_) | Self::NoSpace { .. } => Errno::NOSPC,
            Self::Unsized(_) => Errno::AGAIN,
            Self::Overlap { .. } => Errno::ADDRINUSE,
        }
    }
}

/// Why a directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its file cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its content cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Checks a name.
///
/// # Errors
/// [`DirectoryError::NameTooLong`], [`DirectoryError::BadName`].
pub fn check_name(name: &[u8]) -> Result<(), DirectoryError> {
    let reason = match name {
        _ if name.len() > NAME_MAX => return Err(DirectoryError::NameTooLong(name.len())),
        [] => "it is empty",
        b"." | b".." => "it is a directory's",
        _ if name.contains(&b'/') => "it contains a '/'",
        _ if name.contains(&0) => "it contains a NUL",
        _ => return Ok(()),
    };
    Err(DirectoryError::BadName {
        name: name.to_vec(),
        reason,
    })
}

#[derive(Debug)]
struct Held {
    slot: usize,
    entry: Entry,
}

/// The regions of a pool.
#[derive(Debug)]
pub struct Directory {
    geometry: Geometry,
    records: Records,
    max_regions: usize,
    regions: BTreeMap<u64, Held>,
    names: BTreeMap<Vec<u8>, u64>,
    free: BTreeSet<usize>,
    data: RangeAllocator,
    tables: RangeAllocator,
}

impl Directory {
    fn with(records: Records, geometry: Geometry, max_regions: usize) -> Self {
        Self {
            records,
            max_regions: max_regions.min(MAX_RECORDS),
            regions: BTreeMap::new(),
            names: BTreeMap::new(),
            free: (0..MAX_RECORDS).collect(),
            data: RangeAllocator::new(geometry.data_len, PMD_SIZE),
            tables: RangeAllocator::new(geometry.table_len, PMD_SIZE),
            geometry,
        }
    }

    /// An empty directory in a new file.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn create(
        files: &PoolFiles,
        geometry: &Geometry,
        max_regions: usize,
    ) -> Result<Self, OpenError> {
        let file = SharedFile::open(files.directory())?;
        Ok(Self::with(
            Records::format(file, geometry),
            *geometry,
            max_regions,
        ))
    }

    /// Reads a directory that a broker has left, with the protections that it
    /// had begun. Regions are in the states in which they were left.
    ///
    /// # Errors
    /// [`OpenError`] if the file is no directory or a record is damaged.
    pub fn open(
        files: &PoolFiles,
        max_regions: usize,
    ) -> Result<(Self, Vec<(u64, Intent)>), OpenError> {
        let (records, geometry) = Records::open(SharedFile::open(files.directory())?)?;
        files.check(&geometry)?;
        records.set_generation(records.generation().saturating_add(1));
        let mut directory = Self::with(records, geometry, max_regions);
        let mut intents = Vec::new();
        let mut last_id = 0;
        for slot in 0..MAX_RECORDS {
            let Some((entry, intent)) = directory.records.read(slot)? else {
                continue;
            };
            last_id = last_id.max(entry.id);
            if let (State::Live, Some(intent)) = (entry.state, intent) {
                intents.push((entry.id, intent));
            }
            directory
                .adopt(slot, entry)
                .map_err(|reason| E::Damaged { slot, reason })?;
        }
        if directory.records.next_id() <= last_id {
            directory.records.set_next_id(last_id + 1);
        }
        Ok((directory, intents))
    }

    fn adopt(&mut self, slot: usize, entry: Entry) -> Result<(), &'static str> {
        if entry.id == 0 || self.regions.contains_key(&entry.id) {
            return Err("its id is in use");
        }
        if entry.state != State::Unsized {
            let good = check_extent(entry.start, entry.len).is_ok()
                && entry.table_len == region_table_len(entry.len);
            if !good
                || !self.data.take_at(entry.data_off, entry.len)
                || !self.tables.take_at(entry.table_off, entry.table_len)
            {
                return Err("its ranges cannot be");
            }
        }
        if !entry.name.is_empty() {
            if check_name(&entry.name).is_err() {
                return Err("its name cannot be");
            }
            if self.names.insert(entry.name.clone(), entry.id).is_some() {
                return Err("its name is in use");
            }
        }
        self.free.remove(&slot);
        self.regions.insert(entry.id, Held { slot, entry });
        Ok(())
    }

    /// Where the pool lies.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Which broker of the pool this is: the first has 1.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.records.generation()
    }

    /// Free bytes of the data area, and the longest run of them.
    #[must_use]
    pub fn data_free(&self) -> (u64, u64) {
        (self.data.free(), self.data.longest())
    }

    /// All regions, in order of id.
    pub fn regions(&self) -> impl Iterator<Item = &Entry> {
        self.regions.values().map(|held| &held.entry)
    }

    /// Regions from an id on, in order of id.
    pub fn regions_from(&self, from: u64) -> impl Iterator<Item = &Entry> {
        self.regions.range(from..).map(|(_, held)| &held.entry)
    }

    /// A region.
    ///
    /// # Errors
    /// [`DirectoryError::NoId`].
    pub fn get(&self, id: u64) -> Result<&Entry, DirectoryError> {
        let held = self.regions.get(&id).ok_or(DirectoryError::NoId(id))?;
        Ok(&held.entry)
    }

    /// A region by name.
    ///
    /// # Errors
    /// [`DirectoryError::NoName`] or that of [`check_name`].
    pub fn find(&self, name: &[u8]) -> Result<&Entry, DirectoryError> {
        check_name(name)?;
        match self.names.get(name) {
            Some(&id) => self.get(id),
            None => Err(DirectoryError::NoName(name.to_vec())),
        }
    }

    /// A region with its ranges.
    ///
    /// # Errors
    /// [`DirectoryError::NoId`], [`DirectoryError::Unsized`].
    pub fn live(&self, id: u64) -> Result<(&Entry, Span), DirectoryError> {
        let entry = self.get(id)?;
        match entry.state {
            State::Live => Ok((entry, self.span(entry))),
            State::Unsized | State::Building => Err(DirectoryError::Unsized(entry.name.clone())),
            State::Destroying => Err(DirectoryError::NoId(id)),
        }
    }

    /// The ranges of a sized region.
    #[must_use]
    pub const fn span(&self, entry: &Entry) -> Span {
        Span {
            len: entry.len,
            table_off: entry.table_off,
            table_len: entry.table_len,
            table_gpa: self.geometry.window_gpa,
            data_off: entry.data_off,
            data_gpa: self.geometry.window_gpa + self.geometry.data_off,
            huge: self.geometry.huge_pages,
        }
    }

    /// Creates an unsized region and returns its id.
    ///
    /// # Errors
    /// [`DirectoryError`]: a bad name or mode, one that exists, no record.
    pub fn create_region(
        &mut self,
        name: &[u8],
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> Result<u64, DirectoryError> {
        check_name(name)?;
        if mode > 0o777 {
            return Err(DirectoryError::BadMode(mode));
        }
        if self.names.contains_key(name) {
            return Err(DirectoryError::Exists(name.to_vec()));
        }
        let slot = match self.free.first() {
            Some(&slot) if self.regions.len() < self.max_regions => slot,
            _ => return Err(DirectoryError::Full(self.regions.len())),
        };
        let id = self.records.next_id();
        self.records.set_next_id(id + 1);
        let entry = Entry {
            id,
            name: name.to_vec(),
            state: State::Unsized,
            start: 0,
            len: 0,
            table_off: 0,
            table_len: 0,
            data_off: 0,
            mode,
            uid,
            gid,
            attached: Counts::default(),
        };
        self.records.create(slot, &entry);
        self.free.remove(&slot);
        self.names.insert(entry.name.clone(), id);
        self.regions.insert(id, Held { slot, entry });
        Ok(id)
    }

    /// Gives an unsized region its address and ranges: it is BUILDING then.
    /// `None` if it has exactly this extent already.
    ///
    /// # Errors
    /// [`DirectoryError`]: a bad extent, another one, an overlap, no space.
    pub fn begin_build(
        &mut self,
        id: u64,
        start: u64,
        len: u64,
    ) -> Result<Option<Span>, DirectoryError> {
        check_extent(start, len)?;
        let entry = self.get(id)?;
        if entry.state != State::Unsized {
            return if (entry.start, entry.len) == (start, len) {
                Ok(None)
            } else {
                Err(DirectoryError::Sized {
                    name: entry.name.clone(),
                    start: entry.start,
                    len: entry.len,
                })
            };
        }
        let reach = |start: u64, len: u64| start + len.next_multiple_of(PUD_SIZE);
        // A region without a name cannot be attached anew, so its addresses
        // are free for its successor.
        let other = self.regions().find(|e| {
            e.state != State::Unsized
                && !e.name.is_empty()
                && e.start < reach(start, len)
                && start < reach(e.start, e.len)
        });
        if let Some(other) = other {
            return Err(DirectoryError::Overlap {
                start,
                name: other.name.clone(),
                at: other.start,
                end: reach(other.start, other.len),
            });
        }
        let table_len = region_table_len(len);
        let data_off = self
            .data
            .take(len)
            .ok_or_else(|| no_space("data", len, self.geometry.data_len, &self.data))?;
        let Some(table_off) = self.tables.take(table_len) else {
            self.data.give(data_off, len);
            let size = self.geometry.table_len;
            return Err(no_space("table", table_len, size, &self.tables));
        };
        let Some(Held { slot, entry }) = self.regions.get_mut(&id) else {
            return Err(DirectoryError::NoId(id));
        };
        entry.start = start;
        entry.len = len;
        entry.table_off = table_off;
        entry.table_len = table_len;
        entry.data_off = data_off;
        self.records.set_ranges(*slot, entry);
        self.records.set_state(*slot, State::Building);
        entry.state = State::Building;
        let entry = entry.clone();
        Ok(Some(self.span(&entry)))
    }

    /// The tables are complete: BUILDING to LIVE.
    ///
    /// # Errors
    /// [`DirectoryError::NoId`].
    pub fn end_build(&mut self, id: u64) -> Result<(), DirectoryError> {
        self.set_state(id, State::Live)
    }

    /// The tables could not be built and are gone: BUILDING to UNSIZED.
    ///
    /// # Errors
    /// [`DirectoryError::NoId`].
    pub fn undo_build(&mut self, id: u64) -> Result<(), DirectoryError> {
        self.set_state(id, State::Unsized)?;
        if let Some(Held { entry, .. }) = self.regions.get_mut(&id) {
            self.data.give(entry.data_off, entry.len);
            self.tables.give(entry.table_off, entry.table_len);
            entry.start = 0;
            entry.len = 0;
            entry.table_off = 0;
            entry.table_len = 0;
            entry.data_off = 0;
        }
        Ok(())
    }

    /// Removes a name and returns the region's id; with `id`, only if it is
    /// that region's.
    ///
    /// # Errors
    /// [`DirectoryError::NoName`], [`DirectoryError::Stale`].
    pub fn unlink(&mut self, name: &[u8], id: Option<u64>) -> Result<u64, DirectoryError> {
        let is = self.find(name)?.id;
        if let Some(asked) = id.filter(|&asked| asked != is) {
            return Err(DirectoryError::Stale {
                name: name.to_vec(),
                is,
                asked,
            });
        }
        self.unname(is);
        Ok(is)
    }

    fn unname(&mut self, id: u64) {
        if let Some(Held { slot, entry }) = self.regions.get_mut(&id)
            && !entry.name.is_empty()
        {
            self.records.unname(*slot, entry.mode);
            self.names.remove(&entry.name);
            entry.name.clear();
        }
    }

    /// The region ends: its name goes, and if it has ranges they are returned;
    /// free what is in them, then call [`Directory::end_destroy`].
    ///
    /// # Errors
    /// [`DirectoryError::NoId`].
    pub fn begin_destroy(&mut self, id: u64) -> Result<Option<Span>, DirectoryError> {
        self.unname(id);
        if self.get(id)?.state == State::Unsized {
            return Ok(None);
        }
        self.set_state(id, State::Destroying)?;
        let entry = self.get(id)?;
        Ok(Some(self.span(entry)))
    }

    /// What was in the region's ranges is gone.
    pub fn end_destroy(&mut self, id: u64) {
        if let Some(Held { slot, entry }) = self.regions.remove(&id) {
            self.records.free(slot);
            self.free.insert(slot);
            if entry.state != State::Unsized {
                self.data.give(entry.data_off, entry.len);
                self.tables.give(entry.table_off, entry.table_len);
            }
        }
    }

    fn set_state(&mut self, id: u64, state: State) -> Result<(), DirectoryError> {
        let held = self.regions.get_mut(&id).ok_or(DirectoryError::NoId(id))?;
        self.records.set_state(held.slot, state);
        held.entry.state = state;
        Ok(())
    }

    /// Notes how many guests are attached, or are to resume.
    pub fn set_attached(&mut self, id: u64, counts: Counts) {
        if let Some(held) = self.regions.get_mut(&id)
            && held.entry.attached != counts
        {
            self.records.set_attached(held.slot, counts);
            held.entry.attached = counts;
        }
    }

    /// Notes a protection that is about to be carried out (`None`: is done).
    ///
    /// # Errors
    /// [`DirectoryError::NoId`].
    pub fn set_intent(&self, id: u64, intent: Option<&Intent>) -> Result<(), DirectoryError> {
        let held = self.regions.get(&id).ok_or(DirectoryError::NoId(id))?;
        self.records.set_intent(held.slot, intent);
        Ok(())
    }
}

fn check_extent(start: u64, len: u64) -> Result<(), DirectoryError> {
    if len == 0 || !len.is_multiple_of(PMD_SIZE) {
        return Err(DirectoryError::BadLength(len));
    }
    let end = len
        .checked_next_multiple_of(PUD_SIZE)
        .and_then(|len| start.checked_add(len));
    if start == 0 || !start.is_multiple_of(PUD_SIZE) || end.is_none_or(|end| end > USER_END) {
        return Err(DirectoryError::BadAddress { start, len });
    }
    Ok(())
}

fn no_space(what: &'static str, len: u64, size: u64, area: &RangeAllocator) -> DirectoryError {
    DirectoryError::NoSpace {
        what,
        len,
        size,
        free: area.free(),
        longest: area.longest(),
    }
}
