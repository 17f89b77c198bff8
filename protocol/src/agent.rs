//! Messages between the host and the agent inside a guest.
//!
//! The agent listens on vsock port [`PORT`] (or a unix socket). A client sends
//! [`Request`]s, each as one [`frame`](crate::frame), and gets one
//! [`Response`] per request, in order. Connections are independent of each
//! other; worker groups belong to the agent, not to a connection, so that one
//! client can start what another one stops.
//!
//! A **group** is a set of processes with a name. Each of them is a process of
//! its own (a fresh image of the agent, not a fork that inherits mappings) and
//! runs one [`Op`] at a time. Operations on memory address it by a **slot**,
//! the number under which the process holds a mapping, and a byte offset.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::klog;

mod op;
mod outcome;

pub use op::*;
pub use outcome::*;

/// Version of these messages; both sides must have the same.
pub const VERSION: u32 = 2;
/// Vsock port of the agent.
pub const PORT: u32 = 1024;
/// Where msharefs is mounted.
pub const MSHAREFS: &str = "/sys/fs/mshare";
/// Longest output of a command that is kept, in bytes, for each stream.
pub const MAX_OUTPUT: usize = 1 << 20;

/// Most bytes of a file that one request reads: half a frame.
pub const MAX_READ: u32 = 2 << 20;

/// Answer to a [`Request`].
pub type Response = Result<Reply, Failure>;

/// What the host asks of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Who are you: [`Reply::Info`].
    Info,
    /// Run one operation in a process that lives for it alone:
    /// [`Reply::Outcomes`] with one entry.
    Once(Op),
    /// Start a group: [`Reply::Outcomes`], for each process the outcome of
    /// mapping [`StartGroup::map`].
    StartGroup(StartGroup),
    /// Run an operation in a group: [`Reply::Outcomes`].
    Run(Run),
    /// Names of the groups: [`Reply::Groups`].
    ListGroups,
    /// Ask the processes of a group to exit and wait: [`Reply::Outcomes`].
    StopGroup {
        /// Name of the group.
        group: String,
    },
    /// SIGKILL the processes of a group and wait: [`Reply::Outcomes`].
    KillGroup {
        /// Name of the group.
        group: String,
        /// Only this process; the group stays.
        process: Option<u32>,
    },
    /// Memory and fault figures: [`Reply::Figures`].
    Figures,
    /// `/proc/interrupts`, summed over the CPUs: [`Reply::Interrupts`].
    Interrupts,
    /// The kernel's log: [`Reply::Dmesg`].
    Dmesg {
        /// At most this many lines, the last ones.
        lines: u32,
    },
    /// Run a command: [`Reply::Exec`].
    Exec(Exec),
    /// Read a piece of a file: [`Reply::Bytes`]. It is shorter than `max` and
    /// [`MAX_READ`] only where the file ends.
    ReadFile {
        /// Path.
        path: String,
        /// Where the piece begins.
        offset: u64,
        /// Bytes.
        max: u32,
    },
    /// Write a file, creating it if needed: [`Reply::Done`].
    WriteFile {
        /// Path.
        path: String,
        /// Contents.
        data: Vec<u8>,
    },
    /// Names in a directory, sorted: [`Reply::Names`].
    ListDir {
        /// Path.
        path: String,
    },
    /// Sync and switch off. [`Reply::Done`], then the connection ends.
    PowerOff,
    /// Sync and restart. [`Reply::Done`], then the connection ends.
    Reboot,
    /// Crash the kernel (sysrq c). [`Reply::Done`] if it survives that long.
    Crash,
    /// Panic in the thread of this connection, to show that the agent lives.
    Panic,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Info`].
    Info(Info),
    /// One entry per process that was asked, in order.
    Outcomes(Vec<Outcome>),
    /// To [`Request::ListGroups`].
    Groups(Vec<GroupInfo>),
    /// To [`Request::Figures`].
    Figures(Figures),
    /// Name of the interrupt to its count over all CPUs.
    Interrupts(BTreeMap<String, u64>),
    /// Lines of the kernel's log.
    Dmesg(Vec<LogLine>),
    /// To [`Request::Exec`].
    Exec(ExecResult),
    /// Contents of a file.
    Bytes(Vec<u8>),
    /// Names in a directory.
    Names(Vec<String>),
    /// Nothing to say.
    Done,
}

/// The agent and its kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// [`VERSION`]; stays the first field in every version.
    pub version: u32,
    /// Whether the agent is PID 1.
    pub init: bool,
    /// `uname -r`.
    pub release: String,
    /// CPUs online.
    pub cpus: u32,
    /// Kernel command line.
    pub cmdline: String,
    /// Whether the kernel has the mshare system calls.
    pub mshare: bool,
    /// Whether a device provides a pool.
    pub pool: bool,
    /// CLOCK_MONOTONIC now, in nanoseconds.
    pub monotonic_ns: u64,
}

/// Processes to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartGroup {
    /// Name of the group, not in use yet.
    pub group: String,
    /// How many processes.
    pub processes: u32,
    /// What each of them maps into slot 0, if anything.
    pub map: Option<Map>,
    /// Process `i` is pinned to CPU `pin[i % pin.len()]`; empty: not pinned.
    pub pin: Vec<u32>,
}

/// An operation for a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Name of the group.
    pub group: String,
    /// Which process; all of them, at the same time, if `None`.
    pub process: Option<u32>,
    /// What to do.
    pub op: Op,
    /// How long each process may take; then it is killed. Zero: 240 s.
    pub timeout_ms: u32,
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupInfo {
    /// Its name.
    pub group: String,
    /// Its processes; 0 for one that is gone.
    pub pids: Vec<i32>,
}

/// Memory and fault figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// `/proc/meminfo`, in KiB.
    pub meminfo: BTreeMap<String, u64>,
    /// Every process of every group.
    pub processes: Vec<ProcessFigures>,
}

/// Figures of a process, from its `stat` and `status` in `/proc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFigures {
    /// Group.
    pub group: String,
    /// Index in the group.
    pub process: u32,
    /// Process id.
    pub pid: i32,
    /// VmPTE: KiB of page tables of its own.
    pub vm_pte_kib: u64,
    /// VmRSS in KiB.
    pub rss_kib: u64,
    /// VmSize in KiB.
    pub vm_size_kib: u64,
    /// Minor faults.
    pub minflt: u64,
    /// Major faults.
    pub majflt: u64,
}

