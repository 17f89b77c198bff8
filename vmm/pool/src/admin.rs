//! What `vmm pool` does with a client: everything about regions that needs no
//! guest.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use mshare_protocol::broker::{Failure, PoolStat, Region, Role};
use rustix::io::Errno;

use crate::client::{Client, ClientError};
use crate::failure::{is, show};

/// Bytes moved at a time.
const CHUNK: usize = 1 << 20;

/// Why an order of the administrator failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No broker.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The broker refused.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The range is not inside the region.
    #[error("{len} bytes at offset {offset} do not fit in {name}, which has {size} bytes")]
    Range {
        /// The region's name.
        name: String,
        /// Its length.
        size: u64,
        /// Offset asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The input has more than fits.
    #[error("the input goes on after {written} bytes, where {name} ends; nothing beyond was read")]
    InputTooLong {
        /// The region's name.
        name: String,
        /// Bytes that were written.
        written: u64,
    },
    /// Input or output failed.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Connects as an administrator.
///
/// # Errors
/// [`AdminError::Client`].
pub fn connect(socket: &Path) -> Result<Client, AdminError> {
    Ok(Client::connect(socket, Role::Admin, |_, _| ())?)
}

/// All named regions, in order of id, with their resident bytes.
///
/// # Errors
/// [`AdminError::Failed`].
pub fn list(client: &Client) -> Result<Vec<Region>, AdminError> {
    let mut all: Vec<Region> = Vec::new();
    loop {
        let page = client.list(all.last().map_or(0, |r| r.id + 1), u32::MAX)?;
        if page.is_empty() {
            break;
        }
        all.extend(page);
    }
    let mut counted = Vec::with_capacity(all.len());
    for region in all {
        match client.stat(region.id) {
            // Without a name if that was removed meanwhile.
            Ok(region) if region.name.is_empty() => {}
            Ok(region) => counted.push(region),
            Err(e) if is(&e, Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(counted)
}

/// A region by name, with its resident bytes.
///
/// # Errors
/// [`AdminError::Failed`].
pub fn stat(client: &Client, name: &[u8]) -> Result<Region, AdminError> {
    let region = client.lookup(name)?;
    Ok(client.stat(region.id)?)
}

/// The pool.
///
/// # Errors
/// [`AdminError::Failed`].
pub fn pool_stat(client: &Client) -> Result<PoolStat, AdminError> {
    Ok(client.pool_stat()?)
}

/// Creates a region with address and length at once.
///
/// # Errors
/// [`AdminError::Failed`]; then there is no region of that name unless there
/// was one before.
pub fn create(
    client: &Client,
    name: &[u8],
    mode: u32,
    start: u64,
    len: u64,
) -> Result<Region, AdminError> {
    let uid = rustix::process::getuid().as_raw();
    let gid = rustix::process::getgid().as_raw();
    let region = client.create(name, mode, uid, gid)?;
    match client.size(region.id, start, len) {
        Ok(region) => Ok(region),
        Err(e) => {
            client.unlink(name, Some(region.id))?;
            Err(e.into())
        }
    }
}

/// Removes a name; the region ends with its last attachment.
///
/// # Errors
/// [`AdminError::Failed`].
pub fn remove(client: &Client, name: &[u8]) -> Result<(), AdminError> {
    Ok(client.unlink(name, None)?)
}

/// A region whose contents are read or written. It is attached meanwhile, so
/// that its memory is not given to another if its name is removed.
struct Pinned<'a> {
    client: &'a Client,
    region: Region,
    /// Not attached by the caller for purposes of its own.
    detach: bool,
}

impl<'a> Pinned<'a> {
    /// Attaches `name`, if `len` bytes at `offset` lie in it.
    fn new(client: &'a Client, name: &[u8], offset: u64, len: u64) -> Result<Self, AdminError> {
        let region = client.lookup(name)?;
        let (region, detach) = match client.attach(region.id) {
            Ok(region) => (region, true),
            Err(e) if is(&e, Errno::ALREADY) => (region, false),
            Err(e) => return Err(e.into()),
        };
        let pinned = Self {
            client,
            region,
            detach,
        };
        let size = pinned.region.len;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(AdminError::Range {
                name: show(name),
                size,
                offset,
                len,
            });
        }
        Ok(pinned)
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if self.detach
            && let Err(e) = self.client.detach(self.region.id)
        {
            // The end of the connection detaches too.
            log::debug!("cannot detach region {}: {e}", self.region.id);
        }
    }
}

/// Writes all of `input` into a region from `offset` on, whatever protection
/// its pages have, and returns the number of bytes.
///
/// # Errors
/// [`AdminError`]; what was written before stays.
pub fn fill(
    client: &Client,
    name: &[u8],
    offset: u64,
    input: &mut impl Read,
) -> Result<u64, AdminError> {
    let pinned = Pinned::new(client, name, offset, 0)?;
    let region = &pinned.region;
    let mut buffer = vec![0; CHUNK];
    let mut written = 0;
    loop {
        let got = match input.read(&mut buffer) {
            Ok(0) => return Ok(written),
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(AdminError::Io("read the input", e)),
        };
        let room = region.len - offset - written;
        let fits = usize::try_from(room).map_or(got, |room| room.min(got));
        let at = region.data_off + offset + written;
        write_at(client.files().data(), &buffer[..fits], at)
            .map_err(|e| AdminError::Io("write to the pool", e))?;
        written += fits as u64;
        if fits < got {
            return Err(AdminError::InputTooLong {
                name: show(name),
                written,
            });
        }
    }
}

/// Copies `len` bytes of a region from `offset` on to `output`, whatever
/// protection the pages have. Holes read as zero and are not filled.
///
/// # Errors
/// [`AdminError`].
pub fn read(
    client: &Client,
    name: &[u8],
    offset: u64,
    len: u64,
    output: &mut impl Write,
) -> Result<(), AdminError> {
    let pinned = Pinned::new(client, name, offset, len)?;
    let region = &pinned.region;
    let data = client.files().data();
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    while done < len {
        let want = usize::try_from(len - done).map_or(CHUNK, |left| left.min(CHUNK));
        let at = region.data_off + offset + done;
        let got = match rustix::io::pread(data.as_fd(), &mut buffer[..want], at) {
            Ok(0) => {
                return Err(AdminError::Io(
                    "read the pool",
                    io::ErrorKind::UnexpectedEof.into(),
                ));
            }
            Ok(got) => got,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(AdminError::Io("read the pool", e.into())),
        };
        output
            .write_all(&buffer[..got])
            .map_err(|e| AdminError::Io("write the output", e))?;
        done += got as u64;
    }
    output
        .flush()
        .map_err(|e| AdminError::Io("write the output", e))
}

fn write_at(fd: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(fd, bytes, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = &bytes[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
