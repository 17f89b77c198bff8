//! Where things lie: the window of a pool, and the tables of a region.
//!
//! ```text
//! window_gpa
//! |<- table area (tables file) ->| hole |<------ data area (data file) ------>|
//!                                       ^ window_gpa + data_off, 1 GiB aligned
//!
//! a region's range of the tables file (2 MiB multiple), n = GiB, k = 2 MiB units
//! page 0        n             2n                                      pages
//! |PMD 0..PMD n-1|n shadow pages| PTE-page slots: up to k in use        |
//! ```
//!
//! The PMD pages follow each other, so entry `j` of the region (2 MiB of its
//! address range) is word `j` of the range, and link `i` is page `i`. Page
//! `n + i` is the shadow of PMD page `i`, a hole unless that is being written
//! again (see the editor). Slots that are not in use are holes.

use mshare_protocol::broker::Geometry;
use mshare_protocol::entry::{PAGE_SIZE, PMD_SIZE, PUD_SIZE};

/// Where the window lies unless told otherwise: 256 GiB.
pub const DEFAULT_WINDOW_GPA: u64 = 0x40_0000_0000;
/// End of the addresses that a process can have with 4-level paging.
pub const USER_END: u64 = 1 << 47;
/// End of the guest-physical addresses that an entry can hold.
const GPA_END: u64 = 1 << 52;
/// Largest pool: 64 TiB.
pub const MAX_POOL: u64 = 1 << 46;
/// Bytes of the table area that each GiB of the pool brings.
const TABLES_PER_GIB: u64 = 4 << 20;

/// What a pool is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Bytes of data; a multiple of 2 MiB.
    pub size: u64,
    /// Guest-physical address of the window; a multiple of 1 GiB.
    pub window_gpa: u64,
    /// Bytes of the table area beyond 4 MiB for each GiB of data: room for
    /// regions shorter than 1 GiB, whose tables take 2 MiB of address space
    /// (not of memory) at least.
    pub table_slack: u64,
    /// Most regions that may exist at a time, unlinked ones included.
    pub max_regions: usize,
    /// Map regions by 2 MiB entries where protections allow it.
    pub huge_pages: bool,
    /// Element of the safety protocol to leave out.
    #[cfg(feature = "ablation")]
    pub ablation: Option<crate::editor::Ablation>,
}

impl PoolConfig {
    /// A pool of `size` bytes with defaults for the rest.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            window_gpa: DEFAULT_WINDOW_GPA,
            table_slack: 64 << 20,
            max_regions: crate::record::MAX_RECORDS,
            huge_pages: false,
            #[cfg(feature = "ablation")]
            ablation: None,
        }
    }

    /// The pool's place and cut.
    ///
    /// # Errors
    /// [`LayoutError`] naming the value that does not fit.
    pub fn geometry(&self, uuid: [u8; 16]) -> Result<Geometry, LayoutError> {
        if self.size < PMD_SIZE {
            return Err(LayoutError::TooSmall(self.size));
        }
        if !self.size.is_multiple_of(PMD_SIZE) || self.size > MAX_POOL {
            return Err(LayoutError::Size(self.size));
        }
        if self.window_gpa == 0 || !self.window_gpa.is_multiple_of(PUD_SIZE) {
            return Err(LayoutError::Window(self.window_gpa));
        }
        // A region's tables are never longer than its data, so more table
        // area than data can never be used.
        let table_len = (self.size.div_ceil(PUD_SIZE) * TABLES_PER_GIB)
            .saturating_add(self.table_slack.next_multiple_of(PMD_SIZE))
            .min(self.size);
        let data_off = table_len.next_multiple_of(PUD_SIZE);
        let end = self.window_gpa.checked_add(data_off + self.size);
        if end.is_none_or(|end| end > GPA_END) {
            return Err(LayoutError::Beyond {
                gpa: self.window_gpa,
                len: data_off + self.size,
            });
        }
        Ok(Geometry {
            uuid,
            window_gpa: self.window_gpa,
            table_len,
            data_off,
            data_len: self.size,
            huge_pages: self.huge_pages,
        })
    }
}

/// A pool that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Smaller than any region.
    #[error("a pool of {0} bytes is too small: 2 MiB ({PMD_SIZE}) is the least")]
    TooSmall(u64),
    /// Not a usable size.
    #[error("a pool of {0} bytes cannot be: use a multiple of 2 MiB ({PMD_SIZE}) up to 64 TiB")]
    Size(u64),
    /// Not a usable window.
    #[error("a window at {0:#x} cannot be: use a multiple of 1 GiB above 0")]
    Window(u64),
    /// Beyond what an entry can address.
    #[error("a window of {len:#x} bytes at {gpa:#x} ends beyond 2^52: use a lower address")]
    Beyond {
        /// Its address.
        gpa: u64,
        /// Its length.
        len: u64,
    },
}

/// GiB that a region of `len` bytes spans: its PMD pages, its links.
#[must_use]
pub const fn pmd_pages(len: u64) -> u64 {
    len.div_ceil(PUD_SIZE)
}

