//! The three files of a pool and the mappings of them.
//!
//! ```text
//! data       |<- region A data ->|<- free ->|<- region B data ->| ...  data_len
//! tables     |PMD|PTE pages, spare slots|PMD PMD|PTE pages ...  | ...  table_len
//! directory  |header page| record 0 | record 1 | ...                   fixed
//! ```
//!
//! Invariants:
//! * every file is sealed against shrinking, growing and further sealing
//!   before anybody else sees it, so an access inside a checked mapping cannot
//!   raise SIGBUS because of another process;
//! * the tables are never backed by huge pages (each mapping says
//!   `MADV_NOHUGEPAGE`): punching one table page must free exactly that page;
//! * whoever maps a file here reaches it through 64-bit atomics only, because
//!   CPUs of guests and other processes access the same words.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use mshare_protocol::broker::Geometry;
use mshare_protocol::entry::PAGE_SIZE;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::marks;
use crate::record::DIRECTORY_LEN;

/// Bytes in one word of a table or record.
pub const WORD: u64 = 8;

/// Why the memory of a pool could not be set up or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A file could not be made.
    #[error("cannot create the pool's {file} file of {len} bytes")]
    Create {
        /// Which of the three.
        file: &'static str,
        /// Its length in bytes.
        len: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A received descriptor is not a file of a pool.
    #[error("the descriptor for the pool's {file} file is wrong: {reason}")]
    Descriptor {
        /// Which of the three.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The directory cannot be opened a second time.
    #[error("cannot open the pool's directory anew; is /proc mounted?")]
    Reopen(#[source] io::Error),
    /// A range cannot be mapped.
    #[error("cannot map {len} bytes at offset {offset:#x} of a pool file")]
    Map {
        /// Offset in the file in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// There is no memory for a range.
    #[error("no memory for {len} bytes of a pool file")]
    NoMemory {
        /// Bytes.
        len: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A range could not be freed.
    #[error("cannot free {len} bytes at offset {offset:#x} of a pool file")]
    Punch {
        /// Offset in the file in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// The seals that every file of a pool carries.
fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

/// The descriptors of a pool.
#[derive(Debug)]
pub struct PoolFiles {
    data: OwnedFd,
    tables: OwnedFd,
    directory: OwnedFd,
}

impl PoolFiles {
    /// Creates and seals the files for `geometry`. They occupy no memory yet.
    ///
    /// # Errors
    /// [`MemoryError::Create`].
    pub fn create(geometry: &Geometry) -> Result<Self, MemoryError> {
        Ok(Self {
            data: create_file("data", geometry.data_len)?,
            tables: create_file("tables", geometry.table_len)?,
            directory: create_file("directory", DIRECTORY_LEN)?,
        })
    }

    /// Takes the descriptors that came with a message: data, tables,
    /// directory.
    ///
    /// # Errors
    /// [`MemoryError::Descriptor`] if there are not three, or one is not
    /// sealed as a pool's files are.
    pub fn from_received(fds: Vec<OwnedFd>) -> Result<Self, MemoryError> {
        let count = fds.len();
        let [data, tables, directory] =
            <[OwnedFd; 3]>::try_from(fds).map_err(|_| MemoryError::Descriptor {
                file: "data",
                reason: format!("{count} descriptors came, 3 are needed"),
            })?;
        let files = Self {
            data,
            tables,
            directory,
        };
        for (file, fd) in [
            ("data", files.data()),
            ("tables", files.tables()),
            ("directory", files.directory()),
        ] {
            let wrong = |reason: &str| MemoryError::Descriptor {
                file,
                reason: reason.to_owned(),
            };
            let have =
                rustix::fs::fcntl_get_seals(fd).map_err(|_| wrong("it is not a sealable file"))?;
            if !have.contains(seals()) {
                return Err(wrong("it is not sealed against resizing"));
            }
        }
        Ok(files)
    }

    /// Checks that the files are as long as `geometry` says.
    ///
    /// # Errors
    /// [`MemoryError::Descriptor`] naming the file and both lengths.
    pub fn check(&self, geometry: &Geometry) -> Result<(), MemoryError> {
        for (file, fd, want) in [
            ("data", self.data(), geometry.data_len),
            ("tables", self.tables(), geometry.table_len),
            ("directory", self.directory(), DIRECTORY_LEN),
        ] {
            let len = file_len(fd).unwrap_or(0);
            if len != want {
                return Err(MemoryError::Descriptor {
                    file,
                    reason: format!("it has {len} bytes, the pool says {want}"),
                });
            }
        }
        Ok(())
    }

    /// The same files, the directory opened anew: without the mark of the
    /// client that has sent it (see [`crate::marks`]).
    ///
    /// # Errors
    /// [`MemoryError::Reopen`].
    pub fn unmarked(self) -> Result<Self, MemoryError> {
        let directory = marks::reopen(self.directory()).map_err(MemoryError::Reopen)?;
        Ok(Self { directory, ..self })
    }

    /// A second set of descriptors of the same files.
    ///
    /// # Errors
    /// [`MemoryError::Create`] if the process has no descriptor left.
    pub fn try_clone(&self) -> Result<Self, MemoryError> {
        let dup = |file, fd: &OwnedFd| {
            fd.try_clone().map_err(|source| MemoryError::Create {
                file,
                len: 0,
                source,
            })
        };
        Ok(Self {
            data: dup("data", &self.data)?,
            tables: dup("tables", &self.tables)?,
            directory: dup("directory", &self.directory)?,
        })
    }

    /// The file of data pages.
    #[must_use]
    pub fn data(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// The file of tables.
    #[must_use]
    pub fn tables(&self) -> BorrowedFd<'_> {
        self.tables.as_fd()
    }

    /// The file of the directory.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// All three, in the order in which they are passed.
    #[must_use]
    pub fn all(&self) -> [BorrowedFd<'_>; 3] {
        [self.data(), self.tables(), self.directory()]
    }
}

fn create_file(file: &'static str, len: u64) -> Result<OwnedFd, MemoryError> {
    let make = || -> Result<OwnedFd, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let name = format!("mshare-{file}");
        // MFD_NOEXEC_SEAL is Linux 6.3; older kernels answer EINVAL.
        let fd = match rustix::fs::memfd_create(&*name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create(&*name, flags)?,
            other => other?,
        };
        rustix::fs::ftruncate(&fd, len)?;
        rustix::fs::fcntl_add_seals(&fd, seals())?;
        Ok(fd)
    };
    make().map_err(|e| MemoryError::Create {
        file,
        len,
        source: e.into(),
    })
}

/// Length of a file in bytes.
///
/// # Errors
/// That of `fstat(2)`.
pub fn file_len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Memory that a whole file occupies, in bytes. Constant time.
#[must_use]
pub fn occupied(fd: BorrowedFd<'_>) -> u64 {
    rustix::fs::fstat(fd).map_or(0, |s| u64::try_from(s.st_blocks).unwrap_or(0) * 512)
}

/// Memory that a range of a file occupies, in bytes. Takes time in proportion
/// to the pages found, so it is kept out of the paths of guests.
///
/// # Errors
/// That of `lseek(2)`.
pub fn resident(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.saturating_add(len);
    let mut sum = 0;
    let mut at = offset;
    // The position is shared with other holders of the file, but only the
    // answers of these calls are used.
    while at < end {
        let data = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = rustix::fs::seek(fd, SeekFrom::Hole(data))?.min(end);
        sum += hole - data;
        at = hole;
    }
    Ok(sum)
}

/// Frees a range of a file. On return the range reads as zero, no process and
/// no guest has a translation to the old pages (`mmu_notifier` of every
/// mapping), and vCPUs that could have cached one have been made to flush.
///
/// # Errors
/// [`MemoryError::Punch`].
pub fn punch(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), MemoryError> {
    crash::point();
    if len == 0 {
        return Ok(());
    }
    let failed = |e: Errno| MemoryError::Punch {
        offset,
        len,
        source: e.into(),
    };
    if crash::punch_fails() {
        return Err(failed(Errno::NOMEM));
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match rustix::fs::fallocate(fd, flags, offset, len) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(failed(e)),
        }
    }
}

/// How a mapping may be used, and how it is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes.
    ReadWrite,
    /// Reads only.
    ReadOnly,
}

/// A shared mapping of a range of a file; unmapped when dropped. Pages come on
/// first access.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<c_void>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; its memory is
// reached through atomics or raw pointers only.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method hands out a plain reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` at `offset`.
    ///
    /// # Errors
    /// [`MemoryError::Map`], also if the range is empty, unaligned or beyond
    /// the end of the file.
    pub fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<Self, MemoryError> {
        let failed = |source: io::Error| MemoryError::Map {
            offset,
            len,
            source,
        };
        let size = file_len(fd).map_err(failed)?;
        let bytes = match usize::try_from(len) {
            Ok(bytes)
                if len > 0
                    && offset.is_multiple_of(PAGE_SIZE)
                    && offset.checked_add(len).is_some_and(|end| end <= size) =>
            {
                bytes
            }
            _ => {
                let reason = format!("the file has {size} bytes");
                return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, reason)));
            }
        };
        let prot = match access {
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
            Access::ReadOnly => ProtFlags::READ,
        };
        // SAFETY: a new mapping at an address of the kernel's choice replaces
        // nothing; the range was checked against the length of the file.
        let ptr = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                prot,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset,
            )
        }
        .map_err(|e| failed(e.into()))?;
        let ptr = NonNull::new(ptr).ok_or_else(|| failed(Errno::FAULT.into()))?;
        Ok(Self { ptr, len: bytes })
    }

    /// Maps a range of the tables file, without huge pages. VMMs must use this
    /// too: a huge page made by one mapping would be there for all.
    ///
    /// # Errors
    /// [`MemoryError::Map`].
    pub fn tables(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let mapping = Self::new(fd, offset, len, Access::ReadWrite)?;
        mapping.advise(0, mapping.len, Advice::LinuxNoHugepage, offset)?;
        Ok(mapping)
    }

    /// Start of the mapping. Valid for [`Self::len`] bytes while `self` lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr().cast()
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: empty mappings cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapping as words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, lives as long as `self` and, as
        // its file is sealed against shrinking, stays backed; other processes
        // and CPUs may write it at any time, which atomics allow.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.len / 8) }
    }

    fn advise(&self, at: usize, len: usize, advice: Advice, name: u64) -> Result<(), MemoryError> {
        debug_assert!(at + len <= self.len);
        loop {
            // SAFETY: the range lies inside the mapping, and the advice given
            // here (no huge pages, populate) changes no content.
            let done = unsafe { rustix::mm::madvise(self.ptr.as_ptr().byte_add(at), len, advice) };
            match done {
                Ok(()) => return Ok(()),
                Err(Errno::INTR | Errno::AGAIN) => {}
                // A kernel without transparent huge pages makes none.
                Err(Errno::INVAL) if advice == Advice::LinuxNoHugepage => return Ok(()),
                Err(e) => {
                    return Err(MemoryError::Map {
                        offset: name,
                        len: len as u64,
                        source: e.into(),
                    });
                }
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `ptr` and `len` are those of the mapping made in `new`, and
        // no reference into it outlives `self`.
        if let Err(e) = unsafe { rustix::mm::munmap(self.ptr.as_ptr(), self.len) } {
            log::error!("cannot unmap {} bytes of a pool file: {e}", self.len);
        }
    }
}

/// A whole file of words: how the broker reaches tables and directory. Every
/// change of either goes through [`SharedFile::store`] or
/// [`SharedFile::punch`].
#[derive(Debug)]
pub struct SharedFile {
    fd: OwnedFd,
    map: Mapping,
}

impl SharedFile {
    /// Opens a file (its descriptor is duplicated).
    ///
    /// # Errors
    /// [`MemoryError::Map`].
    pub fn open(fd: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        let fail = |source| MemoryError::Map {
            offset: 0,
            len: 0,
            source,
        };
        let fd = fd.try_clone_to_owned().map_err(fail)?;
        let len = file_len(fd.as_fd()).map_err(fail)?;
        let map = Mapping::tables(fd.as_fd(), 0, len)?;
        Ok(Self { fd, map })
    }

    /// Number of words.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.map.words().len() as u64
    }

    /// Reads word `index`; zero beyond the end.
    #[must_use]
    pub fn load(&self, index: u64) -> u64 {
        usize::try_from(index)
            .ok()
            .and_then(|i| self.map.words().get(i))
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Writes word `index`, after everything written before. Indexes come from
    /// checked layouts; one beyond the end is ignored.
    pub fn store(&self, index: u64, value: u64) {
        crash::point();
        let word = usize::try_from(index)
            .ok()
            .and_then(|i| self.map.words().get(i));
        debug_assert!(word.is_some(), "word {index} is beyond the file");
        if let Some(word) = word {
            word.store(value, Ordering::Release);
        }
    }

    /// Writes consecutive words from `index` on. For pages that nobody can
    /// reach yet: there is no order among the words.
    pub fn fill(&self, index: u64, values: impl Iterator<Item = u64>) {
        crash::point();
        let words = usize::try_from(index)
            .ok()
            .and_then(|i| self.map.words().get(i..))
            .unwrap_or_default();
        for (word, value) in words.iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Makes memory present for the pages of a range, so that stores to it can
    /// neither fail nor fault.
    ///
    /// # Errors
    /// [`MemoryError::NoMemory`].
    pub fn populate(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let failed = |source: io::Error| MemoryError::NoMemory { len, source };
        let bytes = usize::try_from(len)
            .map_err(io::Error::other)
            .map_err(failed)?;
        let at = usize::try_from(offset)
            .map_err(io::Error::other)
            .map_err(failed)?;
        if at.checked_add(bytes).is_none_or(|end| end > self.map.len) {
            return Err(failed(Errno::INVAL.into()));
        }
        match self
            .map
            .advise(at, bytes, Advice::LinuxPopulateWrite, offset)
        {
            Ok(()) => Ok(()),
            Err(MemoryError::Map { source, .. }) => {
                // Kernels before 5.14 do not know the advice; allocating the
                // pages serves as well, only the mapping is then filled later.
                if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
                    rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, len)
                        .map_err(|e| failed(e.into()))
                } else {
                    Err(failed(source))
                }
            }
            Err(other) => Err(other),
        }
    }

    /// See [`punch`].
    ///
    /// # Errors
    /// [`MemoryError::Punch`].
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        punch(self.fd.as_fd(), offset, len)
    }

    /// See [`resident`].
    ///
    /// # Errors
    /// That of `lseek(2)`.
    pub fn resident(&self, offset: u64, len: u64) -> io::Result<u64> {
        resident(self.fd.as_fd(), offset, len)
    }
}

