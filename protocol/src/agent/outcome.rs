//! What came of an operation.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Failure;

/// What came of an operation in one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Index in the group.
    pub process: u32,
    /// Process id.
    pub pid: i32,
    /// What it reported.
    pub result: Result<Value, OpError>,
}

/// What an operation yields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// Nothing to say.
    Done,
    /// A mapping.
    Mapped {
        /// Address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// Timed accesses.
    Touched(Touched),
    /// A comparison.
    Verified(Verified),
    /// A word of memory.
    Word(u64),
    /// Whether an access succeeded: `None`, or the fault.
    Access(Option<Fault>),
    /// A spinner.
    Spin(Spin),
    /// A system call: its return value and errno (0 if none).
    Probe(Probed),
    /// How often `mshare` and `mshare_unlink` ended with which errno; 0: success.
    Churned {
        /// Of `mshare`.
        mshare: BTreeMap<i32, u64>,
        /// Of `mshare_unlink`.
        unlink: BTreeMap<i32, u64>,
    },
    /// A system call that succeeded.
    Ret(i64),
    /// `MSHARE_IOC_INFO`.
    RegionInfo(RegionInfo),
    /// `stat`.
    Stat(FileStat),
    /// The process has exited with this status.
    Exited(i32),
    /// The process was ended by this signal.
    Signalled(i32),
}

/// Why an operation yields nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum OpError {
    /// A call failed, or the request makes no sense.
    #[error("{0}")]
    Failed(Failure),
    /// An access faulted; the process lives.
    #[error("{0}")]
    Fault(Fault),
    /// The process is gone or was killed because it took too long.
    #[error("the worker is gone: {0}")]
    Gone(String),
}

/// Timed accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Accesses made.
    pub accesses: u64,
    /// Time they took.
    pub elapsed_ns: u64,
    /// Minor faults of the process meanwhile.
    pub minflt: u64,
    /// Major faults of the process meanwhile.
    pub majflt: u64,
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Words of 8 bytes compared.
    pub words: u64,
    /// How many differ.
    pub bad: u64,
    /// Offset of the first that differs, in bytes.
    pub first_bad: Option<u64>,
}

/// A signal caused by an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("signal {signal} (code {code}) at address {addr:#x}")]
pub struct Fault {
    /// SIGSEGV or SIGBUS.
    pub signal: i32,
    /// `si_code`.
    pub code: i32,
    /// `si_addr`.
    pub addr: u64,
}

/// State of a spinner. Times are CLOCK_MONOTONIC of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spin {
    /// Whether it still runs.
    pub running: bool,
    /// Successful accesses.
    pub iterations: u64,
    /// Word of the last successful access.
    pub last_value: u64,
    /// Times that the value read was not the one before.
    pub changes: u64,
    /// When the last successful access was over, in nanoseconds.
    pub last_ok_ns: u64,
    /// When the report was made, in nanoseconds.
    pub now_ns: u64,
    /// Why it ended, if by a fault.
    pub fault: Option<Fault>,
}

/// Result of a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// Return value; -1 on failure.
    pub ret: i64,
    /// errno; 0 on success.
    pub errno: i32,
    /// See the probe.
    pub extra: u64,
}

/// `struct mshare_info` of `linux/mshare.h`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Address; 0 while unsized.
    pub start: u64,
    /// Bytes; 0 while unsized.
    pub len: u64,
    /// Identity, unique among the regions of a pool.
    pub id: u64,
    /// Bytes of memory that the data occupies.
    pub resident: u64,
    /// Bytes of memory that the shared page tables occupy.
    pub table_bytes: u64,
    /// `INFO_*`.
    pub flags: u32,
    /// Mappings of the region in this guest.
    pub mappings: u32,
    /// Guests attached to a pool region, this one included.
    pub machines: u32,
    /// Bytes of swap space that the data occupies. Of a pool region this and
    /// the next are zero, for they are the host's affair.
    pub swapped: u64,
    /// Bytes of `resident` that are in huge pages.
    pub huge: u64,
    /// Page faults of this guest's processes in the region.
    pub faults: u64,
}