/// 2 MiB units of a region of `len` bytes: its PTE pages.
#[must_use]
pub const fn pte_pages(len: u64) -> u64 {
    len.div_ceil(PMD_SIZE)
}

/// Bytes of the tables file that a region of `len` bytes is given: 4 MiB for
/// each GiB, 2 MiB for up to 512 MiB. At least one PTE-page slot is spare, and
/// about as many as are in use, so that a protection of the whole region can
/// be changed in one batch.
#[must_use]
pub const fn region_table_len(len: u64) -> u64 {
    let (n, k) = (pmd_pages(len), pte_pages(len));
    let least = 2 * n + k + 1;
    let pages = if 2 * k > least { 2 * k } else { least };
    (pages * PAGE_SIZE).next_multiple_of(PMD_SIZE)
}

/// The ranges of one region in the files of its pool, and where guests see
/// them. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Length of the region; a multiple of 2 MiB, not zero.
    pub len: u64,
    /// Offset of its tables in the tables file.
    pub table_off: u64,
    /// Length of its range in the tables file.
    pub table_len: u64,
    /// Guest-physical address of the tables file's start.
    pub table_gpa: u64,
    /// Offset of its data in the data file.
    pub data_off: u64,
    /// Guest-physical address of the data file's start.
    pub data_gpa: u64,
    /// Whether units may be mapped by one 2 MiB entry.
    pub huge: bool,
}

impl Span {
    /// Guest-physical address of the page at `page`, in pages from the start
    /// of the region.
    #[must_use]
    pub const fn page_gpa(&self, page: u64) -> u64 {
        self.data_gpa + self.data_off + page * PAGE_SIZE
    }

    /// PTE-page slots, spare ones included.
    #[must_use]
    pub const fn slots(&self) -> u64 {
        self.table_len / PAGE_SIZE - 2 * pmd_pages(self.len)
    }

    /// Offset of a slot in the tables file.
    #[must_use]
    pub const fn slot_off(&self, slot: u64) -> u64 {
        self.table_off + (2 * pmd_pages(self.len) + slot) * PAGE_SIZE
    }

    /// Offset in the tables file of the shadow of a PMD page.
    #[must_use]
    pub const fn shadow_off(&self, gib: u64) -> u64 {
        self.table_off + (pmd_pages(self.len) + gib) * PAGE_SIZE
    }

    /// Guest-physical address of a slot.
    #[must_use]
    pub const fn slot_gpa(&self, slot: u64) -> u64 {
        self.table_gpa + self.slot_off(slot)
    }

    /// The slot at guest-physical address `gpa`, if it is one of this region.
    #[must_use]
    pub fn slot_at(&self, gpa: u64) -> Option<u64> {
        let slot = gpa.checked_sub(self.slot_gpa(0))? / PAGE_SIZE;
        (slot < self.slots() && self.slot_gpa(slot) == gpa).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = PUD_SIZE;

    #[test]
    fn table_lengths() {
        assert_eq!(region_table_len(PMD_SIZE), 2 << 20);
        assert_eq!(region_table_len(512 << 20), 2 << 20);
        assert_eq!(region_table_len((512 << 20) + PMD_SIZE), 4 << 20);
        assert_eq!(region_table_len(GIB), 4 << 20);
        assert_eq!(region_table_len(256 * GIB), 1 << 30);
        for k in 1..3000 {
            let len = k * PMD_SIZE;
            let pages = region_table_len(len) / PAGE_SIZE;
            assert!(pages > 2 * pmd_pages(len) + k, "no spare slot for {k}");
            assert!(region_table_len(len) <= len.max(PMD_SIZE));
        }
    }

    #[test]
    fn geometry_of_usual_pools() {
        let g = PoolConfig::new(300 * GIB).geometry([0; 16]).unwrap();
        assert_eq!(g.table_len, (1200 << 20) + (64 << 20));
        assert_eq!(g.data_off, 2 * GIB);
        assert_eq!(g.window_len(), 302 * GIB);
        let g = PoolConfig::new(64 << 20).geometry([0; 16]).unwrap();
        assert_eq!((g.table_len, g.data_off), (64 << 20, GIB));
    }

    #[test]
    fn impossible_pools_are_refused_by_name() {
        let config = |size, window_gpa| PoolConfig {
            window_gpa,
            ..PoolConfig::new(size)
        };
        for (size, gpa, text) in [
            (0, GIB, "too small"),
            (4096, GIB, "too small"),
            (PMD_SIZE + 1, GIB, "multiple of 2 MiB"),
            (!(PMD_SIZE - 1), GIB, "up to 64 TiB"),
            (PMD_SIZE, 0, "window"),
            (PMD_SIZE, GIB + 4096, "window"),
            (PMD_SIZE, !0 << 30, "2^52"),
        ] {
            let error = config(size, gpa).geometry([0; 16]).unwrap_err();
            assert!(error.to_string().contains(text), "{size} {gpa}: {error}");
        }
    }
}
