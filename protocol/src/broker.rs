//! Messages between a pool's broker and its clients.
//!
//! A client connects to the broker's unix socket and sends [`ToBroker::Hello`].
//! The broker answers with [`FromBroker::Welcome`], whose first byte carries
//! the pool's file descriptors (`SCM_RIGHTS`): data, tables, directory, in this
//! order. Then the client sends requests, each with a tag of its choice that
//! the answer repeats; answers to one client come in the order of its
//! requests. The broker may send [`FromBroker::Invalidate`] at any time.
//!
//! A client that has lost its broker connects again and says so in
//! [`Hello::resume`], sending the three descriptors with the message: a broker
//! that was started to recover takes the pool over from them. To the welcome it
//! answers [`ToBroker::Resumed`].
//!
//! The end of a connection detaches whatever that client had attached. When the
//! broker dies, a client holds what it has attached until it has resumed or
//! closed its descriptor of the directory, so it keeps that one for as long as
//! it has memory of the pool mapped.

use serde::{Deserialize, Serialize};

use crate::entry::Prot;

/// Version of these messages; both sides must have the same.
pub const VERSION: u32 = 3;

/// Where a pool lies in guest-physical memory, and how it is cut. All lengths
/// and offsets are in bytes. See `device` for the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Guest-physical address of the window, 1 GiB aligned.
    pub window_gpa: u64,
    /// Length of the table area, which starts the window; 2 MiB multiple.
    pub table_len: u64,
    /// Offset of the data area in the window; 1 GiB multiple.
    pub data_off: u64,
    /// Length of the data area; 2 MiB multiple.
    pub data_len: u64,
    /// Whether PMD entries may be leaves of 2 MiB.
    pub huge_pages: bool,
}

impl Geometry {
    /// Length of the window.
    #[must_use]
    pub const fn window_len(&self) -> u64 {
        self.data_off + self.data_len
    }
}

/// What a guest may do with the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Link the shared tables, read and write.
    #[default]
    Rw,
    /// Link the shared tables, read only.
    Ro,
    /// Own tables, read and write: for a guest outside the trust domain.
    Private,
    /// Own tables, read only, held by a read-only memslot.
    PrivateRo,
}

impl Policy {
    /// Whether the guest may change data, protections and the directory.
    #[must_use]
    pub const fn writes(self) -> bool {
        matches!(self, Self::Rw | Self::Private)
    }

    /// Whether the guest links the shared tables.
    #[must_use]
    pub const fn tables(self) -> bool {
        matches!(self, Self::Rw | Self::Ro)
    }
}

/// Who is calling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// A VMM with one guest.
    Guest {
        /// Name for people to read.
        name: String,
        /// What the guest may do; the VMM holds it to that.
        policy: Policy,
    },
    /// `vmm pool`. While it has a region attached, the region's memory is not
    /// given to another.
    Admin,
}

/// The first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// Who is calling.
    pub role: Role,
    /// Present on a second connection to a pool.
    pub resume: Option<Resume>,
}

/// What a client still holds of a pool whose broker died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The pool's identity.
    pub uuid: [u8; 16],
    /// Ids of the regions it is attached to. If one is gone, the answer is
    /// [`FromBroker::Refused`] with ESTALE.
    pub attached: Vec<u64>,
    /// Ids of the unsized regions it created; those that are gone are ignored.
    pub created: Vec<u64>,
}

/// Client to broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBroker {
    /// The first message.
    Hello(Hello),
    /// A request.
    Request {
        /// Repeated in the answer.
        tag: u64,
        /// What is asked.
        request: Request,
    },
    /// The client has taken the welcome to its resume. From now on the end of
    /// the connection is the end of its attachments; before, it may come again.
    Resumed,
    /// The client's guest holds no translation from before the event.
    Ack {
        /// Of the event.
        seq: u64,
    },
}

