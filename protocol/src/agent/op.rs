//! What the processes of a group are asked to do.

use serde::{Deserialize, Serialize};

/// What a process maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Map {
    /// `mshare(name, addr, len, oflag, mode)`.
    Mshare {
        /// Name of the region, `pool/NAME` or `NAME`.
        name: String,
        /// Address; 0 on attach: the region's own.
        addr: u64,
        /// Bytes; 0 on attach: all of it.
        len: u64,
        /// `O_*` flags.
        oflag: i32,
        /// Permission bits of a new region.
        mode: u32,
    },
    /// `mmap(MAP_SHARED)` of a file: what mshare is compared with.
    File {
        /// Path; created if it does not exist.
        path: String,
        /// Address; 0: any.
        addr: u64,
        /// Bytes; the file is extended to hold them.
        len: u64,
        /// Whether to map it for writing.
        write: bool,
    },
    /// `mmap(MAP_PRIVATE | MAP_ANONYMOUS)`.
    Anonymous {
        /// Address; 0: any.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

/// What one process of a group does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Map into a free slot: [`Value::Mapped`].
    Map {
        /// Slot.
        slot: u32,
        /// What.
        map: Map,
    },
    /// Unmap a slot and free it: [`Value::Done`].
    Unmap {
        /// Slot.
        slot: u32,
    },
    /// Access memory of a slot.
    Mem {
        /// Slot.
        slot: u32,
        /// Byte offset of the first access.
        offset: u64,
        /// What.
        mem: MemOp,
    },
    /// Report on the spinner and let it run on: [`Value::Spin`].
    SpinStatus,
    /// Stop the spinner: [`Value::Spin`].
    SpinStop,
    /// Something done to a region by name.
    Region(RegionOp),
    /// Open a region's file and keep it open, in the place of one that was
    /// kept before: [`Value::Done`].
    Keep {
        /// Region.
        name: String,
        /// `O_*` flags.
        oflag: i32,
    },
    /// What a [`RegionOp`] does to a file, done to the one that is kept.
    Kept(RegionOp),
    /// Create or attach a region and unlink it again, many times:
    /// [`Value::Churned`].
    Churn {
        /// Region.
        name: String,
        /// Address.
        addr: u64,
        /// Bytes.
        len: u64,
        /// How often.
        rounds: u32,
    },
    /// A system call of the mshare family made wrongly: [`Value::Ret`].
    BadCall(BadCall),
    /// An operation on a path: [`Value::Ret`], or [`Value::Stat`].
    Path {
        /// Path.
        path: String,
        /// What.
        op: PathOp,
    },
    /// Become another user, without supplementary groups: [`Value::Done`].
    SetUser {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// `mlockall(MCL_FUTURE)`, with so many bytes as the limit of locked memory:
    /// [`Value::Done`].
    LockFuture {
        /// RLIMIT_MEMLOCK.
        limit: u64,
    },
    /// Sleep, to keep a process busy: [`Value::Done`].
    Sleep {
        /// Milliseconds.
        ms: u32,
    },
}

/// Accesses to memory. A `len` of zero means up to the end of the slot.
/// A fault ends the operation with [`OpError::Fault`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemOp {
    /// One access every `stride` bytes: [`Value::Touched`]. Writing keeps the
    /// contents (an atomic or with zero).
    Touch {
        /// Bytes.
        len: u64,
        /// Bytes between accesses; at least 8.
        stride: u64,
        /// Write too.
        write: bool,
    },
    /// Write the pattern of `seed`: [`Value::Done`]. A word of the pattern
    /// depends on its offset in the slot and on the seed only.
    Fill {
        /// Bytes, multiple of 8.
        len: u64,
        /// Seed.
        seed: u64,
    },
    /// Compare with the pattern of `seed`: [`Value::Verified`].
    Verify {
        /// Bytes, multiple of 8.
        len: u64,
        /// Seed.
        seed: u64,
    },
    /// Compare with zero: [`Value::Verified`].
    VerifyZero {
        /// Bytes, multiple of 8.
        len: u64,
    },
    /// Read the 8 bytes there: [`Value::Word`].
    Load,
    /// Write 8 bytes: [`Value::Done`].
    Store {
        /// The word.
        value: u64,
    },
    /// See whether an access succeeds: [`Value::Access`]. Contents are kept.
    Try {
        /// Write too.
        write: bool,
    },
    /// Access the word there in a loop, in the background, until a fault or
    /// [`Op::SpinStop`]: [`Value::Done`].
    Spin(SpinKind),
    /// Make a system call on the memory there: [`Value::Probe`].
    Probe(Probe),
}

