//! The table editor: the one writer of table entries.
//!
//! A *unit* is 2 MiB of a region, one PMD entry. It is mapped by a PTE page (a
//! *slot* of the region's range) or, in a region with huge pages, by the PMD
//! entry itself: a *leaf*. Invariants, for every region:
//! 1. Each of the `k` PMD entries is a leaf or points at its own slot, from the
//!    end of [`Tables::build`] to the start of [`Tables::destroy`]. Only while
//!    a PMD page is being rewritten (6) its entries are zero, which to a guest
//!    means: try again.
//! 2. The content of an entry is a function of its page and its protection
//!    alone ([`leaf`], [`huge_leaf`]). A copy of a PTE page is made anew from
//!    what the old entries permit, never from their bits: a word that a guest
//!    has damaged is not carried on. There is no leaf without access; such a
//!    unit has a PTE page.
//! 3. A page of entries is complete before a PMD entry points at it (release).
//! 4. An edit that adds rights is a store in place: a CPU that still holds
//!    the old entry faults once and walks again.
//! 5. An edit that takes a right away from a unit with a PTE page is copy,
//!    publish, punch: the PTE page is copied with the edit into a spare slot,
//!    the PMD entry is switched to it (or to a leaf), and the old slot is
//!    punched out of the file. The punch makes every vCPU flush that could hold
//!    a translation made from the old page.
//! 6. A leaf lives in a PMD page, which links refer to by its address: it
//!    cannot be replaced by another. So an edit that takes a right from a leaf,
//!    or splits it, is shadow, punch, rewrite: the page's new content is made in
//!    its shadow, the PMD page is punched, which makes every vCPU flush, and is
//!    written again from the shadow, which is punched last. No CPU ever holds a
//!    leaf and entries of the PTE page that replaces it at the same time.
//! 7. A slot is spare if no PMD entry refers to it; a spare slot is a hole in
//!    the file, and so is a shadow that is not in use. A PMD page with a zero
//!    entry was being rewritten and its shadow is complete. So the state can be
//!    read off the tables, which is how [`Tables::recover`] finds it after the
//!    broker was killed.

mod recover;
mod replace;
mod slots;

use std::ops::Range;

use mshare_protocol::entry::{
    A, D, ENTRIES, P, PAGE_SIZE, PMD_SIZE, Prot, RW, huge_leaf, leaf, table,
};

use crate::layout::{Span, pmd_pages, pte_pages};
use crate::memory::{MemoryError, SharedFile, WORD};
use replace::{Batch, Change};
use slots::SlotMap;

pub use recover::Found;

/// Words in a page.
const PAGE_WORDS: u64 = PAGE_SIZE / WORD;

/// Why tables could not be edited. What was done before remains, complete.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// The tables need more memory than there is.
    #[error("no memory for page tables")]
    NoMemory(#[source] MemoryError),
    /// An old table page could not be freed, so rights may not be gone.
    #[error("cannot free a table page")]
    Punch(#[source] MemoryError),
}

/// An element of the protocol to leave out, to show that it is needed.
#[cfg(feature = "ablation")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ablation {
    /// Nothing is punched: CPUs go on with what they have cached. A leaf is
    /// edited in place.
    SkipPunch,
    /// The PMD entry is switched before the copy is complete.
    PublishBeforeCopy,
    /// The dirty bit stays on read-only entries: a shadow-stack page to CET.
    KeepDirty,
    /// Rights are taken away by a store in place.
    EditInPlace,
    /// A PMD page is punched without a shadow.
    SkipShadow,
}

/// What an edit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Entries stored in place.
    pub stored: u64,
    /// PTE pages replaced by a copy or by a leaf.
    pub replaced: u64,
    /// Leaves changed by writing their PMD page again.
    pub rewritten: u64,
    /// Whether some right was taken away from somebody.
    pub revoked: bool,
}

/// How a unit is mapped. What guests write into the tables does not steer it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// By the PTE page in this slot.
    Table(u32),
    /// By a leaf with this protection, which is not [`Prot::None`].
    Leaf(Prot),
}

/// The tables of one region.
#[derive(Debug)]
pub struct Tables {
    span: Span,
    units: Vec<Unit>,
    slots: SlotMap,
    /// PMD pages that are punched and have to be written again. Empty between
    /// edits, unless there was no memory.
    torn: Vec<u64>,
    /// PMD pages with the rights that their units had before an edit: they have
    /// to be punched. Empty between edits, unless a punch failed.
    unpunched: Vec<u32>,
    /// Slots that the edit under way has replaced, or one whose punch failed.
    old: Vec<u32>,
    #[cfg(feature = "ablation")]
    ablation: Option<Ablation>,
}

/// What an entry permits.
const fn prot_of(entry: u64) -> Prot {
    if entry & P == 0 {
        Prot::None
    } else if entry & RW == 0 {
        Prot::Read
    } else {
        Prot::ReadWrite
    }
}

