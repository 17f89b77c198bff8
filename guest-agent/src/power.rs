//! Switches the machine off.

use std::fs;
use std::thread;
use std::time::Duration;

use mshare_protocol::agent::Failure;
use rustix::system::{RebootCommand, reboot};

use crate::exec;
use crate::reaper::Reaper;

/// How long a machine's own init may take to end this process, once asked.
const PATIENCE: Duration = Duration::from_secs(60);

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Off.
    Off,
    /// Off and on again.
    Restart,
}

impl Power {
    /// The command that asks a system's own init for it.
    fn name(self) -> &'static str {
        match self {
            Self::Off => "poweroff",
            Self::Restart => "reboot",
        }
    }
}

/// Switches, by way of the system's init if that is another process. Returns
/// only if the machine cannot be switched.
pub fn switch(power: Power, reaper: &Reaper) {
    if !rustix::process::getpid().is_init() && succeeds(power.name(), reaper) {
        // It kills us when it is our turn.
        thread::sleep(PATIENCE);
    }
    force(power);
}

/// Syncs and switches without asking anybody. Returns only if the machine
/// cannot be switched.
pub fn force(power: Power) {
    let command = match power {
        Power::Off => RebootCommand::PowerOff,
        Power::Restart => RebootCommand::Restart,
    };
    rustix::fs::sync();
    if let Err(e) = reboot(command) {
        say!("agent: cannot {}: {e}", power.name());
    }
}

/// Runs a command; true if it says that it did what it was asked. Through the
/// reaper, which would take the status away from everybody else.
fn succeeds(name: &str, reaper: &Reaper) -> bool {
    exec::command(&[name.to_owned()])
        .ok()
        .and_then(|mut command| reaper.spawn(&mut command).ok())
        .and_then(|(_child, pid)| reaper.wait(pid, PATIENCE))
        .is_some_and(|status| status.success())
}

/// Crashes the kernel.
///
/// # Errors
/// If the kernel has no sysrq.
pub fn crash() -> Result<(), Failure> {
    fs::write("/proc/sysrq-trigger", "c")
        .map_err(|e| Failure::os("write c to /proc/sysrq-trigger", &e))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::reaper::reaper;

    /// Set in the process that the test runs itself in.
    const ALONE: &str = "GUEST_AGENT_TEST_ALONE";

    /// The reaper takes the children of all tests of its process: not in this one.
    #[test]
    fn init_that_was_asked_is_believed_although_the_reaper_waits_for_everybody() {
        if std::env::var_os(ALONE).is_none() {
            let name = std::thread::current().name().unwrap().to_owned();
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &name])
                .env(ALONE, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{said}");
            assert!(said.contains("1 passed"), "{said}");
            return;
        }
        let reaper = reaper().unwrap();
        for _ in 0..50 {
            assert!(succeeds("true", reaper));
            assert!(!succeeds("false", reaper));
        }
        assert!(!succeeds("/nonexistent/poweroff", reaper));
    }
}
