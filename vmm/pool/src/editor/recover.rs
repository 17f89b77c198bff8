//! Reads the state of a region off its tables after the broker was killed.

use mshare_protocol::entry::{ENTRIES, PAGE_SIZE, decode_huge_leaf, decode_table};

use super::slots::runs;
use super::{EditError, Tables, Unit};
use crate::layout::{Span, pmd_pages, pte_pages};
use crate::memory::SharedFile;

/// What recovery found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// PMD entries that were no entries of this region; their 2 MiB are
    /// without access now.
    pub damaged: u64,
}

impl Tables {
    /// Reads the state of the units off the tables, completes PMD pages that
    /// were being written again, frees the pages that nothing refers to, and
    /// gives damaged units fresh tables without access.
    ///
    /// # Errors
    /// [`EditError`].
    pub fn recover(file: &SharedFile, span: Span) -> Result<(Self, Found), EditError> {
        let mut tables = Self::new(span);
        if span.huge {
            tables.complete(file)?;
        }
        let mut damaged = Vec::new();
        for unit in 0..pte_pages(span.len) {
            let found = tables.read_unit(file, unit);
            if found.is_none() {
                damaged.push(unit);
            }
            tables.units.push(found.unwrap_or(Unit::Table(0)));
        }
        for (first, end) in tables.slots.free_runs() {
            file.punch(span.slot_off(first), (end - first) * PAGE_SIZE)
                .map_err(EditError::Punch)?;
        }
        for &unit in &damaged {
            let slot = tables.slots.take().unwrap_or_default();
            tables.set_unit(unit, Unit::Table(slot));
            // A hole reads as zero: no entry permits anything.
            file.populate(span.slot_off(slot.into()), PAGE_SIZE)
                .map_err(EditError::NoMemory)?;
            file.store(tables.pmd_word(unit), tables.pmd_entry(unit));
        }
        let found = Found {
            damaged: damaged.len() as u64,
        };
        Ok((tables, found))
    }

    /// How a unit is mapped, and takes its slot; `None` if its PMD entry is
    /// none of this region.
    fn read_unit(&mut self, file: &SharedFile, unit: u64) -> Option<Unit> {
        let entry = file.load(self.pmd_word(unit));
        if self.span.huge
            && let Ok(Some((gpa, prot))) = decode_huge_leaf(entry)
        {
            return (gpa == self.span.page_gpa(unit * ENTRIES)).then_some(Unit::Leaf(prot));
        }
        decode_table(entry)
            .ok()
            .flatten()
            .and_then(|gpa| self.span.slot_at(gpa))
            .and_then(|slot| u32::try_from(slot).ok())
            .filter(|&slot| self.slots.take_at(slot))
            .map(Unit::Table)
    }

    /// Takes what is missing in PMD pages from their shadows, and drops those.
    fn complete(&self, file: &SharedFile) -> Result<(), EditError> {
        let span = self.span;
        let kept = |gib| {
            file.resident(span.shadow_off(gib), PAGE_SIZE)
                .map(|bytes| bytes > 0)
                .unwrap_or(false)
        };
        let shadows: Vec<u32> = (0..pmd_pages(span.len))
            .filter(|&gib| kept(gib))
            .filter_map(|gib| u32::try_from(gib).ok())
            .collect();
        for &gib in &shadows {
            let gib = u64::from(gib);
            file.populate(span.table_off + gib * PAGE_SIZE, PAGE_SIZE)
                .map_err(EditError::NoMemory)?;
            for unit in gib * ENTRIES..((gib + 1) * ENTRIES).min(pte_pages(span.len)) {
                if file.load(self.pmd_word(unit)) == 0 {
                    file.store(self.pmd_word(unit), file.load(self.shadow_word(unit)));
                }
            }
        }
        for (first, end) in runs(&shadows) {
            file.punch(span.shadow_off(first), (end - first) * PAGE_SIZE)
                .map_err(EditError::Punch)?;
        }
        Ok(())
    }
}
