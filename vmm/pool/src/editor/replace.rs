//! Edits that take rights away or change how a unit is mapped: copy, publish,
//! punch for PTE pages; shadow, punch, rewrite for PMD pages.

use std::collections::BTreeSet;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use mshare_protocol::entry::{ENTRIES, PAGE_SIZE, Prot};

#[cfg(feature = "ablation")]
use super::Ablation;
use super::slots::runs;
use super::{Edit, EditError, Tables, Unit, prot_of};
use crate::layout::pte_pages;
use crate::memory::SharedFile;

/// Most units edited before the old pages are punched: 4 GiB of address range,
/// up to 8 MiB of tables.
const MAX_BATCH: usize = 2048;
/// How often, and how far apart, memory for a punched PMD page is asked for
/// again: meanwhile accesses to its GiB wait.
const REFILLS: u32 = 50;
const REFILL_PAUSE: Duration = Duration::from_millis(10);

/// How a unit is to be changed.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// To a leaf, else to a new PTE page.
    pub huge: bool,
    /// Whether somebody loses a right.
    pub revokes: bool,
}

/// Units to be changed for one protection of a range of pages.
#[derive(Debug)]
pub struct Batch {
    pages: Range<u64>,
    prot: Prot,
    units: Vec<(u64, Change)>,
    /// How many of them need a slot.
    tables: u64,
}

impl Batch {
    /// Nothing to do yet.
    pub fn new(pages: Range<u64>, prot: Prot) -> Self {
        Self {
            pages,
            prot,
            units: Vec::new(),
            tables: 0,
        }
    }

    /// Adds a unit.
    pub fn push(&mut self, unit: u64, change: Change) {
        self.units.push((unit, change));
        self.tables += u64::from(!change.huge);
    }

    /// Whether it is to be carried out before anything is added.
    pub fn is_full(&self, spare: u64) -> bool {
        self.units.len() >= MAX_BATCH || self.tables >= spare
    }
}

impl Tables {
    /// Carries out `batch`, which needs at most as many slots as are spare, and
    /// empties it.
    pub(super) fn replace(
        &mut self,
        file: &SharedFile,
        batch: &mut Batch,
        edit: &mut Edit,
    ) -> Result<(), EditError> {
        let units = std::mem::take(&mut batch.units);
        let tables = std::mem::take(&mut batch.tables);
        if units.is_empty() {
            return Ok(());
        }
        // Leaves are changed by writing their PMD pages again, which does for
        // whatever else changes in these pages.
        let gibs: BTreeSet<u64> = units
            .iter()
            .filter(|(unit, _)| matches!(self.unit(*unit), Unit::Leaf(_)))
            .map(|(unit, _)| unit / ENTRIES)
            .collect();
        let mut new = self.prepare(file, tables, &gibs)?.into_iter();

        for &(unit, change) in &units {
            let before = self.unit(unit);
            let slot = if change.huge { None } else { new.next() };
            if let Some(slot) = slot {
                #[cfg(feature = "ablation")]
                if self.ablation == Some(Ablation::PublishBeforeCopy) {
                    self.set_unit(unit, Unit::Table(slot));
                    file.store(self.pmd_word(unit), self.pmd_entry(unit));
                }
                self.fill_copy(file, batch, unit, (before, slot));
            }
            self.set_unit(unit, slot.map_or(Unit::Leaf(batch.prot), Unit::Table));
            if !gibs.contains(&(unit / ENTRIES)) {
                file.store(self.pmd_word(unit), self.pmd_entry(unit));
            }
            match before {
                Unit::Table(slot) => {
                    edit.replaced += 1;
                    self.old.push(slot);
                }
                Unit::Leaf(_) => edit.rewritten += 1,
            }
            edit.revoked |= change.revokes;
        }
        self.rewrite(file, &gibs)?;
        self.release_old(file)
    }

    /// Whether leaves are changed without a punch. Then nothing else is punched
    /// either: the flush of a shadow in the broker's own address space is an
    /// interrupt for a vCPU of the same process, which could make it forget too.
    #[cfg(feature = "ablation")]
    fn in_place(&self) -> bool {
        matches!(
            self.ablation,
            Some(Ablation::SkipPunch | Ablation::EditInPlace)
        )
    }

    /// Takes and fills with memory whatever an edit writes before it begins.
    fn prepare(
        &mut self,
        file: &SharedFile,
        tables: u64,
        gibs: &BTreeSet<u64>,
    ) -> Result<Vec<u32>, EditError> {
        #[cfg(feature = "ablation")]
        let (none, in_place) = (BTreeSet::new(), self.in_place());
        #[cfg(feature = "ablation")]
        let gibs = if in_place { &none } else { gibs };
        let slots: Vec<u32> = (0..tables).map_while(|_| self.slots.take()).collect();
        debug_assert_eq!(slots.len() as u64, tables);
        let span = self.span;
        let places = runs(&slots)
            .into_iter()
            .map(|(first, end)| (span.slot_off(first), end - first))
            .chain(gibs.iter().map(|&gib| (span.shadow_off(gib), 1)));
        for (at, pages) in places {
            if let Err(e) = file.populate(at, pages * PAGE_SIZE) {
                self.release(file, &slots)?;
                for &gib in gibs {
                    self.drop_shadow(file, gib)?;
                }
                return Err(EditError::NoMemory(e));
            }
        }
        Ok(slots)
    }

