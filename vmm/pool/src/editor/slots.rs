//! Which pages of a region's range hold PTE pages.

/// The runs of consecutive numbers in `slots`, as `first..end`.
pub(super) fn runs(slots: &[u32]) -> Vec<(u64, u64)> {
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
pub(super) struct SlotMap {
    /// A set bit is a slot in use, or one that does not exist.
    pub(super) words: Vec<u64>,
    len: u64,
    used: u64,
    /// No word before this one has a clear bit.
    hint: usize,
}

impl SlotMap {
    pub(super) fn new(len: u64) -> Self {
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

    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    pub(super) const fn spare(&self) -> u64 {
        self.len - self.used
    }

    /// Takes the lowest spare slot.
    pub(super) fn take(&mut self) -> Option<u32> {
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
    pub(super) fn take_at(&mut self, slot: u32) -> bool {
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

    pub(super) fn give(&mut self, slot: u64) {
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

    pub(super) fn is_spare(&self, slot: u64) -> bool {
        usize::try_from(slot / 64)
            .ok()
            .and_then(|i| self.words.get(i))
            .is_some_and(|word| word & (1 << (slot % 64)) == 0)
    }

    pub(super) fn free_runs(&self) -> Vec<(u64, u64)> {
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
