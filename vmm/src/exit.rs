//! How a run ends: what the guest did, and the exit status that tells it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Every exit status of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// The guest powered off; a subcommand succeeded.
    Success = 0,
    /// The VMM failed.
    Error = 1,
    /// The command line was wrong.
    Usage = 2,
    /// The guest rebooted.
    Rebooted = 16,
    /// The guest's kernel panicked.
    Panicked = 17,
    /// The guest crashed: triple fault, or KVM could not run it.
    Crashed = 18,
    /// The run was stopped from outside: Ctrl-A x, SIGTERM, SIGINT, SIGHUP or
    /// SIGQUIT.
    Stopped = 19,
    /// `doctor`: guests run, but cannot share page tables here.
    NoSharedTables = 20,
    /// `doctor`: Linux guests cannot run here.
    NoGuests = 21,
}

impl From<ExitStatus> for std::process::ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// The table of exit statuses for `--help`.
pub const EXIT_STATUS_HELP: &str = "\
Exit status:
   0  the guest powered off
   1  the VMM failed (the reason is on standard error)
   2  the command line was wrong
  16  the guest rebooted
  17  the guest's kernel panicked
  18  the guest crashed (triple fault, or KVM could not run it)
  19  stopped from outside (Ctrl-A x, SIGTERM, SIGINT, SIGHUP, SIGQUIT)";

/// Why KVM does not run a guest any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Crash {
    /// A fault while delivering a fault while delivering a fault.
    #[error("triple fault on vCPU {vcpu}{}", at(*rip))]
    TripleFault {
        /// The vCPU.
        vcpu: u8,
        /// Its instruction pointer; none where KVM has reset the vCPU already.
        rip: Option<u64>,
    },
    /// KVM met something it cannot handle.
    #[error("KVM internal error {suberror} on vCPU {vcpu} at RIP {rip:#x}{hint}")]
    Internal {
        /// The vCPU.
        vcpu: u8,
        /// KVM's suberror number.
        suberror: u32,
        /// Its instruction pointer.
        rip: u64,
        /// What it may mean.
        hint: &'static str,
    },
    /// The processor refused the vCPU's state.
    #[error("vCPU {vcpu} could not be entered, hardware reason {reason:#x}")]
    FailedEntry {
        /// The vCPU.
        vcpu: u8,
        /// The hardware's reason.
        reason: u64,
    },
    /// The vCPU touched memory that the host cannot give it.
    #[error("vCPU {vcpu} touched memory at {gpa:#x} that the host could not provide")]
    MemoryFault {
        /// The vCPU.
        vcpu: u8,
        /// Guest-physical address.
        gpa: u64,
    },
    /// `KVM_RUN` failed.
    #[error("vCPU {vcpu} cannot run: {error}")]
    Run {
        /// The vCPU.
        vcpu: u8,
        /// What the kernel said.
        error: String,
    },
    /// An exit this VMM does not know.
    #[error("vCPU {vcpu} left the guest for an unknown reason: {exit}")]
    Unknown {
        /// The vCPU.
        vcpu: u8,
        /// The exit.
        exit: String,
    },
}

fn at(rip: Option<u64>) -> String {
    rip.map(|rip| format!(" at RIP {rip:#x}"))
        .unwrap_or_default()
}

/// Who ended a run from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoppedBy {
    /// Ctrl-A x on the console.
    Console,
    /// A signal.
    Signal(i32),
    /// A call of [`Exit::report`] from elsewhere.
    Caller,
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestExit {
    /// It powered off.
    PoweredOff,
    /// It rebooted.
    Rebooted,
    /// Its kernel panicked.
    Panicked,
    /// It crashed.
    Crashed(Crash),
    /// It was stopped.
    Stopped(StoppedBy),
    /// A thread of the VMM failed.
    VmmFailed(String),
}

impl GuestExit {
    /// The exit status of the program.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::PoweredOff => ExitStatus::Success,
            Self::Rebooted => ExitStatus::Rebooted,
            Self::Panicked => ExitStatus::Panicked,
            Self::Crashed(_) => ExitStatus::Crashed,
            Self::Stopped(_) => ExitStatus::Stopped,
            Self::VmmFailed(_) => ExitStatus::Error,
        }
    }
}

