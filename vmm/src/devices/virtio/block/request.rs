//! One request to a disk (virtio 1.2, section 5.2.6).

use std::io::{self, Read, Write};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{Reader, Writer};
use vm_memory::GuestMemoryMmap;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::SECTOR;
use super::disk::{Disk, ID_LEN};
use crate::devices::complaints::Complaints;
use crate::devices::virtio::Chain;

/// Data is moved between the disk and guest memory in pieces of this size.
const PIECE: usize = 1 << 16;
/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 32;
/// Sectors of one range: 64 MiB, so that a host that has to write the zeros
/// does not hold the thread for long.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 17;

/// `struct virtio_blk_req`, up to the data.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Range {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the buffers are too short or not in guest memory")]
    Buffer(#[source] io::Error),
    #[error("{len} bytes at sector {sector} are not whole sectors of the disk")]
    Range { sector: u64, len: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("request type {0} or its flags are not supported")]
    Unsupported(u32),
    #[error("the host's file failed")]
    Host(#[source] io::Error),
}

impl Error {
    fn status(&self) -> u32 {
        match self {
            Self::Unsupported(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}

/// Serves requests to one disk.
#[derive(Debug)]
pub(super) struct Server {
    /// Writes are durable at once, for a driver that does not know flushes.
    write_through: bool,
    piece: Box<[u8]>,
}

impl Server {
    pub(super) fn new(write_through: bool) -> Self {
        Self {
            write_through,
            piece: vec![0; PIECE].into_boxed_slice(),
        }
    }

    /// Serves the request in `chain` and writes its status; returns the number
    /// of bytes written. A chain that has no place for a status gets none.
    pub(super) fn serve(
        &mut self,
        disk: &Disk,
        mem: &GuestMemoryMmap,
        chain: Chain<'_>,
        complaints: &Complaints,
    ) -> u32 {
        let (Ok(mut reader), Ok(mut data)) = (chain.clone().reader(mem), chain.writer(mem)) else {
            return 0;
        };
        // The status is the last byte, wherever the driver's buffers end.
        let Some(data_len) = data.available_bytes().checked_sub(1) else {
            return 0;
        };
        let Ok(mut status) = data.split_at(data_len) else {
            return 0;
        };
        let result = self.execute(disk, &mut reader, &mut data);
        let code = match &result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(error) => error.status(),
        };
        match &result {
            Err(Error::Host(error)) => {
                complaints.warn(format_args!("block: the host's file failed: {error}"));
            }
            Err(error) => log::debug!("block: a request failed: {error}"),
            Ok(()) => {}
        }
        if status.write_all(&code.to_le_bytes()[..1]).is_err() {
            return 0;
        }
        u32::try_from(data.bytes_written() + 1).unwrap_or(u32::MAX)
    }

    fn execute(
        &mut self,
        disk: &Disk,
        reader: &mut Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Error> {
        let mut header = Header::new_zeroed();
        reader
            .read_exact(header.as_mut_bytes())
            .map_err(Error::Buffer)?;
        let sector = header.sector.get();
        match header.kind.get() {
            VIRTIO_BLK_T_IN => self.read(disk, sector, writer),
            VIRTIO_BLK_T_OUT => self.write(disk, sector, reader),
            VIRTIO_BLK_T_FLUSH => disk.flush().map_err(Error::Host),
            VIRTIO_BLK_T_GET_ID => {
                let len = writer.available_bytes().min(ID_LEN);
                writer.write_all(&disk.id()[..len]).map_err(Error::Buffer)
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                clear_ranges(disk, kind, reader)
            }
            kind => Err(Error::Unsupported(kind)),
        }
    }

    fn read(&mut self, disk: &Disk, sector: u64, writer: &mut Writer<'_>) -> Result<(), Error> {
        let mut left = writer.available_bytes();
        let mut offset = place(disk, sector, left as u64)?;
        while left > 0 {
            let piece = &mut self.piece[..left.min(PIECE)];
            disk.read(piece, offset).map_err(Error::Host)?;
            writer.write_all(piece).map_err(Error::Buffer)?;
            left -= piece.len();
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn write(&mut self, disk: &Disk, sector: u64, reader: &mut Reader<'_>) -> Result<(), Error> {
        if disk.is_read_only() {
            return Err(Error::ReadOnly);
        }
        let mut left = reader.available_bytes();
        let mut offset = place(disk, sector, left as u64)?;
        while left > 0 {
            let piece = &mut self.piece[..left.min(PIECE)];
            reader.read_exact(piece).map_err(Error::Buffer)?;
            disk.write(piece, offset).map_err(Error::Host)?;
            left -= piece.len();
            offset += piece.len() as u64;
        }
        if self.write_through {
            disk.flush().map_err(Error::Host)?;
        }
        Ok(())
    }
}

/// The byte offset of `len` bytes from `sector`, which must be on the disk.
fn place(disk: &Disk, sector: u64, len: u64) -> Result<u64, Error> {
    disk.offset(sector, len).ok_or(Error::Range { sector, len })
}

/// Serves a discard or write-zeroes request, which lists ranges.
fn clear_ranges(disk: &Disk, kind: u32, reader: &mut Reader<'_>) -> Result<(), Error> {
    if disk.is_read_only() {
        return Err(Error::ReadOnly);
    }
    let list_len = reader.available_bytes();
    let count = list_len / size_of::<Range>();
    if !list_len.is_multiple_of(size_of::<Range>())
        || count == 0
        || u32::try_from(count).map_or(true, |count| count > MAX_RANGES)
    {
        return Err(Error::Range {
            sector: 0,
            len: list_len as u64,
        });
    }
    for _ in 0..count {
        let mut range = Range::new_zeroed();
        reader
            .read_exact(range.as_mut_bytes())
            .map_err(Error::Buffer)?;
        let (sector, sectors, flags) = (range.sector.get(), range.sectors.get(), range.flags.get());
        let len = u64::from(sectors) * SECTOR;
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let known = if kind == VIRTIO_BLK_T_DISCARD {
            0
        } else {
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        };
        if flags & !known != 0 {
            return Err(Error::Unsupported(kind));
        }
        let offset = place(disk, sector, len)?;
        if sectors == 0 || sectors > MAX_RANGE_SECTORS {
            return Err(Error::Range { sector, len });
        }
        if kind == VIRTIO_BLK_T_DISCARD {
            disk.discard(offset, len).map_err(Error::Host)?;
        } else {
            disk.write_zeroes(offset, len, unmap).map_err(Error::Host)?;
        }
    }
    Ok(())
}