/// Whether an entry differs from what the broker wrote in more than bits that
/// CPUs set.
const fn foreign(entry: u64, written: u64) -> bool {
    (entry ^ written) & !(A | D) != 0
}

/// Whether a protection lacks rights that another has.
const fn lacks(new: Prot, old: Prot) -> bool {
    old.bits() & !new.bits() != 0
}

impl Tables {
    fn new(span: Span) -> Self {
        Self {
            span,
            units: Vec::new(),
            slots: SlotMap::new(span.slots()),
            torn: Vec::new(),
            unpunched: Vec::new(),
            old: Vec::new(),
            #[cfg(feature = "ablation")]
            ablation: None,
        }
    }

    /// Leaves an element of the protocol out from now on.
    #[cfg(feature = "ablation")]
    pub fn ablate(&mut self, ablation: Option<Ablation>) {
        self.ablation = ablation;
    }

    /// Builds the tables of a new region, every page with `prot`. The range
    /// of the tables file must be a hole.
    ///
    /// # Errors
    /// [`EditError`]; the range is a hole again.
    pub fn build(file: &SharedFile, span: Span, prot: Prot) -> Result<Self, EditError> {
        let mut tables = Self::new(span);
        let built = tables.build_all(file, prot);
        if let Err(e) = built {
            file.punch(span.table_off, span.table_len)
                .map_err(EditError::Punch)?;
            return Err(e);
        }
        Ok(tables)
    }

    fn build_all(&mut self, file: &SharedFile, prot: Prot) -> Result<(), EditError> {
        let span = self.span;
        file.populate(span.table_off, pmd_pages(span.len) * PAGE_SIZE)
            .map_err(EditError::NoMemory)?;
        let count = pte_pages(span.len);
        if span.huge && prot != Prot::None {
            for unit in 0..count {
                self.units.push(Unit::Leaf(prot));
                file.store(self.pmd_word(unit), self.huge_leaf(unit, prot));
            }
            return Ok(());
        }
        let mut unit = 0;
        while unit < count {
            // One PMD page's worth at a time: 2 MiB of PTE pages.
            let end = (unit + ENTRIES).min(count);
            file.populate(span.slot_off(unit), (end - unit) * PAGE_SIZE)
                .map_err(EditError::NoMemory)?;
            for u in unit..end {
                let slot = self.slots.take().unwrap_or_default();
                self.units.push(Unit::Table(slot));
                let entries = (0..ENTRIES).map(|i| leaf(span.page_gpa(u * ENTRIES + i), prot));
                file.fill(self.first_word(slot), entries);
            }
            for u in unit..end {
                file.store(self.pmd_word(u), self.pmd_entry(u));
            }
            unit = end;
        }
        Ok(())
    }