/// What a spinner does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpinKind {
    /// Read.
    Read,
    /// Write the number of the iteration.
    Write,
}

/// System calls on mapped memory, most of which mshare refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probe {
    /// `read` with O_DIRECT from this file into the memory.
    ODirectRead {
        /// File or block device.
        path: String,
        /// Bytes.
        len: u32,
    },
    /// Buffered `pread` from this file into the memory.
    Pread {
        /// File.
        path: String,
        /// Bytes.
        len: u32,
    },
    /// Buffered `pwrite` from the memory to this file.
    Pwrite {
        /// File.
        path: String,
        /// Bytes.
        len: u32,
    },
    /// `process_vm_readv` of this process's own memory.
    VmRead {
        /// Bytes.
        len: u32,
    },
    /// `process_vm_writev` to this process's own memory.
    VmWrite {
        /// Bytes.
        len: u32,
    },
    /// `futex(FUTEX_WAKE)`.
    FutexWake {
        /// FUTEX_PRIVATE_FLAG.
        private: bool,
    },
    /// `futex(FUTEX_WAIT)` with the word's present value and a 10 ms timeout.
    FutexWait {
        /// FUTEX_PRIVATE_FLAG.
        private: bool,
    },
    /// `move_pages` query of one page; `extra` is its status.
    MovePages,
    /// `madvise`.
    Madvise {
        /// Bytes.
        len: u64,
        /// `MADV_*`.
        advice: i32,
    },
    /// `mprotect`.
    Mprotect {
        /// Bytes.
        len: u64,
        /// `PROT_*`.
        prot: i32,
    },
    /// `munmap`; the slot stays as it is. `extra` counts the accesses that a
    /// spinner of the process made in the millisecond after the call returned.
    Munmap {
        /// Bytes.
        len: u64,
    },
    /// Anonymous `mmap(MAP_FIXED)` over it.
    MmapFixed {
        /// Bytes.
        len: u64,
    },
    /// `mremap`; `ret` is the new address.
    Mremap {
        /// Old length.
        old_len: u64,
        /// New length.
        new_len: u64,
        /// `MREMAP_*`.
        flags: i32,
    },
    /// `mlock`.
    Mlock {
        /// Bytes.
        len: u64,
    },
    /// `mincore` of one page; `extra` is its byte.
    Mincore,
    /// `mbind` with MPOL_DEFAULT.
    Mbind {
        /// Bytes.
        len: u64,
    },
    /// `fork`; the child reads the word: `extra`. `ret` is its exit status
    /// (0), or 128 + the signal that killed it.
    ForkRead,
    /// `fork`; the child becomes another program by `execve`, which reads the
    /// word: as [`Probe::ForkRead`], without the word.
    ForkExec,
    /// `fork`; the child writes the word.
    ForkWrite {
        /// The word.
        value: u64,
    },
    /// `vmsplice` of the memory into a pipe.
    Vmsplice {
        /// Bytes.
        len: u32,
    },
    /// `KVM_SET_USER_MEMORY_REGION` with the memory, if there is /dev/kvm.
    KvmSlot {
        /// Bytes.
        len: u64,
    },
    /// `UFFDIO_REGISTER` of the memory.
    Userfault {
        /// Bytes.
        len: u64,
    },
}

