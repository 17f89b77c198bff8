//! The table editor: the one writer of table entries.
//!
//! Invariants, for every region:
//! 1. Each of the `k` PMD entries points at its own PTE page (a *slot* of the
//!    region's range), from the end of [`Tables::build`] to the start of
//!    [`Tables::destroy`]. There is no entry without a table.
//! 2. The content of a PTE is a function of its page and its protection
//!    alone ([`leaf`]). A copy of a PTE page is made anew from what the old
//!    entries permit, never from their bits: a word that a guest has damaged
//!    is not carried on.
//! 3. A page of entries is complete before a PMD entry points at it (release).
//! 4. An edit that adds rights is a store in place: a CPU that still holds
//!    the old entry faults once and walks again.
//! 5. An edit that takes a right away is copy, publish, punch: the PTE page is
//!    copied with the edit into a spare slot, the PMD entry is switched to it,
//!    and the old slot is punched out of the file. The punch makes every vCPU
//!    flush that could hold a translation made from the old page.
//! 6. A slot is spare if no PMD entry refers to it; a spare slot is a hole in
//!    the file. So the state of the slots can be read off the tables, which is
//!    how [`Tables::recover`] finds it after the broker was killed.

use mshare_protocol::entry::{
    A, D, ENTRIES, P, PAGE_SIZE, PMD_SIZE, Prot, RW, decode_table, leaf, table,
};

use crate::layout::{Span, pmd_pages, pte_pages};
use crate::memory::{MemoryError, SharedFile, WORD};

/// Words in a page.
const PAGE_WORDS: u64 = PAGE_SIZE / WORD;
/// Most PTE pages copied before the old ones are punched: 4 GiB of address
/// range, 8 MiB of tables.
const MAX_BATCH: usize = 2048;

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
    /// The old PTE page is not punched: CPUs go on with what they have cached.
    SkipPunch,
    /// The PMD entry is switched before the copy is complete.
    PublishBeforeCopy,
    /// The dirty bit stays on read-only entries: a shadow-stack page to CET.
    KeepDirty,
    /// Rights are taken away by a store in place.
    EditInPlace,
}

/// What an edit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Entries stored in place.
    pub stored: u64,
    /// PTE pages replaced.
    pub copied: u64,
}

impl Edit {
    /// Whether some right was taken away from somebody.
    #[must_use]
    pub const fn revoked(&self) -> bool {
        self.copied > 0
    }
}

/// What recovery found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// PMD entries that were no entries of this region; their 2 MiB are
    /// without access now.
    pub damaged: u64,
}

/// The tables of one region.
#[derive(Debug)]
pub struct Tables {
    span: Span,
    /// Slot of each PTE page. Authoritative while the broker runs: what guests
    /// write into the tables does not steer it.
    slot_of: Vec<u32>,
    slots: SlotMap,
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

/// Whether replacing `old` by the entry for `prot` takes something away: a
/// right, or an address that does not belong there.
fn takes_away(old: u64, gpa: u64, prot: Prot) -> bool {
    let now = prot_of(old);
    let foreign = (old ^ leaf(gpa, now)) & !(A | D) != 0;
    foreign || now.bits() & !prot.bits() != 0
}

impl Tables {
    fn new(span: Span) -> Self {
        Self {
            span,
            slot_of: Vec::new(),
            slots: SlotMap::new(span.slots()),
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
        let mut unit = 0;
        while unit < count {
            // One PMD page's worth at a time: 2 MiB of PTE pages.
            let end = (unit + ENTRIES).min(count);
            file.populate(span.slot_off(unit), (end - unit) * PAGE_SIZE)
                .map_err(EditError::NoMemory)?;
            for u in unit..end {
                let slot = self.slots.take().unwrap_or_default();
                self.slot_of.push(slot);
                let entries = (0..ENTRIES).map(|i| leaf(span.page_gpa(u * ENTRIES + i), prot));
                file.fill(self.first_word(slot), entries);
            }
            for u in unit..end {
                self.publish(file, u, self.slot(u));
            }
            unit = end;
        }
        Ok(())
    }

    /// Reads the state of the slots off the tables, frees the slots that
    /// nothing refers to, and gives damaged units fresh tables without access.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn recover(file: &SharedFile, span: Span) -> Result<(Self, Found), EditError> {
        let mut tables = Self::new(span);
        let mut damaged = Vec::new();
        for unit in 0..pte_pages(span.len) {
            let slot = decode_table(file.load(tables.pmd_word(unit)))
                .ok()
                .flatten()
                .and_then(|gpa| span.slot_at(gpa))
                .and_then(|slot| u32::try_from(slot).ok())
                .filter(|&slot| tables.slots.take_at(slot));
            if slot.is_none() {
                damaged.push(unit);
            }
            tables.slot_of.push(slot.unwrap_or_default());
        }
        for (first, end) in tables.slots.free_runs() {
            file.punch(span.slot_off(first), (end - first) * PAGE_SIZE)
                .map_err(EditError::Punch)?;
        }
        for &unit in &damaged {
            let slot = tables.slots.take().unwrap_or_default();
            tables.set_slot(unit, slot);
            // A hole reads as zero: no entry permits anything.
            file.populate(span.slot_off(slot.into()), PAGE_SIZE)
                .map_err(EditError::NoMemory)?;
            tables.publish(file, unit, slot);
        }
        let found = Found {
            damaged: damaged.len() as u64,
        };
        Ok((tables, found))
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
        (page < self.span.len / PAGE_SIZE).then(|| prot_of(self.entry(file, page)))
    }

