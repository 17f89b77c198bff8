//! A bus: an ordered map from address ranges to devices.
//!
//! There are two, one for memory-mapped and one for port I/O. A vCPU that
//! leaves the guest for an access looks the address up here and calls the
//! device with the offset from the start of its range.
//!
//! **Locking.** The bus is immutable once the guest runs, so a lookup takes no
//! lock; each device has its own mutex, held for one access. A device may
//! therefore not wait for another device, for a vCPU or for the `devices`
//! thread while it serves an access.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that answers to guest-physical addresses.
pub trait MmioDevice: Send {
    /// Fills `data` from the register at byte `offset` of the device.
    ///
    /// `data` holds 1, 2, 4 or 8 bytes and starts out all zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Stores `data` in the register at byte `offset` of the device.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that answers to I/O ports.
pub trait PioDevice: Send {
    /// Fills `data` from the port `offset` ports after the first one.
    ///
    /// `data` holds 1, 2 or 4 bytes and starts out all ones, which is what an
    /// absent device reads as.
    fn read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes `data` to the port `offset` ports after the first one.
    fn write(&mut self, offset: u16, data: &[u8]);
}

/// A range that cannot be put on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing can be placed in an empty range.
    #[error("the range at {base:#x} is empty")]
    Empty {
        /// First address of the range.
        base: u64,
    },
    /// The range runs over the end of the address space.
    #[error("the range at {base:#x} with {len:#x} bytes leaves the address space")]
    Overflow {
        /// First address of the range.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device answers to part of the range.
    #[error("the range at {base:#x} with {len:#x} bytes overlaps the one at {other:#x}")]
    Overlap {
        /// First address of the range.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range that is there already.
        other: u64,
    },
}

/// A device on a bus, shared with whoever else needs it.
pub type Shared<D> = Arc<Mutex<D>>;

struct Entry<D: ?Sized> {
    len: u64,
    device: Shared<D>,
}

/// Address ranges and the devices that answer to them.
///
/// The ranges are kept in order and do not overlap.
pub struct Bus<D: ?Sized> {
    ranges: BTreeMap<u64, Entry<D>>,
}

/// The bus of guest-physical addresses.
pub type MmioBus = Bus<dyn MmioDevice>;
/// The bus of I/O ports.
pub type PioBus = Bus<dyn PioDevice>;

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Self {
            ranges: BTreeMap::new(),
        }
    }
}

impl<D: ?Sized> fmt::Debug for Bus<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.ranges.iter().map(|(base, e)| (*base, e.len)))
            .finish()
    }
}

impl<D: ?Sized> Bus<D> {
    /// Places `device` at the `len` addresses from `base`.
    ///
    /// # Errors
    ///
    /// The range is empty, leaves the address space or overlaps another one;
    /// the bus is unchanged.
    pub fn insert(&mut self, base: u64, len: u64, device: Shared<D>) -> Result<(), Error> {
        if len == 0 {
            return Err(Error::Empty { base });
        }
        let last = base
            .checked_add(len - 1)
            .ok_or(Error::Overflow { base, len })?;
        // Ranges do not overlap, so only the last one that starts at or before
        // our end can reach into ours.
        if let Some((&other, entry)) = self.ranges.range(..=last).next_back()
            && other + (entry.len - 1) >= base
        {
            return Err(Error::Overlap { base, len, other });
        }
        self.ranges.insert(base, Entry { len, device });
        Ok(())
    }

    /// The device that answers to all `len` addresses from `addr`, and the
    /// offset of `addr` in it.
    pub fn find(&self, addr: u64, len: usize) -> Option<(&Shared<D>, u64)> {
        let (base, entry) = self.ranges.range(..=addr).next_back()?;
        let offset = addr - base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.len).then_some((&entry.device, offset))
    }
}

impl MmioBus {
    /// Serves a guest's load; returns whether a device answered. An address
    /// without a device reads as all ones, as on an x86 bus.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((device, offset)) => {
                data.fill(0);
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Serves a guest's store; returns whether a device answered.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(addr, data.len()) else {
            return false;
        };
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset, data);
        true
    }
}

impl PioBus {
    /// Serves a guest's IN; returns whether a device answered. A port without
    /// a device reads as all ones.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((device, offset)) = self.find(u64::from(port), data.len()) else {
            return false;
        };
        let Ok(offset) = u16::try_from(offset) else {
            return false;
        };
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(offset, data);
        true
    }

    /// Serves a guest's OUT; returns whether a device answered.
    pub fn write(&self, port: u16, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(u64::from(port), data.len()) else {
            return false;
        };
        let Ok(offset) = u16::try_from(offset) else {
            return false;
        };
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last access; reads as its offset.
    #[derive(Default)]
    struct Probe {
        written: Vec<(u64, Vec<u8>)>,
    }

    impl MmioDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    impl PioDevice for Probe {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }
        fn write(&mut self, offset: u16, data: &[u8]) {
            self.written.push((offset.into(), data.to_vec()));
        }
    }

    fn bus_with(ranges: &[(u64, u64)]) -> MmioBus {
        let mut bus = MmioBus::default();
        for &(base, len) in ranges {
            bus.insert(base, len, Arc::new(Mutex::new(Probe::default())))
                .unwrap();
        }
        bus
    }

    fn insert(bus: &mut MmioBus, base: u64, len: u64) -> Result<(), Error> {
        bus.insert(base, len, Arc::new(Mutex::new(Probe::default())))
    }

    #[test]
    fn insert_bad_range_is_refused_and_named() {
        let mut bus = bus_with(&[(0x1000, 0x1000)]);
        assert_eq!(insert(&mut bus, 5, 0), Err(Error::Empty { base: 5 }));
        assert_eq!(
            insert(&mut bus, u64::MAX, 2),
            Err(Error::Overflow {
                base: u64::MAX,
                len: 2
            })
        );
        for (base, len) in [(0x1fff, 1), (0xfff, 2), (0x0, 0x10000), (0x1800, 8)] {
            assert_eq!(
                insert(&mut bus, base, len),
                Err(Error::Overlap {
                    base,
                    len,
                    other: 0x1000
                })
            );
        }
    }

    #[test]
    fn insert_adjacent_ranges_is_accepted() {
        let mut bus = bus_with(&[(0x1000, 0x1000)]);
        assert_eq!(insert(&mut bus, 0x2000, 1), Ok(()));
        assert_eq!(insert(&mut bus, 0xfff, 1), Ok(()));
        assert_eq!(insert(&mut bus, u64::MAX, 1), Ok(()));
    }

    #[test]
    fn read_gives_the_offset_in_the_device() {
        let bus = bus_with(&[(0x1000, 0x10), (0x1010, 0x10)]);
        let mut data = [0xaa; 4];
        assert!(bus.read(0x1014, &mut data));
        assert_eq!(data, [4, 0, 0, 0]);
    }

    #[test]
    fn read_without_a_device_is_all_ones() {
        let bus = bus_with(&[(0x1000, 0x10)]);
        for addr in [0xfff, 0x1010, 0x100e, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn write_reaches_the_device_with_offset_and_data() {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = PioBus::default();
        bus.insert(0x3f8, 8, probe.clone()).unwrap();
        assert!(bus.write(0x3fa, &[7]));
        assert!(!bus.write(0x3f7, &[7]));
        assert!(!bus.write(0x3ff, &[7, 8]));
        assert_eq!(probe.lock().unwrap().written, [(2, vec![7])]);
    }
}
