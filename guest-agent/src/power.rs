//! Switches the machine off.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use mshare_protocol::agent::Failure;
use rustix::system::{RebootCommand, reboot};

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Off.
    Off,
    /// Off and on again.
    Restart,
}

/// Syncs and switches. Returns only if the machine cannot be switched.
pub fn switch(power: Power) {
    let (command, name) = match power {
        Power::Off => (RebootCommand::PowerOff, "poweroff"),
        Power::Restart => (RebootCommand::Restart, "reboot"),
    };
    if !rustix::process::getpid().is_init() {
        // A system with an init of its own wants to be asked.
        if Command::new(name).status().is_ok_and(|s| s.success()) {
            // It kills us when it is our turn.
            thread::sleep(Duration::from_secs(60));
        }
    }
    rustix::fs::sync();
    if let Err(e) = reboot(command) {
        say!("agent: cannot {name}: {e}");
    }
}

/// Crashes the kernel.
///
/// # Errors
/// If the kernel has no sysrq.
pub fn crash() -> Result<(), Failure> {
    fs::write("/proc/sysrq-trigger", "c")
        .map_err(|e| Failure::os("write c to /proc/sysrq-trigger", &e))
}