    /// The region's ranges.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Bytes of memory that the tables occupy.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (pmd_pages(self.span.len) + self.slots.used()) * PAGE_SIZE
    }

    /// What processes may do with a page (numbered from the region's start);
    /// `None` beyond the end.
    #[must_use]
    pub fn prot(&self, file: &SharedFile, page: u64) -> Option<Prot> {
        (page < self.span.len / PAGE_SIZE).then(|| match self.unit(page / ENTRIES) {
            Unit::Leaf(prot) => prot,
            Unit::Table(slot) => prot_of(file.load(self.word(slot, page))),
        })
    }

    /// Sets the protection of `pages` pages from `first` on. When it returns,
    /// no CPU of any guest that walks these tables has a right that was taken
    /// away. The range must lie inside the region.
    ///
    /// # Errors
    /// [`EditError`]; units of 2 MiB are done or not done as a whole, and a
    /// right that was taken from the tables is gone from all CPUs unless the
    /// error is [`EditError::Punch`]: then the next call takes it first. If there was no memory to write a PMD page
    /// again, accesses to its GiB wait, and the next call tries again first.
    pub fn protect(
        &mut self,
        file: &SharedFile,
        first: u64,
        pages: u64,
        prot: Prot,
    ) -> Result<Edit, EditError> {
        self.finish(file)?;
        let end = (first + pages).min(self.span.len / PAGE_SIZE);
        let mut edit = Edit::default();
        let mut batch = Batch::new(first..end, prot);
        let mut page = first;
        while page < end {
            let unit = page / ENTRIES;
            let stop = ((unit + 1) * ENTRIES).min(end);
            match self.plan(file, unit, page..stop, prot) {
                Some(change) => {
                    batch.push(unit, change);
                    if batch.is_full(self.slots.spare()) {
                        self.replace(file, &mut batch, &mut edit)?;
                    }
                }
                None => edit.stored += self.store_in_place(file, unit, page..stop, prot),
            }
            page = stop;
        }
        self.replace(file, &mut batch, &mut edit)?;
        Ok(edit)
    }

    /// What has to be done to a unit so that `pages` of it get `prot`; `None`
    /// if stores in place will do.
    fn plan(&self, file: &SharedFile, unit: u64, pages: Range<u64>, prot: Prot) -> Option<Change> {
        let whole = pages.end - pages.start == ENTRIES;
        let huge = self.span.huge && whole && prot != Prot::None;
        match self.unit(unit) {
            Unit::Table(slot) => {
                let revokes = self.revokes(file, slot, pages, prot);
                (revokes || huge).then_some(Change { huge, revokes })
            }
            Unit::Leaf(now) => {
                let entry = file.load(self.pmd_word(unit));
                let revokes = lacks(prot, now) || foreign(entry, self.huge_leaf(unit, now));
                let same = prot == now || huge;
                (revokes || !same).then_some(Change {
                    huge: huge || prot == now,
                    revokes,
                })
            }
        }
    }

    fn revokes(&self, file: &SharedFile, slot: u32, pages: Range<u64>, prot: Prot) -> bool {
        #[cfg(feature = "ablation")]
        if self.ablation == Some(Ablation::EditInPlace) {
            return false;
        }
        pages.into_iter().any(|page| {
            let entry = file.load(self.word(slot, page));
            let now = prot_of(entry);
            lacks(prot, now) || foreign(entry, leaf(self.span.page_gpa(page), now))
        })
    }

    fn store_in_place(
        &mut self,
        file: &SharedFile,
        unit: u64,
        pages: Range<u64>,
        prot: Prot,
    ) -> u64 {
        let mut stored = 0;
        let mut store = |word, entry| {
            if file.load(word) != entry {
                file.store(word, entry);
                stored += 1;
            }
        };
        match self.unit(unit) {
            Unit::Leaf(_) => {
                store(self.pmd_word(unit), self.huge_leaf(unit, prot));
                self.set_unit(unit, Unit::Leaf(prot));
            }
            Unit::Table(slot) => {
                for page in pages {
                    store(self.word(slot, page), self.leaf(page, prot));
                }
            }
        }
        stored
    }

    /// Takes the tables away: clears the PMD entries, then frees all pages.
    /// The region must not be attached.
    ///
    /// # Errors
    /// [`EditError::Punch`].
    pub fn destroy(file: &SharedFile, span: &Span) -> Result<(), EditError> {
        let first = span.table_off / WORD;
        for unit in 0..pte_pages(span.len) {
            // Reading a hole would allocate a page to clear.
            if file.load(first + unit) != 0 {
                file.store(first + unit, 0);
            }
        }
        file.punch(span.table_off, span.table_len)
            .map_err(EditError::Punch)
    }

    fn leaf(&self, page: u64, prot: Prot) -> u64 {
        self.with_dirty(leaf(self.span.page_gpa(page), prot))
    }

    fn huge_leaf(&self, unit: u64, prot: Prot) -> u64 {
        self.with_dirty(huge_leaf(self.span.page_gpa(unit * ENTRIES), prot))
    }

    #[cfg_attr(not(feature = "ablation"), allow(clippy::unused_self))]
    fn with_dirty(&self, entry: u64) -> u64 {
        #[cfg(feature = "ablation")]
        if self.ablation == Some(Ablation::KeepDirty) && entry != 0 {
            return entry | D;
        }
        entry
    }

    fn unit(&self, unit: u64) -> Unit {
        usize::try_from(unit)
            .ok()
            .and_then(|u| self.units.get(u))
            .copied()
            .unwrap_or(Unit::Table(0))
    }

    fn set_unit(&mut self, unit: u64, to: Unit) {
        let place = usize::try_from(unit)
            .ok()
            .and_then(|u| self.units.get_mut(u));
        debug_assert!(place.is_some(), "unit {unit} is beyond the region");
        if let Some(place) = place {
            *place = to;
        }
    }

    /// The PMD entry that a unit has to have.
    fn pmd_entry(&self, unit: u64) -> u64 {
        match self.unit(unit) {
            Unit::Table(slot) => table(self.span.slot_gpa(slot.into())),
            Unit::Leaf(prot) => self.huge_leaf(unit, prot),
        }
    }

    fn pmd_word(&self, unit: u64) -> u64 {
        self.span.table_off / WORD + unit
    }

    fn shadow_word(&self, unit: u64) -> u64 {
        self.span.shadow_off(0) / WORD + unit
    }

    fn first_word(&self, slot: u32) -> u64 {
        self.span.slot_off(slot.into()) / WORD
    }

    fn word(&self, slot: u32, page: u64) -> u64 {
        self.first_word(slot) + page % PAGE_WORDS
    }
}

/// Checks that a byte range of a region is one that can be edited, and turns
/// it into pages.
#[must_use]
pub fn page_range(len: u64, offset: u64, bytes: u64) -> Option<(u64, u64)> {
    let end = offset.checked_add(bytes)?;
    let aligned = offset.is_multiple_of(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE);
    (bytes > 0 && aligned && end <= len).then_some((offset / PAGE_SIZE, bytes / PAGE_SIZE))
}

const _: () = assert!(PMD_SIZE == ENTRIES * PAGE_SIZE && PAGE_WORDS == ENTRIES);

#[cfg(test)]
mod tests;
