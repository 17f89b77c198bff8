//! The directory's file: a header page and records of fixed size.
//!
//! ```text
//! header, words:  0 magic | 1 version | 2,3 uuid | 4 window | 5 table_len
//!                 6 data_off | 7 data_len | 8 next id | 9 1 if huge pages
//!                 10 generation of the broker
//! record, words:  0 state | 1 id | 2 start | 3 len | 4 table_off | 5 table_len
//!                 6 data_off | 7 uid, gid | 8 mode, name length | 9 intent
//!                 10 intent offset | 11 intent length
//!                 12 attachments, private ones | 32..64 name
//! ```
//!
//! All words are stored one by one, in program order. A record's state is
//! stored after what the state makes valid, so whatever the instruction at
//! which a broker is killed, each record is in one of its states:
//!
//! ```text
//! FREE -> UNSIZED -> BUILDING -> LIVE -> DESTROYING -> FREE
//!             ^---------'  (no memory; or recovery, which undoes it)
//! ```
//!
//! A name is removed by one store (word 8). An intent (word 9, stored last and
//! cleared last) is a protection that recovery completes.

use mshare_protocol::broker::Geometry;
use mshare_protocol::entry::{PAGE_SIZE, Prot};

use crate::memory::{SharedFile, WORD};

/// Most regions in a pool.
pub const MAX_RECORDS: usize = 4096;
/// Bytes of the directory's file.
pub const DIRECTORY_LEN: u64 = PAGE_SIZE + MAX_RECORDS as u64 * RECORD_WORDS * WORD;

const MAGIC: u64 = u64::from_le_bytes(*b"mshare\0p");
const VERSION: u64 = 3;
const RECORD_WORDS: u64 = 64;
const NAME_WORD: u64 = 32;
/// Longest name in bytes.
pub const NAME_MAX: usize = 255;

const H_MAGIC: u64 = 0;
const H_NEXT_ID: u64 = 8;
const H_GENERATION: u64 = 10;

const R_STATE: u64 = 0;
const R_START: u64 = 2;
const R_MODE: u64 = 8;
const R_INTENT: u64 = 9;
const R_ATTACHED: u64 = 12;

/// How far a region has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has a name and an owner.
    Unsized,
    /// It has its ranges; the tables are not complete.
    Building,
    /// It can be attached.
    Live,
    /// It has lost its name and attachments; its memory is being freed.
    Destroying,
}

const FREE: u64 = 0;

impl State {
    const fn word(self) -> u64 {
        match self {
            Self::Unsized => 1,
            Self::Building => 2,
            Self::Live => 3,
            Self::Destroying => 4,
        }
    }

    const fn from_word(word: u64) -> Option<Self> {
        match word {
            1 => Some(Self::Unsized),
            2 => Some(Self::Building),
            3 => Some(Self::Live),
            4 => Some(Self::Destroying),
            _ => None,
        }
    }
}

/// A protection in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Byte offset in the region.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// New protection.
    pub prot: Prot,
}

/// A region as the directory knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Never zero, never used twice.
    pub id: u64,
    /// Empty once unlinked.
    pub name: Vec<u8>,
    /// How far it has come.
    pub state: State,
    /// Virtual address; zero while unsized.
    pub start: u64,
    /// Bytes; zero while unsized.
    pub len: u64,
    /// Offset of its tables; zero while unsized.
    pub table_off: u64,
    /// Bytes of tables file; zero while unsized.
    pub table_len: u64,
    /// Offset of its data; zero while unsized.
    pub data_off: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Attachments: after the broker's death, those that are to resume.
    pub attached: Counts,
}

/// Attachments of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub all: u32,
    /// Those of guests with private tables.
    pub private: u32,
}

