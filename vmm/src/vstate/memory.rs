//! Memory of the VMM that guests see.
//!
//! ```text
//! memfd "guest-ram"   0 ........ 3 GiB ........ size
//!                     |            |              |
//! host addresses      [ region 0  ]  [ region 1  ]      one Mapping each
//!                     |           |  |           |
//! guest-physical      0 .... 3 GiB   4 GiB ......       one memslot each
//! ```
//!
//! A file that backs guest memory is sealed against shrinking, so that an
//! access through a mapping cannot run past its end, and is mapped with
//! `MAP_NORESERVE`: a guest takes host memory only as it touches its own.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionError,
};

use crate::arch::layout;

/// Size of a page of the host and of the guest, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Guest memory that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memory file.
    #[error("cannot create a memory file of {0} bytes")]
    Memfd(u64, #[source] io::Error),
    /// The host refuses the mapping.
    #[error("cannot map {len} bytes of a memory file at offset {offset:#x}")]
    Map {
        /// Bytes.
        len: u64,
        /// First byte in the file.
        offset: u64,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The host refuses to map guest RAM.
    #[error("cannot map {0} bytes of guest RAM")]
    MapRam(u64, #[source] MmapRegionError),
    /// The ranges do not fit the address space.
    #[error("guest RAM of {0} bytes does not fit the address space")]
    Layout(u64),
}

/// Memory of this process that can back a memslot.
///
/// # Safety
///
/// The `len` bytes from `host_addr` are mapped, and nothing else is mapped in
/// their place, for as long as the value lives.
pub unsafe trait Backing: Send + Sync + std::fmt::Debug {
    /// Address in this process, a multiple of [`PAGE_SIZE`].
    fn host_addr(&self) -> u64;
    /// Bytes, a multiple of [`PAGE_SIZE`].
    fn len(&self) -> u64;
    /// Whether there is nothing to map.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a mapping may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Loads only.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// A shared mapping of a range of a file, unmapped when dropped.
///
/// ```text
/// file     0 ....... offset .......... offset + len ...
///                    |                 |
/// process            host_addr ....... host_addr + len
/// ```
///
/// Invariant: `addr..addr + len` is a mapping that this value owns alone.
/// Other processes may change the bytes at any time, so they are reached by
/// raw pointers only, never by references.
#[derive(Debug)]
pub struct Mapping {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and the value
// hands out its address only.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method changes the value.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the `len` bytes of `file` from byte `offset`.
    ///
    /// # Errors
    ///
    /// `len` is zero, `len` or `offset` is not a multiple of [`PAGE_SIZE`], or
    /// the host refuses.
    pub fn new(file: impl AsFd, offset: u64, len: u64, access: Access) -> Result<Self, Error> {
        let fail = |source: io::Error| Error::Map {
            len,
            offset,
            source,
        };
        let size = check(offset, len).map_err(fail)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel picks an address range that is
        // free, so no memory in use changes.
        let addr =
            unsafe { rustix::mm::mmap(null_mut(), size, protection(access), flags, file, offset) };
        Self::own(addr, size).map_err(fail)
    }

    /// The same for a range that shall have huge pages: it lies in the address
    /// space as it does in the file, modulo 2 MiB, and asks for them. Whether
    /// there are any is up to the host (`shmem_enabled`).
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn huge(file: impl AsFd, offset: u64, len: u64, access: Access) -> Result<Self, Error> {
        let fail = |source: io::Error| Error::Map {
            len,
            offset,
            source,
        };
        let size = check(offset, len).map_err(fail)?;
        let astray = usize::try_from(offset).unwrap_or(0);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as in `new`.
        let addr = unsafe {
            rustix::mm::mmap_anonymous(null_mut(), size + HUGE_PAGE, ProtFlags::empty(), flags)
        };
        let room = Self::own(addr, size + HUGE_PAGE).map_err(fail)?;
        let head = astray.wrapping_sub(room.addr.as_ptr() as usize) % HUGE_PAGE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range lies inside the room, which nobody else knows.
        let addr = unsafe {
            let start = room.addr.as_ptr().add(head).cast();
            rustix::mm::mmap(start, size, protection(access), flags, file, offset)
        };
        let mapping = Self::own(addr, size).map_err(fail)?;
        let room = ManuallyDrop::new(room);
        for (at, len) in [(0, head), (head + size, HUGE_PAGE - head)] {
            if len > 0 {
                // SAFETY: `at` is inside the room.
                let addr = unsafe { room.addr.add(at) };
                drop(Self { addr, len });
            }
        }
        // SAFETY: the range is the mapping's own; the advice changes no contents.
        let advised = unsafe {
            rustix::mm::madvise(mapping.addr.as_ptr().cast(), size, Advice::LinuxHugepage)
        };
        match advised {
            // A kernel without huge pages.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(mapping),
            Err(e) => Err(fail(e.into())),
        }
    }

    fn own(addr: rustix::io::Result<*mut c_void>, len: usize) -> io::Result<Self> {
        let addr = NonNull::new(addr?.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { addr, len })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr.as_ptr()
    }
}

/// The length of a range of a file that can be mapped.
fn check(offset: u64, len: u64) -> io::Result<usize> {
    if len == 0 || !len.is_multiple_of(PAGE_SIZE) || !offset.is_multiple_of(PAGE_SIZE) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    usize::try_from(len)
        .ok()
        .filter(|len| len.checked_add(HUGE_PAGE).is_some())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn protection(access: Access) -> ProtFlags {
    match access {
        Access::ReadOnly => ProtFlags::READ,
        Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is a mapping that this value owns alone (see the
        // type's invariant), and nobody uses it after the value is gone.
        let result = unsafe { rustix::mm::munmap(self.addr.as_ptr().cast(), self.len) };
        if let Err(error) = result {
            log::error!("cannot unmap {} bytes: {error}", self.len);
        }
    }
}

// SAFETY: the range stays mapped until the value is dropped (invariant of
// Mapping).
unsafe impl Backing for Mapping {
    fn host_addr(&self) -> u64 {
        self.addr.as_ptr() as u64
    }

    fn len(&self) -> u64 {
        self.len as u64
    }
}

// SAFETY: the region owns its mapping and unmaps it only when dropped; the
// constructors in this module build no region over foreign memory.
unsafe impl Backing for GuestRegionMmap {
    fn host_addr(&self) -> u64 {
        self.as_ptr() as u64
    }

    fn len(&self) -> u64 {
        self.size() as u64
    }
}

/// A memory file of `len` bytes, sealed against changes of its size.
///
/// # Errors
///
/// The host has no memory files or not enough memory.
pub fn memory_file(name: &str, len: u64) -> Result<File, Error> {
    let fail = |e: rustix::io::Errno| Error::Memfd(len, e.into());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(name, flags).map_err(fail)?;
    rustix::fs::ftruncate(&fd, len).map_err(fail)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals).map_err(fail)?;
    Ok(File::from(fd))
}

/// The RAM of a guest.
#[derive(Debug, Clone)]
pub struct GuestRam {
    /// The view devices use.
    pub memory: GuestMemoryMmap,
    /// The regions, in the order of their addresses.
    pub regions: Vec<Arc<GuestRegionMmap>>,
}

impl GuestRam {
    /// Makes the RAM of a guest with `bytes` of memory.
    ///
    /// # Errors
    ///
    /// The host refuses the file or the mapping.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        let file = Arc::new(memory_file("guest-ram", bytes)?);
        let mut offset = 0;
        let mut regions = Vec::new();
        for (base, len) in layout::ram_ranges(bytes) {
            let size = usize::try_from(len).map_err(|_| Error::Layout(bytes))?;
            let mapping = MmapRegion::build(
                Some(FileOffset::from_arc(Arc::clone(&file), offset)),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
            )
            .map_err(|e| Error::MapRam(len, e))?;
            let region =
                GuestRegionMmap::new(mapping, GuestAddress(base)).ok_or(Error::Layout(bytes))?;
            regions.push(Arc::new(region));
            offset += len;
        }
        let memory =
            GuestMemoryMmap::from_arc_regions(regions.clone()).map_err(|_| Error::Layout(bytes))?;
        Ok(Self { memory, regions })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn mapping_shows_the_range_of_the_file() {
        let file = memory_file("test", 3 * PAGE_SIZE).unwrap();
        let all = Mapping::new(&file, 0, 3 * PAGE_SIZE, Access::ReadWrite).unwrap();
        let last = Mapping::new(&file, 2 * PAGE_SIZE, PAGE_SIZE, Access::ReadOnly).unwrap();
        // SAFETY: both mappings are alive and the offsets are inside them.
        let seen = unsafe {
            all.as_ptr().add(8192 + 5).write_volatile(42);
            last.as_ptr().add(5).read_volatile()
        };
        assert_eq!(seen, 42);
        assert_eq!(Backing::len(&last), PAGE_SIZE);
    }

    #[test]
    fn huge_mapping_lies_in_memory_as_in_the_file() {
        let huge = HUGE_PAGE as u64;
        let file = memory_file("test", 4 * huge).unwrap();
        let plain = Mapping::new(&file, 0, 4 * huge, Access::ReadWrite).unwrap();
        for offset in [0, huge, huge + 5 * PAGE_SIZE] {
            let len = 2 * huge + PAGE_SIZE;
            let mapping = Mapping::huge(&file, offset, len, Access::ReadWrite).unwrap();
            assert_eq!(mapping.host_addr() % huge, offset % huge);
            let last = usize::try_from(len).unwrap() - 1;
            // SAFETY: both mappings are alive and the offsets are inside them.
            let seen = unsafe {
                mapping.as_ptr().add(last).write_volatile(7);
                let at = usize::try_from(offset).unwrap() + last;
                plain.as_ptr().add(at).read_volatile()
            };
            assert_eq!((seen, Backing::len(&mapping)), (7, len));
        }
    }

    #[test]
    fn mapping_of_odd_range_is_refused() {
        let file = memory_file("test", PAGE_SIZE).unwrap();
        for (offset, len) in [(0, 0), (1, PAGE_SIZE), (0, 100)] {
            let error = Mapping::new(&file, offset, len, Access::ReadOnly).unwrap_err();
            assert!(matches!(error, Error::Map { .. }), "{error}");
        }
    }

    #[test]
    fn memory_file_cannot_shrink_or_grow() {
        let file = memory_file("test", 2 * PAGE_SIZE).unwrap();
        assert!(file.set_len(PAGE_SIZE).is_err());
        assert!(file.set_len(3 * PAGE_SIZE).is_err());
    }

    #[test]
    fn guest_ram_beyond_the_hole_is_two_regions_of_one_file() {
        let ram = GuestRam::new(layout::LOW_RAM_MAX + 0x20_0000).unwrap();
        let bases: Vec<_> = ram.regions.iter().map(|r| r.start_addr().0).collect();
        assert_eq!(bases, [0, layout::HIGH_RAM]);
        let value = 0x1122_3344_u32;
        let last = GuestAddress(layout::HIGH_RAM + 0x20_0000 - 4);
        ram.memory.write_obj(value, last).unwrap();
        assert_eq!(ram.memory.read_obj::<u32>(last).unwrap(), value);
        assert!(
            ram.memory
                .find_region(GuestAddress(layout::LOW_RAM_MAX))
                .is_none()
        );
    }
}
