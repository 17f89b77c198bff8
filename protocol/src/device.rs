//! The virtio-mshare device: what a guest's driver and the VMM exchange.
//!
//! All integers are little-endian and every structure is free of padding, so
//! the layout is the same for every compiler. The transport is virtio-mmio
//! (virtio 1.2, section 4.2). The window is shared-memory region
//! [`VIRTIO_MSHARE_SHM_ID`] (section 2.10) and is repeated in the
//! configuration space.
//!
//! ```text
//! window_gpa                                                    (1 GiB aligned)
//! |<-- table area: table_len -->|  hole  |<----- data area: data_len ----->|
//! |                                      ^ window_gpa + data_off
//! region k: tables at link_gpa (PMD pages first), data at data_gpa
//! ```
//!
//! Requests go through queue [`VIRTIO_MSHARE_VQ_CTRL`]: one descriptor chain
//! holds a device-readable [`virtio_mshare_req`] and a device-writable
//! [`virtio_mshare_resp`] (for [`VIRTIO_MSHARE_T_LIST`]: a
//! [`virtio_mshare_list`]). A request is answered in the order it was made.
//! The driver keeps queue [`VIRTIO_MSHARE_VQ_EVENT`] filled with
//! device-writable [`virtio_mshare_event`] buffers and answers an event that
//! asks for it with a [`virtio_mshare_ack`] in queue
//! [`VIRTIO_MSHARE_VQ_ACK`]; the device never waits for one queue while it
//! serves another.
//!
//! **Trust.** A guest that was offered [`VIRTIO_MSHARE_F_TABLES`] can write
//! the live tables of every region it is attached to. All such guests of one
//! pool are one trust domain.

#![allow(non_camel_case_types)]

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Virtio device id (private: outside the ids that virtio has assigned).
pub const VIRTIO_ID_MSHARE: u32 = 63;

/// Feature bit: regions are attached by linking shared tables.
pub const VIRTIO_MSHARE_F_TABLES: u32 = 0;
/// Feature bit: the host forces every shootdown of shared tables by itself;
/// the driver need not flush on the device's behalf.
pub const VIRTIO_MSHARE_F_FORCED: u32 = 1;
/// Feature bit: this guest may create, protect, discard and unlink regions
/// and write their data.
pub const VIRTIO_MSHARE_F_WRITE: u32 = 2;
/// Feature bit: PMD entries may map 2 MiB, and are zero while the host writes
/// their page again: an access then is to be tried again. A driver that does
/// not accept it cannot attach regions.
pub const VIRTIO_MSHARE_F_HUGE: u32 = 3;

/// Shared-memory region id of the window.
pub const VIRTIO_MSHARE_SHM_ID: u32 = 0;

/// Queue of requests.
pub const VIRTIO_MSHARE_VQ_CTRL: u32 = 0;
/// Queue of events.
pub const VIRTIO_MSHARE_VQ_EVENT: u32 = 1;
/// Queue of acknowledgments.
pub const VIRTIO_MSHARE_VQ_ACK: u32 = 2;
/// Number of queues.
pub const VIRTIO_MSHARE_VQ_MAX: u32 = 3;

/// Longest name of a region in bytes (`NAME_MAX`).
pub const VIRTIO_MSHARE_NAME_MAX: usize = 255;
/// Bytes of the name field.
pub const VIRTIO_MSHARE_NAME_LEN: usize = 256;

/// Find the region called `name`.
pub const VIRTIO_MSHARE_T_LOOKUP: u32 = 1;
/// Create an unsized region: `name`, `mode`, `uid`, `gid`.
pub const VIRTIO_MSHARE_T_CREATE: u32 = 2;
/// Give region `id` its address `addr` and length `len`, both in bytes. The
/// first call wins; an equal later one succeeds, a different one is EINVAL.
pub const VIRTIO_MSHARE_T_SIZE: u32 = 3;
/// Attach region `id`: afterwards its tables and data are backed by memory.
pub const VIRTIO_MSHARE_T_ATTACH: u32 = 4;
/// Detach region `id`: the driver holds no mapping of it any more.
pub const VIRTIO_MSHARE_T_DETACH: u32 = 5;
/// Set the protection of `len` bytes at byte offset `addr` to `prot`.
pub const VIRTIO_MSHARE_T_PROTECT: u32 = 6;
/// Free the memory of `len` bytes at byte offset `addr`; they read as zero.
pub const VIRTIO_MSHARE_T_DISCARD: u32 = 7;
/// Remove `name` if it is region `id`.
pub const VIRTIO_MSHARE_T_UNLINK: u32 = 8;
/// Report on region `id`.
pub const VIRTIO_MSHARE_T_STAT: u32 = 9;
/// List the regions whose id is at least `id`, in order of id.
pub const VIRTIO_MSHARE_T_LIST: u32 = 10;

/// Request flag: fail with EEXIST if the name exists.
pub const VIRTIO_MSHARE_REQ_EXCL: u32 = 1 << 0;

