//! The file behind a disk.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::SECTOR;

/// Bytes of a disk's identity (virtio 1.2, section 5.2.6).
pub(super) const ID_LEN: usize = 20;
/// Zeros are written in pieces of this many bytes where the host's file system
/// cannot make them itself.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host does not let us open it.
    #[error("cannot open disk {path:?}{}", if *.read_only { "" } else { " for writing" })]
    Open {
        /// The disk.
        path: PathBuf,
        /// How it was to be opened.
        read_only: bool,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("disk {0:?} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Not made of whole sectors.
    #[error("disk {path:?} has {len} bytes; it needs a multiple of {SECTOR} that is not zero")]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// Another VMM has it.
    #[error(
        "disk {0:?} is in use by another process; only read-only disks can be used more than once"
    )]
    InUse(PathBuf),
    /// The host does not let us lock it.
    #[error("cannot lock disk {path:?}")]
    Lock {
        /// The disk.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

/// A file of whole sectors.
#[derive(Debug)]
pub struct Disk {
    file: File,
    len: u64,
    read_only: bool,
    id: [u8; ID_LEN],
}

impl Disk {
    /// Opens the disk at `path`. `id` is the identity the guest can ask for
    /// (its serial number); what is longer than 20 bytes is cut off.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn open(path: &Path, read_only: bool, id: &str) -> Result<Self, Error> {
        let cannot_open = |source| Error::Open {
            path: path.into(),
            read_only,
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // Opening a pipe must not wait for its other end.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(cannot_open)?;
        let kind = file.metadata().map_err(cannot_open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind(path.into()));
        }
        // Unlike the metadata's length, this works for block devices.
        let len = file.seek(SeekFrom::End(0)).map_err(cannot_open)?;
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(Error::Size {
                path: path.into(),
                len,
            });
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse(path.into())),
            Err(TryLockError::Error(source)) => {
                return Err(Error::Lock {
                    path: path.into(),
                    source,
                });
            }
        }
        let mut id_bytes = [0; ID_LEN];
        let id_len = id.len().min(ID_LEN);
        id_bytes[..id_len].copy_from_slice(&id.as_bytes()[..id_len]);
        Ok(Self {
            file,
            len,
            read_only,
            id: id_bytes,
        })
    }

    /// Length in sectors.
    pub fn sectors(&self) -> u64 {
        self.len / SECTOR
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The identity, filled up with zeros.
    pub(super) fn id(&self) -> &[u8; ID_LEN] {
        &self.id
    }

    /// The byte offset of `sector`, if `len` bytes from there are whole
    /// sectors of the disk.
    pub(super) fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.len).then_some(offset)
    }

    /// Reads all of `data` from byte `offset`.
    pub(super) fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes all of `data` at byte `offset`.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes what was written survive a crash of the host.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the host's storage for a range back. The content is undefined
    /// afterwards, so a host that cannot do it has done enough.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, len) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Zeroes a range; `unmap` allows to give its storage back.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP) => self.write_zeroes_by_hand(offset, len),
            result => Ok(result?),
        }
    }

    fn write_zeroes_by_hand(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            let piece = usize::try_from(end - offset).map_or(ZEROS.len(), |n| n.min(ZEROS.len()));
            self.write(&ZEROS[..piece], offset)?;
            offset += piece as u64;
        }
        Ok(())
    }
}
