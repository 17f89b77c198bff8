//! First-fit allocation of ranges of a file.

use std::collections::BTreeMap;

/// Free ranges of `0..len`, in units of a fixed granule.
///
/// Invariant: the ranges do not touch (neighbours are merged when freed), lie
/// inside `0..len`, and start and end at multiples of the granule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeAllocator {
    len: u64,
    granule: u64,
    /// Start of each free range and its length.
    free: BTreeMap<u64, u64>,
}

impl RangeAllocator {
    /// All of `0..len` free; what is beyond the last whole granule is never
    /// given out.
    #[must_use]
    pub fn new(len: u64, granule: u64) -> Self {
        let whole = len - len % granule;
        let mut free = BTreeMap::new();
        if whole > 0 {
            free.insert(0, whole);
        }
        Self {
            len: whole,
            granule,
            free,
        }
    }

    /// Takes the first free range of `len` bytes, rounded up to granules.
    pub fn take(&mut self, len: u64) -> Option<u64> {
        let len = len.max(1).checked_next_multiple_of(self.granule)?;
        let (&start, &have) = self.free.iter().find(|&(_, &have)| have >= len)?;
        self.free.remove(&start);
        if have > len {
            self.free.insert(start + len, have - len);
        }
        Some(start)
    }

    /// Takes exactly `start..start + len`; false if part of it is taken
    /// already, unaligned or outside.
    pub fn take_at(&mut self, start: u64, len: u64) -> bool {
        let Some(end) = start.checked_add(len) else {
            return false;
        };
        if len == 0 || !start.is_multiple_of(self.granule) || !len.is_multiple_of(self.granule) {
            return false;
        }
        let Some((&at, &have)) = self.free.range(..=start).next_back() else {
            return false;
        };
        if at + have < end {
            return false;
        }
        self.free.remove(&at);
        if at < start {
            self.free.insert(at, start - at);
        }
        if at + have > end {
            self.free.insert(end, at + have - end);
        }
        true
    }

    /// Gives back a range that was taken.
    pub fn give(&mut self, start: u64, len: u64) {
        let len = len.next_multiple_of(self.granule);
        let (mut start, mut end) = (start, start + len);
        debug_assert!(end <= self.len);
        if let Some((&at, &have)) = self.free.range(..start).next_back() {
            debug_assert!(at + have <= start, "{start:#x} was free already");
            if at + have == start {
                self.free.remove(&at);
                start = at;
            }
        }
        debug_assert!(self.free.range(start..end).all(|(&at, _)| at == start));
        if let Some(have) = self.free.remove(&end) {
            end += have;
        }
        self.free.insert(start, end - start);
    }

    /// Bytes free.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free.values().sum()
    }

    /// Bytes of the longest free range.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.free.values().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn first_fit_and_coalescing() {
        let mut a = RangeAllocator::new(10, 2);
        assert_eq!(a.take(3), Some(0));
        assert_eq!(a.take(2), Some(4));
        assert_eq!(a.take(6), None);
        assert_eq!(a.take(4), Some(6));
        a.give(0, 3);
        a.give(6, 4);
        assert_eq!((a.free(), a.longest()), (8, 4));
        a.give(4, 2);
        assert_eq!((a.free(), a.longest()), (10, 10));
        assert_eq!(a, RangeAllocator::new(10, 2));
        assert_eq!(a.take(u64::MAX), None);
    }

    #[test]
    fn take_at_refuses_what_is_taken_unaligned_or_outside() {
        let mut a = RangeAllocator::new(16, 2);
        assert!(a.take_at(4, 4));
        for (start, len) in [
            (4, 4),
            (2, 4),
            (6, 4),
            (1, 1),
            (0, 0),
            (14, 4),
            (u64::MAX - 1, 4),
        ] {
            assert!(!a.take_at(start, len), "{start} {len}");
        }
        assert!(a.take_at(8, 8) && a.take_at(0, 4));
        assert_eq!(a.free(), 0);
    }

    proptest! {
        /// Against a bitmap.
        #[test]
        fn agrees_with_a_bitmap(ops in prop::collection::vec((any::<bool>(), 1u64..9), 1..80)) {
            let mut a = RangeAllocator::new(64, 1);
            let mut map = [false; 64];
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (take, n) in ops {
                if take {
                    let fit = (0..=64 - n).find(|&s| {
                        (s..s + n).all(|i| !map[usize::try_from(i).unwrap()])
                    });
                    prop_assert_eq!(a.take(n), fit);
                    if let Some(s) = fit {
                        map[usize::try_from(s).unwrap()..][..usize::try_from(n).unwrap()].fill(true);
                        held.push((s, n));
                    }
                } else if !held.is_empty() {
                    let index = usize::try_from(n).unwrap() % held.len();
                    let (s, n) = held.swap_remove(index);
                    map[usize::try_from(s).unwrap()..][..usize::try_from(n).unwrap()].fill(false);
                    a.give(s, n);
                }
                let free = map.iter().filter(|&&t| !t).count() as u64;
                prop_assert_eq!(a.free(), free);
            }
        }
    }
}