/// Region flag: the region has an address and a length.
pub const VIRTIO_MSHARE_R_SIZED: u32 = 1 << 0;
/// Region flag: attached by linking shared tables (else private tables).
pub const VIRTIO_MSHARE_R_TABLES: u32 = 1 << 1;
/// Region flag: this guest may only read it.
pub const VIRTIO_MSHARE_R_RDONLY: u32 = 1 << 2;
/// Region flag: the name is gone; the region ends with its last attachment.
pub const VIRTIO_MSHARE_R_UNLINKED: u32 = 1 << 3;

/// Protection bit of [`virtio_mshare_req::prot`]: reads (`PROT_READ`).
pub const VIRTIO_MSHARE_PROT_READ: u32 = 1 << 0;
/// Protection bit of [`virtio_mshare_req::prot`]: writes (`PROT_WRITE`).
pub const VIRTIO_MSHARE_PROT_WRITE: u32 = 1 << 1;

/// Event: entries of a range have changed. A driver with private tables drops
/// what it derived from them and acknowledges.
pub const VIRTIO_MSHARE_E_INVALIDATE: u32 = 1;
/// Event: the region was taken away from this guest; accesses must fail.
pub const VIRTIO_MSHARE_E_REVOKED: u32 = 2;

/// Regions in one answer to [`VIRTIO_MSHARE_T_LIST`].
pub const VIRTIO_MSHARE_LIST_MAX: usize = 8;

/// Configuration space. All fields are read-only for the driver.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_config {
    /// Guest-physical address of the window, 1 GiB aligned.
    pub window_gpa: U64,
    /// Bytes of the window.
    pub window_len: U64,
    /// Bytes of the table area at the start of the window, 2 MiB multiple.
    pub table_len: U64,
    /// Offset of the data area inside the window, 1 GiB aligned.
    pub data_off: U64,
    /// Bytes of the data area.
    pub data_len: U64,
    /// Identity of the pool: the same in every guest that shares it.
    pub pool_uuid: [u8; 16],
}

/// A request. Fields that a type does not name must be zero.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_req {
    /// `VIRTIO_MSHARE_T_*`.
    pub r#type: U32,
    /// `VIRTIO_MSHARE_REQ_*`.
    pub flags: U32,
    /// Region id.
    pub id: U64,
    /// Address (SIZE) or byte offset in the region (PROTECT, DISCARD).
    pub addr: U64,
    /// Length in bytes.
    pub len: U64,
    /// Permission bits of a new region.
    pub mode: U32,
    /// Owner of a new region.
    pub uid: U32,
    /// Group of a new region.
    pub gid: U32,
    /// `VIRTIO_MSHARE_PROT_*`.
    pub prot: U32,
    /// Bytes of `name` in use.
    pub name_len: U32,
    /// Zero.
    pub reserved: U32,
    /// The name, without a terminating NUL.
    pub name: [u8; VIRTIO_MSHARE_NAME_LEN],
}

/// A region as the host describes it.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_region {
    /// Region id, unique for the life of the pool, never zero.
    pub id: U64,
    /// Virtual address in every attached process, 1 GiB aligned.
    pub start: U64,
    /// Length in bytes, 2 MiB multiple; zero while unsized.
    pub len: U64,
    /// Guest-physical address of the first PMD page; the page for GiB `i` of
    /// the region follows `i` pages later. They never change.
    pub link_gpa: U64,
    /// Guest-physical address of the region's first data page.
    pub data_gpa: U64,
    /// Bytes of memory the region's data occupies.
    pub resident: U64,
    /// Bytes of memory the region's tables occupy, once for all guests.
    pub table_bytes: U64,
    /// `VIRTIO_MSHARE_R_*`.
    pub flags: U32,
    /// Permission bits.
    pub mode: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Guests attached, the asking one included if it is.
    pub attached: U32,
    /// Zero.
    pub reserved: U32,
}

/// The answer to a request.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_resp {
    /// Zero or a positive Linux errno.
    pub status: U32,
    /// Zero.
    pub reserved: U32,
    /// The region the request was about, if it succeeded.
    pub region: virtio_mshare_region,
}

/// One line of the pool's directory.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_dirent {
    /// Region id.
    pub id: U64,
    /// Bytes of `name` in use.
    pub name_len: U32,
    /// Zero.
    pub reserved: U32,
    /// The name, without a terminating NUL.
    pub name: [u8; VIRTIO_MSHARE_NAME_LEN],
}

/// The answer to [`VIRTIO_MSHARE_T_LIST`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_list {
    /// Zero or a positive Linux errno.
    pub status: U32,
    /// Entries in use; fewer than the maximum means that the list has ended.
    pub count: U32,
    /// The entries.
    pub entry: [virtio_mshare_dirent; VIRTIO_MSHARE_LIST_MAX],
}

/// Something the driver is told.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_event {
    /// `VIRTIO_MSHARE_E_*`.
    pub r#type: U32,
    /// Zero.
    pub reserved: U32,
    /// Region id.
    pub id: U64,
    /// Byte offset in the region.
    pub offset: U64,
    /// Length in bytes.
    pub len: U64,
    /// To be returned in the acknowledgment; zero asks for none.
    pub seq: U64,
}

/// The driver has done what an event asked for.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct virtio_mshare_ack {
    /// The event's sequence number.
    pub seq: U64,
}
