//! Packet header (virtio 1.2, section 5.10.6).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BUF_ALLOC, HOST_CID};

/// Ask for a connection.
pub(super) const OP_REQUEST: u16 = 1;
/// Accept a connection.
pub(super) const OP_RESPONSE: u16 = 2;
/// Refuse, abort or forget a connection.
pub(super) const OP_RST: u16 = 3;
/// Announce that no more will be sent or received.
pub(super) const OP_SHUTDOWN: u16 = 4;
/// Data.
pub(super) const OP_RW: u16 = 5;
/// Tell the sender's buffer state; no other effect.
pub(super) const OP_CREDIT_UPDATE: u16 = 6;
/// Ask for a credit update.
pub(super) const OP_CREDIT_REQUEST: u16 = 7;

/// Of SHUTDOWN: the sender will not receive any more.
pub(super) const SHUTDOWN_RCV: u32 = 1;
/// Of SHUTDOWN: the sender will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Of SHUTDOWN: the connection is over.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// Type of stream sockets, the only one here.
pub(super) const TYPE_STREAM: u16 = 1;

/// `struct virtio_vsock_hdr`.
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
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    /// Bytes of payload.
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    /// Size of the sender's receive buffer.
    pub(super) buf_alloc: U32,
    /// Bytes the sender has taken out of its receive buffer so far.
    pub(super) fwd_cnt: U32,
}

/// Bytes of a [`Header`].
pub(super) const HEADER_LEN: usize = size_of::<Header>();

impl Header {
    /// The RST that answers this packet, whatever it was.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: U16::new(OP_RST),
            ..Self::default()
        }
    }
}

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

impl Key {
    /// The connection a packet from the guest belongs to.
    pub(super) fn of(header: &Header) -> Self {
        Self {
            host_port: header.dst_port.get(),
            guest_port: header.src_port.get(),
        }
    }

    /// A packet of this connection to the guest `guest_cid`.
    pub(super) fn header(self, guest_cid: u64, op: u16) -> Header {
        Header {
            src_cid: U64::new(HOST_CID),
            dst_cid: U64::new(guest_cid),
            src_port: U32::new(self.host_port),
            dst_port: U32::new(self.guest_port),
            kind: U16::new(TYPE_STREAM),
            op: U16::new(op),
            buf_alloc: U32::new(BUF_ALLOC),
            ..Header::default()
        }
    }
}
