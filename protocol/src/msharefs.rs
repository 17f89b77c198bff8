//! What programs see of regions: system calls and the ioctls of a region's file
//! in msharefs. The kernel's own definition is `include/uapi/linux/mshare.h` of
//! the series; a test compiles that header and compares it with this module.

#![allow(
    non_camel_case_types,
    reason = "the structures have the kernel's names"
)]

/// Number of `mshare(2)` on x86-64 (`syscall_64.tbl` of the series).
pub const SYS_MSHARE: i64 = 548;
/// Number of `mshare_unlink(2)` on x86-64.
pub const SYS_MSHARE_UNLINK: i64 = 549;

/// The region has an address and a length.
pub const MSHARE_INFO_SIZED: u32 = 1 << 0;
/// Page tables are shared.
pub const MSHARE_INFO_TABLES: u32 = 1 << 1;
/// This system may only read.
pub const MSHARE_INFO_RDONLY: u32 = 1 << 2;
/// The name is gone.
pub const MSHARE_INFO_UNLINKED: u32 = 1 << 3;
/// Shared with other machines.
pub const MSHARE_INFO_POOL: u32 = 1 << 4;

/// Set the protection of a range for everybody.
pub const MSHARE_IOC_PROTECT: u32 = ioctl_number(WRITE, 0x50, size_of::<mshare_protect>());
/// Free the memory of a range.
pub const MSHARE_IOC_DISCARD: u32 = ioctl_number(WRITE, 0x51, size_of::<mshare_discard>());
/// Tell what is known about a region.
pub const MSHARE_IOC_INFO: u32 = ioctl_number(READ, 0x52, size_of::<mshare_info>());

// Directions of asm-generic/ioctl.h.
const WRITE: u32 = 1;
const READ: u32 = 2;

/// `_IOC` of `asm-generic/ioctl.h` with type 'm'.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the structures are a few words long"
)]
const fn ioctl_number(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'm' as u32) << 8 | number
}

/// Argument of [`MSHARE_IOC_PROTECT`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct mshare_protect {
    /// First byte, counted from the start of the region: a multiple of 4 KiB.
    pub offset: u64,
    /// Length in bytes: a multiple of 4 KiB.
    pub len: u64,
    /// `PROT_NONE`, `PROT_READ` or `PROT_READ | PROT_WRITE`.
    pub prot: u32,
    /// Zero.
    pub flags: u32,
}

/// Argument of [`MSHARE_IOC_DISCARD`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct mshare_discard {
    /// First byte, counted from the start of the region: a multiple of 4 KiB.
    pub offset: u64,
    /// Length in bytes: a multiple of 4 KiB.
    pub len: u64,
}

/// Result of [`MSHARE_IOC_INFO`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct mshare_info {
    /// Address, the same in every attached process; 0 while unsized.
    pub start: u64,
    /// Length in bytes; 0 while unsized.
    pub len: u64,
    /// Identity, unique among the regions of a pool.
    pub id: u64,
    /// Bytes of memory that the data occupies.
    pub resident: u64,
    /// Bytes of memory that the shared page tables occupy.
    pub table_bytes: u64,
    /// `MSHARE_INFO_*`.
    pub flags: u32,
    /// Mappings of the region in this system.
    pub mappings: u32,
    /// Machines attached to a pool region, this one included.
    pub machines: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes of swap space that the data occupies.
    pub swapped: u64,
    /// Bytes of `resident` that are in huge pages.
    pub huge: u64,
    /// Page faults of attached processes in the region.
    pub faults: u64,
}