impl fmt::Display for GuestExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Rebooted => f.write_str("the guest rebooted"),
            Self::Panicked => f.write_str("the guest's kernel panicked"),
            Self::Crashed(crash) => write!(f, "the guest crashed: {crash}"),
            Self::Stopped(StoppedBy::Console) => f.write_str("stopped from the console"),
            Self::Stopped(StoppedBy::Signal(n)) => write!(f, "stopped by signal {n}"),
            Self::Stopped(StoppedBy::Caller) => f.write_str("stopped"),
            Self::VmmFailed(what) => write!(f, "the VMM failed: {what}"),
        }
    }
}

#[derive(Debug)]
struct Shared {
    first: Mutex<Option<GuestExit>>,
    event: EventFd,
}

/// Where any thread reports the end of the run. The first report counts.
#[derive(Debug, Clone)]
pub struct Exit {
    shared: Arc<Shared>,
}

impl Exit {
    /// An exit that nobody has reported.
    ///
    /// # Errors
    ///
    /// The host has no event file descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                first: Mutex::new(None),
                event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            }),
        })
    }

    /// Reports the end of the run; later reports change nothing but wake the
    /// waiting thread again.
    pub fn report(&self, exit: GuestExit) {
        {
            let mut first = self
                .shared
                .first
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(exit);
        }
        // The counter cannot overflow, and a full one would wake the reader.
        if let Err(error) = self.shared.event.write(1) {
            log::error!("cannot signal the end of the run: {error}");
        }
    }

    /// What was reported first.
    pub fn reported(&self) -> Option<GuestExit> {
        let first = self
            .shared
            .first
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        first.clone()
    }

    /// Becomes readable with each report.
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// A value for a thread to hold: if the thread panics, the run ends with
    /// that, instead of going on without it. `thread` names it in the report.
    pub fn unless_panic(&self, thread: impl Into<String>) -> PanicGuard {
        PanicGuard {
            exit: self.clone(),
            thread: thread.into(),
        }
    }
}

/// Reports the panic of the thread that drops it; see [`Exit::unless_panic`].
#[derive(Debug)]
pub struct PanicGuard {
    exit: Exit,
    thread: String,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let what = format!("{} panicked", self.thread);
            self.exit.report(GuestExit::VmmFailed(what));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_keeps_the_first_reason() {
        let exit = Exit::new().unwrap();
        assert_eq!(exit.reported(), None);
        exit.report(GuestExit::Panicked);
        exit.clone().report(GuestExit::Rebooted);
        assert_eq!(exit.reported(), Some(GuestExit::Panicked));
        assert_eq!(exit.event().read().unwrap(), 2);
    }

    #[test]
    fn panic_of_a_thread_ends_the_run_and_its_end_does_not() {
        let exit = Exit::new().unwrap();
        drop(exit.unless_panic("the thread"));
        assert_eq!(exit.reported(), None);
        let guard = exit.unless_panic("the devices thread");
        let thread = std::thread::spawn(move || {
            let _guard = guard;
            panic!("for a test");
        });
        assert!(thread.join().is_err());
        let reported = exit.reported().unwrap().to_string();
        assert_eq!(reported, "the VMM failed: the devices thread panicked");
    }

    #[test]
    fn status_of_each_exit_is_the_documented_one() {
        let crash = Crash::TripleFault { vcpu: 0, rip: None };
        for (exit, status) in [
            (GuestExit::PoweredOff, 0),
            (GuestExit::VmmFailed(String::new()), 1),
            (GuestExit::Rebooted, 16),
            (GuestExit::Panicked, 17),
            (GuestExit::Crashed(crash), 18),
            (GuestExit::Stopped(StoppedBy::Console), 19),
        ] {
            assert_eq!(exit.status() as u8, status, "{exit}");
            assert!(EXIT_STATUS_HELP.contains(&format!("{status:>4}  ")));
        }
    }
}