    /// Sets the protection of `pages` pages from `first` on. When it returns,
    /// no CPU of any guest that walks these tables has a right that was taken
    /// away. The range must lie inside the region.
    ///
    /// # Errors
    /// [`EditError`]; units of 2 MiB are done or not done as a whole, and a
    /// right that was taken from the tables is gone from all CPUs unless the
    /// error is [`EditError::Punch`].
    pub fn protect(
        &mut self,
        file: &SharedFile,
        first: u64,
        pages: u64,
        prot: Prot,
    ) -> Result<Edit, EditError> {
        let end = (first + pages).min(self.span.len / PAGE_SIZE);
        let mut edit = Edit::default();
        let mut batch = Batch {
            first,
            end,
            prot,
            units: Vec::new(),
        };
        let mut page = first;
        while page < end {
            let unit = page / ENTRIES;
            let stop = ((unit + 1) * ENTRIES).min(end);
            if self.must_copy(file, page..stop, prot) {
                batch.units.push(unit);
                let spare = usize::try_from(self.slots.spare()).unwrap_or(usize::MAX);
                if batch.units.len() >= spare.min(MAX_BATCH) {
                    edit.copied += self.replace(file, &mut batch)?;
                }
            } else {
                edit.stored += self.store_in_place(file, page..stop, prot);
            }
            page = stop;
        }
        edit.copied += self.replace(file, &mut batch)?;
        Ok(edit)
    }

    fn must_copy(&self, file: &SharedFile, pages: std::ops::Range<u64>, prot: Prot) -> bool {
        #[cfg(feature = "ablation")]
        if self.ablation == Some(Ablation::EditInPlace) {
            return false;
        }
        pages
            .into_iter()
            .any(|page| takes_away(self.entry(file, page), self.span.page_gpa(page), prot))
    }

    fn store_in_place(&self, file: &SharedFile, pages: std::ops::Range<u64>, prot: Prot) -> u64 {
        let mut stored = 0;
        for page in pages {
            let entry = self.leaf(page, prot);
            if self.entry(file, page) != entry {
                file.store(self.word(page), entry);
                stored += 1;
            }
        }
        stored
    }

    /// Copy, publish, punch for the units of `batch`, which has at most as
    /// many as there are spare slots. Returns their number and empties it.
    fn replace(&mut self, file: &SharedFile, batch: &mut Batch) -> Result<u64, EditError> {
        if batch.units.is_empty() {
            return Ok(0);
        }
        let new: Vec<u32> = batch
            .units
            .iter()
            .map_while(|_| self.slots.take())
            .collect();
        debug_assert_eq!(new.len(), batch.units.len());
        for (first, end) in runs(&new) {
            let (at, len) = (self.span.slot_off(first), (end - first) * PAGE_SIZE);
            if let Err(e) = file.populate(at, len) {
                self.release(file, &new)?;
                return Err(EditError::NoMemory(e));
            }
        }
        let mut old = Vec::with_capacity(new.len());
        for (&unit, &slot) in batch.units.iter().zip(&new) {
            #[cfg(feature = "ablation")]
            if self.ablation == Some(Ablation::PublishBeforeCopy) {
                self.publish(file, unit, slot);
            }
            let copy = (unit * ENTRIES..(unit + 1) * ENTRIES).map(|page| {
                let edited = (batch.first..batch.end).contains(&page);
                let prot = if edited {
                    batch.prot
                } else {
                    prot_of(self.entry(file, page))
                };
                self.leaf(page, prot)
            });
            file.fill(self.first_word(slot), copy);
            self.publish(file, unit, slot);
            old.push(self.set_slot(unit, slot));
        }
        batch.units.clear();
        self.release(file, &old)?;
        Ok(new.len() as u64)
    }