/// Sixteen random bytes.
///
/// # Errors
/// That of reading `/dev/urandom`.
pub fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut id)?;
    Ok(id)
}

/// A simulated kill: in tests, each change of shared state burns fuel, and the
/// change for which there is none left does not happen. Unwinding from there
/// leaves the files exactly as a SIGKILL at that instruction would.
#[cfg(test)]
pub mod crash {
    use std::cell::Cell;

    thread_local! {
        static FUEL: Cell<Option<u64>> = const { Cell::new(None) };
        static COUNT: Cell<u64> = const { Cell::new(0) };
        static PUNCHES: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// Lets the punch after the next `punches` on this thread fail, once;
    /// whether the one armed before is still to come.
    pub fn fail_punch(punches: Option<u64>) -> bool {
        PUNCHES.replace(punches).is_some()
    }

    pub(super) fn punch_fails() -> bool {
        let left = PUNCHES.get();
        PUNCHES.set(left.and_then(|n| n.checked_sub(1)));
        left == Some(0)
    }

    /// What the simulated kill unwinds with.
    #[derive(Debug)]
    pub struct Killed;

    /// Lets `fuel` changes happen on this thread, then kills; `None`: no limit.
    pub fn arm(fuel: Option<u64>) {
        FUEL.set(fuel);
    }

    /// How many changes have happened on this thread.
    #[must_use]
    pub fn count() -> u64 {
        COUNT.get()
    }

    pub(super) fn point() {
        COUNT.set(COUNT.get() + 1);
        match FUEL.get() {
            None => {}
            Some(0) => std::panic::resume_unwind(Box::new(Killed)),
            Some(n) => FUEL.set(Some(n - 1)),
        }
    }
}

#[cfg(not(test))]
mod crash {
    #[inline(always)]
    pub(super) fn point() {}