/// Broker to client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromBroker {
    /// Answer to [`ToBroker::Hello`].
    Welcome(Geometry),
    /// Answer to a hello that cannot be served, or, later, notice that the
    /// broker gives the client up; the connection ends. A client that is given
    /// up unmaps what it had attached before it closes its end: only then is
    /// the memory used for something else.
    Refused(Failure),
    /// Answer to a request.
    Reply {
        /// Of the request.
        tag: u64,
        /// What came of it.
        result: Result<Reply, Failure>,
    },
    /// Rights in a range were taken away: drop translations that a guest with
    /// private tables derived from them, then send [`ToBroker::Ack`].
    Invalidate {
        /// Region.
        id: u64,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// To be acknowledged.
        seq: u64,
    },
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Find a region by name.
    Lookup {
        /// Its name.
        name: Vec<u8>,
    },
    /// Create an unsized region. If the name exists: EEXIST.
    Create {
        /// 1 to 255 bytes, no `/`, no NUL, neither `.` nor `..`.
        name: Vec<u8>,
        /// Permission bits, at most 0o777.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// Give a region its address and length and build its tables.
    Size {
        /// Region.
        id: u64,
        /// Virtual address, 1 GiB aligned.
        start: u64,
        /// Bytes, 2 MiB multiple.
        len: u64,
    },
    /// Attach (once per region).
    Attach {
        /// Region.
        id: u64,
    },
    /// Detach.
    Detach {
        /// Region.
        id: u64,
    },
    /// Change what everybody may do with a range. A guest must have the region
    /// attached, else ENOTCONN; so for DISCARD. After [`Reply::Done`] no CPU
    /// of any guest uses a right that was taken away. ETIMEDOUT: nobody gets
    /// the right anew, but guests with private tables that have neither
    /// acknowledged nor ended, or not resumed, may still use it.
    Protect {
        /// Region.
        id: u64,
        /// Byte offset, page multiple.
        offset: u64,
        /// Bytes, page multiple, not zero.
        len: u64,
        /// New protection.
        prot: Prot,
    },
    /// Free the memory of a range; it reads as zero afterwards.
    Discard {
        /// Region.
        id: u64,
        /// Byte offset, page multiple.
        offset: u64,
        /// Bytes, page multiple, not zero.
        len: u64,
    },
    /// Remove a name. With an id: only if it is that region's.
    Unlink {
        /// The name.
        name: Vec<u8>,
        /// The region it must be, if given.
        id: Option<u64>,
    },
    /// Report on a region.
    Stat {
        /// Region.
        id: u64,
    },
    /// List the named regions with `id >= from`, in order of id. The answer
    /// may hold fewer than there are; the list has ended when it is empty.
    List {
        /// First id.
        from: u64,
        /// Most regions in the answer; not zero.
        max: u32,
    },
    /// Report on the whole pool.
    PoolStat,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The region the request was about (LOOKUP, CREATE, SIZE, ATTACH, STAT).
    Region(Region),
    /// The directory.
    List(Vec<Region>),
    /// The pool.
    Pool(PoolStat),
    /// Nothing to say.
    Done,
}

/// A region of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Unique for the life of the pool, never zero.
    pub id: u64,
    /// Name; empty once unlinked.
    pub name: Vec<u8>,
    /// Virtual address; zero while unsized.
    pub start: u64,
    /// Bytes; zero while unsized.
    pub len: u64,
    /// Byte offset of the region's tables in the tables file.
    pub table_off: u64,
    /// Bytes of the region's range in the tables file.
    pub table_len: u64,
    /// Byte offset of the region's data in the data file.
    pub data_off: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of memory that the data occupies. Only STAT counts it (it takes
    /// time in proportion to the memory); in other answers it is zero.
    pub resident: u64,
    /// Bytes of memory that the tables occupy.
    pub table_bytes: u64,
    /// Names of the attached guests.
    pub attached: Vec<String>,
}

/// The pool as a whole; all amounts in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStat {
    /// Where it lies.
    pub geometry: Geometry,
    /// Data area not given to any region.
    pub data_free: u64,
    /// Longest run of it.
    pub data_free_run: u64,
    /// Memory that all data occupies.
    pub resident: u64,
    /// Memory that all tables occupy.
    pub table_bytes: u64,
    /// Regions, unlinked ones included.
    pub regions: u64,
    /// Names of the connected guests.
    pub guests: Vec<String>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Linux errno that the guest's system call returns.
    pub errno: i32,
    /// What was wrong and what would be right.
    pub message: String,
}