/// A directory file that is none of a pool, or a record that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not a directory.
    #[error("the directory file is not that of a pool")]
    Magic,
    /// From another version.
    #[error("the directory file has version {0}, this broker reads {VERSION}")]
    Version(u64),
    /// A record holds what no broker writes.
    #[error("record {slot} of the directory is damaged: {reason}")]
    Damaged {
        /// Its number.
        slot: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Access to the records of a directory file.
#[derive(Debug)]
pub struct Records {
    file: SharedFile,
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

#[allow(clippy::cast_possible_truncation)] // The point of it.
const fn unpair(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

impl Records {
    /// Writes the header of an empty directory.
    #[must_use]
    pub fn format(file: SharedFile, geometry: &Geometry) -> Self {
        let uuid = u128::from_le_bytes(geometry.uuid);
        let bytes = uuid.to_le_bytes();
        for (i, half) in (2..).zip(bytes.chunks_exact(8)) {
            file.store(i, half.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b)));
        }
        file.store(1, VERSION);
        file.store(4, geometry.window_gpa);
        file.store(5, geometry.table_len);
        file.store(6, geometry.data_off);
        file.store(7, geometry.data_len);
        file.store(9, geometry.huge_pages.into());
        file.store(H_NEXT_ID, 1);
        file.store(H_GENERATION, 1);
        file.store(H_MAGIC, MAGIC);
        Self { file }
    }

    /// Reads the header of an existing directory.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn open(file: SharedFile) -> Result<(Self, Geometry), RecordError> {
        if file.words() * WORD != DIRECTORY_LEN || file.load(H_MAGIC) != MAGIC {
            return Err(RecordError::Magic);
        }
        if file.load(1) != VERSION {
            return Err(RecordError::Version(file.load(1)));
        }
        let uuid = u128::from(file.load(2)) | u128::from(file.load(3)) << 64;
        let geometry = Geometry {
            uuid: uuid.to_le_bytes(),
            window_gpa: file.load(4),
            table_len: file.load(5),
            data_off: file.load(6),
            data_len: file.load(7),
            huge_pages: file.load(9) != 0,
        };
        Ok((Self { file }, geometry))
    }

    /// The id of the next region.
    #[must_use]
    pub fn next_id(&self) -> u64 {
        self.file.load(H_NEXT_ID)
    }

    /// Sets the id of the next region; before the last one is used.
    pub fn set_next_id(&self, id: u64) {
        self.file.store(H_NEXT_ID, id);
    }

    /// Which broker of the pool this is: the first has 1.
    #[must_use]
    pub fn generation(&self) -> u32 {
        unpair(self.file.load(H_GENERATION)).0
    }

    /// Sets the generation; before the broker has a client.
    pub fn set_generation(&self, generation: u32) {
        self.file.store(H_GENERATION, generation.into());
    }

    fn word(slot: usize, word: u64) -> u64 {
        PAGE_SIZE / WORD + slot as u64 * RECORD_WORDS + word
    }

    fn put(&self, slot: usize, word: u64, value: u64) {
        self.file.store(Self::word(slot, word), value);
    }

    fn get(&self, slot: usize, word: u64) -> u64 {
        self.file.load(Self::word(slot, word))
    }

    /// Writes a new region into a free record.
    pub fn create(&self, slot: usize, entry: &Entry) {
        self.put(slot, 1, entry.id);
        self.put(slot, 7, pair(entry.uid, entry.gid));
        let name_len = u32::try_from(entry.name.len()).unwrap_or(0);
        self.put(slot, R_MODE, pair(entry.mode, name_len));
        self.put(slot, R_INTENT, 0);
        self.set_attached(slot, entry.attached);
        for (i, chunk) in (NAME_WORD..).zip(entry.name.chunks(8)) {
            let word = chunk.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
            self.put(slot, i, word);
        }
        self.set_state(slot, entry.state);
    }

    /// Writes the ranges of a region; its state follows.
    pub fn set_ranges(&self, slot: usize, entry: &Entry) {
        self.put(slot, R_START, entry.start);
        self.put(slot, 3, entry.len);
        self.put(slot, 4, entry.table_off);
        self.put(slot, 5, entry.table_len);
        self.put(slot, 6, entry.data_off);
    }

    /// Stores the state.
    pub fn set_state(&self, slot: usize, state: State) {
        self.put(slot, R_STATE, state.word());
    }

    /// Stores the numbers of attachments.
    pub fn set_attached(&self, slot: usize, counts: Counts) {
        self.put(slot, R_ATTACHED, pair(counts.all, counts.private));
    }

    /// Frees the record.
    pub fn free(&self, slot: usize) {
        self.put(slot, R_STATE, FREE);
    }

    /// Removes the name.
    pub fn unname(&self, slot: usize, mode: u32) {
        self.put(slot, R_MODE, pair(mode, 0));
    }

    /// Notes a protection that is about to be carried out, or has been.
    pub fn set_intent(&self, slot: usize, intent: Option<&Intent>) {
        let Some(intent) = intent else {
            self.put(slot, R_INTENT, 0);
            return;
        };
        self.put(slot, 10, intent.offset);
        self.put(slot, 11, intent.len);
        self.put(slot, R_INTENT, pair(1, intent.prot.bits()));
    }

    /// Reads a record; `None` if it is free.
    ///
    /// # Errors
    /// [`RecordError::Damaged`].
    pub fn read(&self, slot: usize) -> Result<Option<(Entry, Option<Intent>)>, RecordError> {
        let damaged = |reason| RecordError::Damaged { slot, reason };
        let state = match self.get(slot, R_STATE) {
            FREE => return Ok(None),
            word => State::from_word(word).ok_or_else(|| damaged("unknown state"))?,
        };
        let (mode, name_len) = unpair(self.get(slot, R_MODE));
        let (uid, gid) = unpair(self.get(slot, 7));
        let name_len = name_len as usize;
        if name_len > NAME_MAX {
            return Err(damaged("its name is too long"));
        }
        let mut name: Vec<u8> = (NAME_WORD..RECORD_WORDS)
            .take(name_len.div_ceil(8))
            .flat_map(|i| self.get(slot, i).to_le_bytes())
            .collect();
        name.truncate(name_len);
        let has_ranges = state != State::Unsized;
        let range = |word| if has_ranges { self.get(slot, word) } else { 0 };
        let (all, private) = unpair(self.get(slot, R_ATTACHED));
        let entry = Entry {
            id: self.get(slot, 1),
            name,
            state,
            start: range(R_START),
            len: range(3),
            table_off: range(4),
            table_len: range(5),
            data_off: range(6),
            mode,
            uid,
            gid,
            attached: Counts { all, private },
        };
        let intent = match unpair(self.get(slot, R_INTENT)) {
            (0, _) => None,
            (1, bits) => Some(Intent {
                offset: self.get(slot, 10),
                len: self.get(slot, 11),
                prot: Prot::from_bits(bits).ok_or_else(|| damaged("unknown protection"))?,
            }),
            _ => return Err(damaged("unknown intent")),
        };
        Ok(Some((entry, intent)))
    }
}