/// Changes to a region by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegionOp {
    /// `mshare_unlink(name)`: [`Value::Ret`].
    Unlink {
        /// Region.
        name: String,
    },
    /// `MSHARE_IOC_PROTECT`: [`Value::Ret`].
    Protect {
        /// Region.
        name: String,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// `PROT_*`.
        prot: u32,
    },
    /// `MSHARE_IOC_DISCARD`: [`Value::Ret`].
    Discard {
        /// Region.
        name: String,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// `fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)`: [`Value::Ret`].
    Punch {
        /// Region.
        name: String,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// `MSHARE_IOC_INFO`: [`Value::RegionInfo`].
    Info {
        /// Region.
        name: String,
    },
    /// `mmap` of the region's file at its place, and `munmap`: [`Value::Ret`].
    Mmap {
        /// Region.
        name: String,
    },
    /// What `read` of the region's file says: [`Value::Mapped`].
    Extent {
        /// Region.
        name: String,
    },
}

/// Calls that must fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BadCall {
    /// `mshare` with a name pointer to nowhere.
    MshareName,
    /// `mshare_unlink` with a name pointer to nowhere.
    UnlinkName,
    /// `MSHARE_IOC_PROTECT` with an argument pointer to nowhere.
    ProtectArg {
        /// Region.
        name: String,
    },
    /// An ioctl on a region's file, opened with these flags.
    Ioctl {
        /// Region.
        name: String,
        /// `O_*` flags.
        oflag: i32,
        /// Number of the ioctl.
        request: u32,
        /// The words of its argument, at most 8.
        words: Vec<u64>,
    },
    /// `mmap(MAP_SHARED)` of a region's file at an address of one's choice.
    Mmap {
        /// Region.
        name: String,
        /// Address.
        addr: u64,
        /// Bytes.
        len: u64,
        /// `PROT_*`.
        prot: i32,
        /// `MAP_*`.
        flags: i32,
        /// Byte offset in the file.
        offset: u64,
    },
}

/// Operations on a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathOp {
    /// `open`, then `close`.
    Open {
        /// `O_*`.
        flags: i32,
        /// Permission bits.
        mode: u32,
    },
    /// `stat`: [`Value::Stat`].
    Stat,
    /// `unlink`.
    Unlink,
    /// `mkdir`.
    Mkdir,
    /// `rmdir`.
    Rmdir,
    /// `rename` to another path.
    Rename {
        /// New path.
        to: String,
    },
    /// `link` to another path.
    Link {
        /// New path.
        to: String,
    },
    /// `chmod`.
    Chmod {
        /// Permission bits.
        mode: u32,
    },
    /// `truncate`.
    Truncate {
        /// Bytes.
        len: u64,
    },
}

/// `O_RDWR`, for [`Map::Mshare`].
pub const O_RDWR: i32 = 2;
/// `O_CREAT`, for [`Map::Mshare`].
pub const O_CREAT: i32 = 0o100;
/// `O_EXCL`, for [`Map::Mshare`].
pub const O_EXCL: i32 = 0o200;

impl Map {
    /// Attaches an existing region where it is, for reading and writing.
    #[must_use]
    pub fn attach(name: &str) -> Self {
        Self::mshare(name, 0, 0, O_RDWR)
    }

    /// Attaches an existing region where it is, for reading.
    #[must_use]
    pub fn attach_ro(name: &str) -> Self {
        Self::mshare(name, 0, 0, 0)
    }

    /// Creates the region if it does not exist, and attaches it.
    #[must_use]
    pub fn create(name: &str, addr: u64, len: u64) -> Self {
        Self::mshare(name, addr, len, O_RDWR | O_CREAT)
    }

    /// `mshare` with mode 0600.
    #[must_use]
    pub fn mshare(name: &str, addr: u64, len: u64, oflag: i32) -> Self {
        Self::Mshare {
            name: name.to_owned(),
            addr,
            len,
            oflag,
            mode: 0o600,
        }
    }
}

impl Op {
    /// An access to slot 0.
    #[must_use]
    pub const fn mem(offset: u64, mem: MemOp) -> Self {
        Self::Mem {
            slot: 0,
            offset,
            mem,
        }
    }
}

/// The word at byte `offset` of the pattern of `seed` ([`MemOp::Fill`]).
#[must_use]
pub const fn pattern_word(seed: u64, offset: u64) -> u64 {
    // The finaliser of MurmurHash3 over a counter: neighbouring words share
    // nothing, so that a page at a wrong place cannot pass for the right one.
    let mut x = seed ^ (offset / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}