    #[inline(always)]
    pub(super) const fn punch_fails() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn files() -> PoolFiles {
        PoolFiles::create(&Geometry {
            uuid: [1; 16],
            window_gpa: 1 << 38,
            table_len: 4 << 20,
            data_off: 1 << 30,
            data_len: 8 << 20,
            huge_pages: false,
        })
        .unwrap()
    }

    #[test]
    fn files_cannot_be_resized() {
        let files = files();
        for fd in files.all() {
            assert_eq!(rustix::fs::ftruncate(fd, 4096), Err(Errno::PERM));
            assert_eq!(rustix::fs::ftruncate(fd, 1 << 30), Err(Errno::PERM));
        }
    }

    /// Why they are sealed: the memory of whoever maps an unsealed file is gone as
    /// soon as a peer says so. The kernel is asked to read it, as it answers EFAULT
    /// where a load would be SIGBUS.
    #[test]
    fn file_without_seals_shrinks_under_its_mapping() {
        let unsealed = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, 8192).unwrap();
        let mapping = Mapping::new(unsealed.as_fd(), 0, 8192, Access::ReadOnly).unwrap();
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let kernel_reads = || {
            // SAFETY: the kernel reads 8 bytes of the mapping, or finds that it cannot.
            let count = unsafe {
                libc::write(
                    writer.as_raw_fd(),
                    mapping.as_ptr().add(4096).cast_const().cast(),
                    8,
                )
            };
            (count, io::Error::last_os_error().raw_os_error())
        };
        assert_eq!(kernel_reads().0, 8);
        rustix::fs::ftruncate(&unsealed, 4096).unwrap();
        assert_eq!(kernel_reads(), (-1, Some(libc::EFAULT)));
    }