    /// Punches slots that no PMD entry refers to any more; then they are spare.
    fn release(&mut self, file: &SharedFile, slots: &[u32]) -> Result<(), EditError> {
        #[cfg(feature = "ablation")]
        let skip = self.ablation == Some(Ablation::SkipPunch);
        #[cfg(not(feature = "ablation"))]
        let skip = false;
        for (first, end) in runs(slots) {
            if !skip {
                // One call for a run: one flush of the vCPUs for all of it.
                file.punch(self.span.slot_off(first), (end - first) * PAGE_SIZE)
                    .map_err(EditError::Punch)?;
            }
            for slot in first..end {
                self.slots.give(slot);
            }
        }
        Ok(())
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
        let entry = leaf(self.span.page_gpa(page), prot);
        #[cfg(feature = "ablation")]
        if self.ablation == Some(Ablation::KeepDirty) && entry != 0 {
            return entry | D;
        }
        entry
    }

    fn slot(&self, unit: u64) -> u32 {
        usize::try_from(unit)
            .ok()
            .and_then(|u| self.slot_of.get(u))
            .copied()
            .unwrap_or_default()
    }

    fn set_slot(&mut self, unit: u64, slot: u32) -> u32 {
        usize::try_from(unit)
            .ok()
            .and_then(|u| self.slot_of.get_mut(u))
            .map_or(slot, |s| std::mem::replace(s, slot))
    }

    fn publish(&self, file: &SharedFile, unit: u64, slot: u32) {
        file.store(self.pmd_word(unit), table(self.span.slot_gpa(slot.into())));
    }

    fn pmd_word(&self, unit: u64) -> u64 {
        self.span.table_off / WORD + unit
    }

    fn first_word(&self, slot: u32) -> u64 {
        self.span.slot_off(slot.into()) / WORD
    }

    fn word(&self, page: u64) -> u64 {
        self.first_word(self.slot(page / ENTRIES)) + page % PAGE_WORDS
    }

    fn entry(&self, file: &SharedFile, page: u64) -> u64 {
        file.load(self.word(page))
    }
}

/// Units to be replaced for one protection of the pages `first..end`.
#[derive(Debug)]
struct Batch {
    first: u64,
    end: u64,
    prot: Prot,
    units: Vec<u64>,
}

/// The runs of consecutive numbers in `slots`, as `first..end`.
fn runs(slots: &[u32]) -> Vec<(u64, u64)> {
    let mut sorted: Vec<u64> = slots.iter().map(|&s| s.into()).collect();
    sorted.sort_unstable();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for slot in sorted {
        match runs.last_mut() {
            Some((_, end)) if *end == slot => *end += 1,
            _ => runs.push((slot, slot + 1)),
        }
    }
    runs
}

/// Which slots are in use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SlotMap {
    /// A set bit is a slot in use, or one that does not exist.
    words: Vec<u64>,
    len: u64,
    used: u64,
    /// No word before this one has a clear bit.
    hint: usize,
}

impl SlotMap {
    fn new(len: u64) -> Self {
        let mut words = vec![0; usize::try_from(len.div_ceil(64)).unwrap_or(0)];
        if let (Some(last), tail @ 1..) = (words.last_mut(), len % 64) {
            *last = !0 << tail;
        }
        Self {
            words,
            len,
            used: 0,
            hint: 0,
        }
    }

    const fn used(&self) -> u64 {
        self.used
    }

    const fn spare(&self) -> u64 {
        self.len - self.used
    }

    /// Takes the lowest spare slot.
    fn take(&mut self) -> Option<u32> {
        while let Some(word) = self.words.get_mut(self.hint) {
            if *word != !0 {
                let bit = word.trailing_ones();
                *word |= 1 << bit;
                self.used += 1;
                return u32::try_from(self.hint * 64).ok().map(|base| base + bit);
            }
            self.hint += 1;
        }
        None
    }

    /// Takes a slot; false if it is in use.
    fn take_at(&mut self, slot: u32) -> bool {
        let bit = 1 << (slot % 64);
        match self.words.get_mut(slot as usize / 64) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                self.used += 1;
                true
            }
            _ => false,
        }
    }

    fn give(&mut self, slot: u64) {
        let Ok(index) = usize::try_from(slot / 64) else {
            return;
        };
        if let Some(word) = self.words.get_mut(index) {
            debug_assert!(*word & (1 << (slot % 64)) != 0, "slot {slot} was spare");
            *word &= !(1 << (slot % 64));
            self.used -= 1;
            self.hint = self.hint.min(index);
        }
    }

    fn is_spare(&self, slot: u64) -> bool {
        usize::try_from(slot / 64)
            .ok()
            .and_then(|i| self.words.get(i))
            .is_some_and(|word| word & (1 << (slot % 64)) == 0)
    }

    fn free_runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for slot in (0..self.len).filter(|&s| self.is_spare(s)) {
            match runs.last_mut() {
                Some((_, end)) if *end == slot => *end += 1,
                _ => runs.push((slot, slot + 1)),
            }
        }
        runs
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
#[path = "editor_tests.rs"]
mod tests;