    /// Writes the PTE page of `unit` in the slot anew from what is permitted
    /// now, with the batch's edit.
    fn fill_copy(&self, file: &SharedFile, batch: &Batch, unit: u64, (before, slot): (Unit, u32)) {
        let copy = (unit * ENTRIES..(unit + 1) * ENTRIES).map(|page| {
            let prot = match before {
                _ if batch.pages.contains(&page) => batch.prot,
                Unit::Leaf(prot) => prot,
                Unit::Table(slot) => prot_of(file.load(self.word(slot, page))),
            };
            self.leaf(page, prot)
        });
        file.fill(self.first_word(slot), copy);
    }

    /// Brings the PMD pages of these GiB to the state of their units: shadow,
    /// punch, rewrite. Their shadows have memory.
    fn rewrite(&mut self, file: &SharedFile, gibs: &BTreeSet<u64>) -> Result<(), EditError> {
        #[cfg(feature = "ablation")]
        if self.in_place() {
            gibs.iter().for_each(|&gib| self.refill(file, gib));
            return Ok(());
        }
        #[cfg(feature = "ablation")]
        let skip = self.ablation == Some(Ablation::SkipShadow);
        #[cfg(not(feature = "ablation"))]
        let skip = false;
        for &gib in gibs.iter().filter(|_| !skip) {
            let units = self.units_of(gib);
            let entries = units.clone().map(|unit| self.pmd_entry(unit));
            file.fill(self.shadow_word(units.start), entries);
        }
        self.unpunched
            .extend(gibs.iter().filter_map(|&g| u32::try_from(g).ok()));
        self.punch_pmd_pages(file)
    }

    /// Completes what an edit that failed has left: until then rights that the
    /// units no longer have may be in use.
    pub(super) fn finish(&mut self, file: &SharedFile) -> Result<(), EditError> {
        self.mend(file)?;
        self.punch_pmd_pages(file)?;
        self.release_old(file)
    }

    /// Punches PMD pages whose new content is in their shadows, and writes them
    /// again.
    fn punch_pmd_pages(&mut self, file: &SharedFile) -> Result<(), EditError> {
        for (first, end) in runs(&self.unpunched) {
            file.punch(
                self.span.table_off + first * PAGE_SIZE,
                (end - first) * PAGE_SIZE,
            )
            .map_err(EditError::Punch)?;
            self.unpunched.retain(|&gib| u64::from(gib) >= end);
            self.torn.extend(first..end);
            self.mend(file)?;
        }
        Ok(())
    }

    /// Writes PMD pages again that were punched.
    fn mend(&mut self, file: &SharedFile) -> Result<(), EditError> {
        while let Some(&gib) = self.torn.last() {
            let at = self.span.table_off + gib * PAGE_SIZE;
            let mut tries = 1;
            while let Err(e) = file.populate(at, PAGE_SIZE) {
                if tries == REFILLS {
                    return Err(EditError::NoMemory(e));
                }
                tries += 1;
                thread::sleep(REFILL_PAUSE);
            }
            self.refill(file, gib);
            self.drop_shadow(file, gib)?;
            self.torn.pop();
        }
        Ok(())
    }

    /// Stores the entries of a PMD page that are not there.
    fn refill(&self, file: &SharedFile, gib: u64) {
        for unit in self.units_of(gib) {
            let entry = self.pmd_entry(unit);
            if file.load(self.pmd_word(unit)) != entry {
                file.store(self.pmd_word(unit), entry);
            }
        }
    }

    fn units_of(&self, gib: u64) -> Range<u64> {
        gib * ENTRIES..((gib + 1) * ENTRIES).min(pte_pages(self.span.len))
    }

    fn drop_shadow(&self, file: &SharedFile, gib: u64) -> Result<(), EditError> {
        file.punch(self.span.shadow_off(gib), PAGE_SIZE)
            .map_err(EditError::Punch)
    }

    /// Punches the slots that an edit has replaced.
    fn release_old(&mut self, file: &SharedFile) -> Result<(), EditError> {
        let old = std::mem::take(&mut self.old);
        self.release(file, &old)
    }

    /// Punches slots that no PMD entry refers to any more; then they are spare.
    /// Those that cannot be punched are left to the next edit.
    fn release(&mut self, file: &SharedFile, slots: &[u32]) -> Result<(), EditError> {
        #[cfg(feature = "ablation")]
        let skip = self.ablation == Some(Ablation::SkipPunch);
        #[cfg(not(feature = "ablation"))]
        let skip = false;
        let mut runs = runs(slots).into_iter();
        while let Some((first, end)) = runs.next() {
            // One call for a run: one flush of the vCPUs for all of it.
            if !skip
                && let Err(e) = file.punch(self.span.slot_off(first), (end - first) * PAGE_SIZE)
            {
                let left = (first..end).chain(runs.flat_map(|(first, end)| first..end));
                self.old
                    .extend(left.filter_map(|slot| u32::try_from(slot).ok()));
                return Err(EditError::Punch(e));
            }
            for slot in first..end {
                self.slots.give(slot);
            }
        }
        Ok(())
    }
}