    #[test]
    fn resident_counts_written_pages_and_punch_frees_them() {
        let files = files();
        let fd = files.data();
        assert_eq!(occupied(fd), 0);
        for page in [0, 1, 7, 9] {
            rustix::io::pwrite(fd, b"x", page * 4096).unwrap();
        }
        assert_eq!(occupied(fd), 4 * 4096);
        assert_eq!(resident(fd, 0, 8 << 20).unwrap(), 4 * 4096);
        assert_eq!(resident(fd, 4096, 7 * 4096).unwrap(), 2 * 4096);
        punch(fd, 4096, 7 * 4096).unwrap();
        assert_eq!(resident(fd, 0, 8 << 20).unwrap(), 2 * 4096);
    }

    #[test]
    fn mapping_beyond_the_file_is_refused() {
        let files = files();
        for (offset, len) in [
            (0, 16 << 20),
            (8 << 20, 4096),
            (0, 0),
            (1, 4096),
            (u64::MAX - 4095, 8192),
        ] {
            let result = Mapping::new(files.data(), offset, len, Access::ReadOnly);
            assert!(
                matches!(result, Err(MemoryError::Map { .. })),
                "{offset} {len}"
            );
        }
    }

    #[test]
    fn received_descriptors_are_checked() {
        let files = files();
        let fds = |n: usize| -> Vec<OwnedFd> {
            files.all()[..n]
                .iter()
                .map(|f| f.try_clone_to_owned().unwrap())
                .collect()
        };
        assert!(PoolFiles::from_received(fds(3)).is_ok());
        assert!(PoolFiles::from_received(fds(2)).is_err());
        let mut with_file = fds(2);
        with_file.push(File::open("/dev/null").unwrap().into());
        let error = PoolFiles::from_received(with_file).unwrap_err();
        assert!(error.to_string().contains("directory"), "{error}");
        let unsealed = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        let mut with_unsealed = fds(2);
        with_unsealed.push(unsealed);
        assert!(PoolFiles::from_received(with_unsealed).is_err());
    }

    #[test]
    fn populate_makes_pages_present() {
        let files = files();
        let tables = SharedFile::open(files.tables()).unwrap();
        tables.populate(8192, 16384).unwrap();
        assert_eq!(tables.resident(0, 4 << 20).unwrap(), 16384);
        assert!(tables.populate(4 << 20, 4096).is_err());
        tables.store(1024, 7);
        assert_eq!(tables.load(1024), 7);
        tables.punch(8192, 4096).unwrap();
        assert_eq!(tables.load(1024), 0);
    }
}
