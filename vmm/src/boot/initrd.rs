//! The initial RAM disk: it goes to the end of low RAM, as far away from the
//! kernel as possible.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::open_regular;
use crate::arch::layout;
use crate::vstate::memory::PAGE_SIZE;

/// An initrd that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the initrd {0:?}")]
    Open(PathBuf, #[source] io::Error),
    /// The file has no bytes.
    #[error("the initrd {0:?} is empty")]
    Empty(PathBuf),
    /// The guest is too small for it.
    #[error(
        "the initrd {path:?} has {len} bytes, and between the kernel and the end of low memory \
         there is room for {room}; give the guest more memory"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Bytes that are free.
        room: u64,
    },
    /// The file could not be copied.
    #[error("cannot load the initrd {0:?}")]
    Load(PathBuf, #[source] vm_memory::GuestMemoryError),
}

/// An initrd that has been opened but not loaded.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    len: u64,
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedInitrd {
    /// Guest-physical address.
    pub address: u32,
    /// Bytes.
    pub len: u32,
}

impl Initrd {
    /// Opens the initrd at `path`.
    ///
    /// # Errors
    ///
    /// The file cannot be read or is empty.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let open = || -> io::Result<_> {
            let file = open_regular(path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        let (file, len) = open().map_err(|e| Error::Open(path.into(), e))?;
        if len == 0 {
            return Err(Error::Empty(path.into()));
        }
        Ok(Self {
            path: path.into(),
            file,
            len,
        })
    }

    /// Loads the initrd below `limit` (the last address the kernel takes) and
    /// above `kernel_end`, in a guest with `ram` bytes of memory.
    ///
    /// # Errors
    ///
    /// There is no room, or the file changed meanwhile.
    pub fn load(
        mut self,
        memory: &GuestMemoryMmap,
        ram: u64,
        kernel_end: u64,
        limit: u64,
    ) -> Result<LoadedInitrd, Error> {
        let top = ram.min(layout::LOW_RAM_MAX).min(limit.saturating_add(1)) & !(PAGE_SIZE - 1);
        let bottom = kernel_end.next_multiple_of(PAGE_SIZE);
        let room = top.saturating_sub(bottom);
        let too_large = || Error::TooLarge {
            path: self.path.clone(),
            len: self.len,
            room,
        };
        if self.len > room {
            return Err(too_large());
        }
        // `len <= room <= top`, so this does not go below zero.
        let address = (top - self.len) & !(PAGE_SIZE - 1);
        // All of low RAM lies below 4 GiB.
        let (Ok(address), Ok(len)) = (u32::try_from(address), u32::try_from(self.len)) else {
            return Err(too_large());
        };
        memory
            .read_exact_volatile_from(
                GuestAddress(address.into()),
                &mut self.file,
                // A u32 fits in the usize of every host this runs on.
                len as usize,
            )
            .map_err(|e| Error::Load(self.path.clone(), e))?;
        Ok(LoadedInitrd { address, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tempfile::NamedTempFile;

    const RAM: u64 = 0x40_0000;

    fn memory() -> GuestMemoryMmap {
        let len = usize::try_from(RAM).unwrap();
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap()
    }

    fn initrd(bytes: &[u8]) -> (NamedTempFile, Initrd) {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let initrd = Initrd::open(file.path()).unwrap();
        (file, initrd)
    }

    #[test]
    fn initrd_goes_to_the_end_of_memory_on_a_page() {
        let (_file, initrd) = initrd(b"hello");
        let memory = memory();
        let loaded = initrd
            .load(&memory, RAM, 0x20_0000, u32::MAX.into())
            .unwrap();
        assert_eq!((loaded.address, loaded.len), (0x3f_f000, 5));
        let mut seen = [0; 5];
        memory
            .read_slice(&mut seen, GuestAddress(0x3f_f000))
            .unwrap();
        assert_eq!(&seen, b"hello");
    }

    #[test]
    fn initrd_stays_below_the_kernels_limit() {
        let (_file, initrd) = initrd(b"hello");
        let loaded = initrd.load(&memory(), RAM, 0x20_0000, 0x2f_ffff).unwrap();
        assert_eq!(loaded.address, 0x2f_f000);
    }

    #[test]
    fn initrd_that_just_fits_is_loaded_and_one_byte_more_is_not() {
        let room = RAM - 0x20_0000;
        let (_file, fits) = initrd(&vec![1; usize::try_from(room).unwrap()]);
        let loaded = fits
            .load(&memory(), RAM, 0x20_0000, u32::MAX.into())
            .unwrap();
        assert_eq!(loaded.address, 0x20_0000);
        let (_file, large) = initrd(&vec![1; usize::try_from(room + 1).unwrap()]);
        let error = large
            .load(&memory(), RAM, 0x20_0000, u32::MAX.into())
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooLarge {
                    room: 0x20_0000,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn initrd_larger_than_memory_is_refused() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        let initrd = Initrd::open(file.path()).unwrap();
        let error = initrd
            .load(&memory(), RAM, 0x50_0000, u32::MAX.into())
            .unwrap_err();
        assert!(matches!(error, Error::TooLarge { room: 0, .. }), "{error}");
    }

    #[test]
    fn missing_and_empty_initrds_are_named() {
        let error = Initrd::open(Path::new("/nonexistent/initrd")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/initrd"));
        let file = NamedTempFile::new().unwrap();
        assert!(matches!(Initrd::open(file.path()), Err(Error::Empty(_))));
    }
}
