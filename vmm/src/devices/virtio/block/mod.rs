//! A disk (virtio 1.2, section 5.2): a raw file or block device of the host.
//!
//! Requests are served in order on the `devices` thread. What goes wrong with
//! one (a range past the end, a write to a read-only disk, an error of the
//! host) is reported in its status byte.
//!
//! A disk that may be written is locked against every other VMM, a read-only
//! one against writers (flock, so only among programs that ask).

mod device;
mod disk;
mod handler;
mod request;
#[cfg(test)]
mod tests;

pub use device::Block;
pub use disk::{Disk, Error};

/// Bytes in a sector, whatever the disk's own block size (section 5.2.4).
pub const SECTOR: u64 = 512;