/// A line of the kernel's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Microseconds since boot.
    pub time_us: u64,
    /// Text.
    pub text: String,
}

impl LogLine {
    /// Whether the line reports that the kernel misbehaved.
    #[must_use]
    pub fn is_complaint(&self) -> bool {
        // The stack that comes with most of them, and with some of none of them.
        self.text.contains("Call Trace:") || klog::complains(&self.text)
    }
}

/// A command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The command and its arguments. `guest-agent` names the agent itself.
    pub argv: Vec<String>,
    /// Its standard input.
    pub stdin: Vec<u8>,
    /// It is killed after this time. Zero: 60 s.
    pub timeout_ms: u32,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecResult {
    /// Exit status, or 128 + the signal that ended it.
    pub status: i32,
    /// At most [`MAX_OUTPUT`] bytes.
    pub stdout: Vec<u8>,
    /// At most [`MAX_OUTPUT`] bytes.
    pub stderr: Vec<u8>,
    /// Whether output was dropped.
    pub truncated: bool,
    /// Whether it was killed for taking too long.
    pub timed_out: bool,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Linux errno; 0 if none fits.
    pub errno: i32,
    /// What failed and, where known, what would be right.
    pub message: String,
}

impl Failure {
    /// A failure without a system call behind it.
    #[must_use]
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            errno: 0,
            message: message.into(),
        }
    }

    /// A failure of a system call: what was tried, and the error.
    #[must_use]
    pub fn os(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        Self {
            errno: error.raw_os_error().unwrap_or(0),
            message: format!("{what}: {error}"),
        }
    }
}

/// Reads a number of bytes: decimal, or hexadecimal with `0x`, and perhaps K,
/// M, G or T (as K, KB or KiB, in either case).
///
/// # Errors
/// Anything else, and numbers of 2^64 and more; the text says what is right.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let bad =
        || format!("{text:?} is not a number of bytes such as 4096, 0x1000, 512K, 2M or 1GiB");
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let end = digits
        .find(|c: char| !c.is_digit(radix))
        .unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        // In hexadecimal, B is a digit.
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(bad()),
    };
    let number = u64::from_str_radix(number, radix).map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

const _: () = assert!(MAX_READ as usize <= crate::frame::MAX_FRAME / 2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_suffixes_and_refuse_the_rest() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4096B", 4096),
            ("0x1000", 4096),
            ("0x1B", 27),
            ("64KiB", 65536),
            ("64kb", 65536),
            ("2M", 2 << 20),
            ("2g", 2 << 30),
            ("0x10G", 16 << 30),
            ("16T", 16 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        let bad = [
            "",
            "M",
            "0x",
            "1X",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            "1GG",
            "99999999T",
            "0xfG0",
        ];
        for text in bad {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pattern_depends_on_offset_and_seed() {
        assert_ne!(pattern_word(1, 0), pattern_word(1, 8));
        assert_ne!(pattern_word(1, 8), pattern_word(2, 8));
        assert_eq!(pattern_word(1, 8), pattern_word(1, 8));
    }

    #[test]
    fn complaints_are_told_from_chatter() {
        let line = |text: &str| LogLine {
            level: 4,
            time_us: 0,
            text: text.into(),
        };
        assert!(line("WARNING: CPU: 0 PID: 1 at mm/mshare.c:1").is_complaint());
        assert!(line("BUG: unable to handle page fault").is_complaint());
        assert!(!line("mshare: window at 0x4000000000").is_complaint());
        assert!(!line("Speculative Return Stack Overflow: WARNING: See").is_complaint());
    }
}