/// The region has an address and a length.
pub const INFO_SIZED: u32 = 1 << 0;
/// Its page tables are shared.
pub const INFO_TABLES: u32 = 1 << 1;
/// This guest may only read.
pub const INFO_RDONLY: u32 = 1 << 2;
/// Its name is gone.
pub const INFO_UNLINKED: u32 = 1 << 3;
/// It is shared with other guests.
pub const INFO_POOL: u32 = 1 << 4;

/// `stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// `st_mode`.
    pub mode: u32,
    /// `st_uid`.
    pub uid: u32,
    /// `st_gid`.
    pub gid: u32,
    /// `st_ino`.
    pub ino: u64,
    /// `st_size`.
    pub size: u64,
    /// `st_nlink`.
    pub nlink: u64,
}

impl From<Fault> for OpError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} (pid {}): ", self.process, self.pid)?;
        match &self.result {
            Ok(value) => value.fmt(f),
            Err(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done | Self::Ret(0) => write!(f, "done"),
            Self::Ret(ret) => write!(f, "returned {ret}"),
            Self::Mapped { start, len } => write!(f, "at {start:#x}, {len:#x} bytes"),
            Self::Touched(t) => write!(
                f,
                "{} accesses in {} us, {} minor and {} major faults",
                t.accesses,
                t.elapsed_ns / 1000,
                t.minflt,
                t.majflt
            ),
            Self::Verified(seen) => match seen.first_bad {
                None => write!(f, "{} words, all right", seen.words),
                Some(first) => write!(
                    f,
                    "{} words, {} wrong, the first at offset {first:#x}",
                    seen.words, seen.bad
                ),
            },
            Self::Word(word) => write!(f, "{word:#x}"),
            Self::Access(None) => write!(f, "allowed"),
            Self::Access(Some(fault)) => fault.fmt(f),
            Self::Spin(spin) => {
                let state = if spin.running { "spinning" } else { "stopped" };
                write!(
                    f,
                    "{state} after {} accesses, last value {:#x}, {} us ago",
                    spin.iterations,
                    spin.last_value,
                    spin.now_ns.saturating_sub(spin.last_ok_ns) / 1000
                )?;
                match &spin.fault {
                    Some(fault) => write!(f, ", by {fault}"),
                    None => Ok(()),
                }
            }
            Self::Probe(p) => write!(f, "returned {}, errno {}, {:#x}", p.ret, p.errno, p.extra),
            Self::Churned { mshare, unlink } => {
                write!(
                    f,
                    "errnos of mshare {mshare:?}, of mshare_unlink {unlink:?}"
                )
            }
            Self::RegionInfo(info) => {
                write!(
                    f,
                    "at {:#x}, {:#x} bytes, id {}, resident {} KiB ({} in huge pages), \
                     swapped {} KiB, tables {} KiB, {} faults, {} mappings here, {} guests",
                    info.start,
                    info.len,
                    info.id,
                    info.resident >> 10,
                    info.huge >> 10,
                    info.swapped >> 10,
                    info.table_bytes >> 10,
                    info.faults,
                    info.mappings,
                    info.machines
                )?;
                let flags = [
                    (INFO_TABLES, "shared tables"),
                    (INFO_RDONLY, "read only"),
                    (INFO_UNLINKED, "unlinked"),
                    (INFO_POOL, "pool"),
                ];
                flags
                    .iter()
                    .filter(|(flag, _)| info.flags & flag != 0)
                    .try_for_each(|(_, name)| write!(f, ", {name}"))
            }
            Self::Stat(stat) => write!(
                f,
                "mode {:o}, uid {}, gid {}, inode {}, {} bytes",
                stat.mode, stat.uid, stat.gid, stat.ino, stat.size
            ),
            Self::Exited(status) => write!(f, "exited with {status}"),
            Self::Signalled(signal) => write!(f, "ended by signal {signal}"),
        }
    }
}
