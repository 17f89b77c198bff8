//! Boots a kernel and an initramfs under plain emulation, without KVM, VMM or
//! lab: for what needs a guest kernel only.

use std::io::{self, Read};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::qemu::{Channel, QEMU, Qemu};

/// The line by which the guest agent tells the status of its command
/// (`agent.exec=` on the kernel command line).
pub const AGENT_EXIT: &str = "agent: exit ";
/// I/O port of the device that ends the emulator (`isa-debug-exit`).
pub const EXIT_PORT: u16 = 0xf4;
/// A guest writes this plus its status, at most 0x6f, to [`EXIT_PORT`]: lower
/// values would look like failures of the emulator.
pub const EXIT_BASE: u8 = 0x10;

const PANIC: &str = "Kernel panic - not syncing";
/// What the kernel says last (`kernel/reboot.c`). A small kernel cannot power this
/// machine off: it halts, and the emulator goes on.
const HALTED: [&str; 2] = ["reboot: Power down", "System halted"];
/// How long a halted machine has for powering off by itself.
const HALT_PATIENCE: Duration = Duration::from_millis(200);
/// How long a guest has to halt, or to panic, once the agent has told the status:
/// long enough where the emulator gets little of a busy CPU.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// A boot to be made.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The kernel: a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line. `console=ttyS0 panic=-1 no_timer_check` goes before it.
    pub append: String,
    /// Emulated CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How time passes.
    pub clock: Clock,
    /// Time for all of it.
    pub timeout: Duration,
}

/// How time passes in the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Clock {
    /// As here; CPUs run at the same time.
    #[default]
    Host,
    /// By a nanosecond with each instruction, and the time stamp counter by
    /// one. CPUs take turns.
    Instructions,
}

/// How a boot ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Booted {
    /// The status the guest told, by [`EXIT_PORT`] or by an [`AGENT_EXIT`] line.
    pub status: Option<u8>,
    /// Whether the kernel panicked.
    pub panicked: bool,
    /// Everything the console said; other than UTF-8 replaced.
    pub console: String,
}

/// Why a boot has no result.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The emulator cannot be started.
    #[error("cannot start {QEMU} (Debian package qemu-system-x86)")]
    Start(#[source] io::Error),
    /// The emulator stopped by itself.
    #[error("{QEMU} failed: {0}")]
    Emulator(String),
    /// The machine has been ended from here: it went on, if only on its way to
    /// power off.
    #[error("the guest was not done after {after:.0?}; its console:\n{console}")]
    TimedOut {
        /// The time it had.
        after: Duration,
        /// What its console said.
        console: String,
    },
}

impl Boot {
    /// A boot with 2 CPUs, 1 GiB and two minutes.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: None,
            append: String::new(),
            cpus: 2,
            memory_mib: 1024,
            clock: Clock::Host,
            timeout: Duration::from_secs(120),
        }
    }

    /// Boots and waits for the end. `console` gets the console as it comes.
    pub fn run(&self, mut console: impl FnMut(&[u8])) -> Result<Booted, BootError> {
        let channel = Channel::new("console").map_err(BootError::Start)?;
        let mut qemu =
            Qemu::start(self.command(&channel), &[&channel], &[]).map_err(BootError::Start)?;
        let complaints = qemu.messages().map(|mut messages| {
            thread::spawn(move || {
                let mut text = String::new();
                // What came before an error is all there is.
                let _ = messages.read_to_string(&mut text);
                text
            })
        });
        let (send, receive) = mpsc::channel();
        let mut stream = channel.into_ours();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                if send.send(buffer[..len].to_vec()).is_err() {
                    break;
                }
            }
        });

        let start = Instant::now();
        let mut deadline = start + self.timeout;
        let mut told_status = false;
        let mut is_halted = false;
        let mut all = Vec::new();
        loop {
            match receive.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(data) => {
                    console(&data);
                    all.extend(data);
                    let text = String::from_utf8_lossy(&all);
                    if !told_status && agent_status(&text).is_some() {
                        told_status = true;
                        deadline = deadline.min(Instant::now() + END_PATIENCE);
                    }
                    if told_status && !is_halted && halted(&text) {
                        is_halted = true;
                        deadline = deadline.min(Instant::now() + HALT_PATIENCE);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if is_halted => {
                    qemu.end().map_err(BootError::Start)?;
                    let console = String::from_utf8_lossy(&all).into_owned();
                    return Ok(Booted {
                        status: agent_status(&console),
                        panicked: console.contains(PANIC),
                        console,
                    });
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(BootError::TimedOut {
                        after: start.elapsed(),
                        console: String::from_utf8_lossy(&all).into_owned(),
                    });
                }
            }
        }
        let status = qemu.wait().map_err(BootError::Start)?;
        let console = String::from_utf8_lossy(&all).into_owned();
        match status.code() {
            Some(0) => {}
            Some(code) if code > i32::from(EXIT_BASE) * 2 => {}
            _ => {
                let said = complaints.and_then(|thread| thread.join().ok());
                let said = said.unwrap_or_default();
                return Err(BootError::Emulator(format!("{status}: {}", said.trim())));
            }
        }
        Ok(Booted {
            status: told(status.code().unwrap_or(0), &console),
            panicked: console.contains(PANIC),
            console,
        })
    }

    fn command(&self, console: &Channel) -> Command {
        let mut command = Command::new(QEMU);
        match self.clock {
            Clock::Host => command.args(["-accel", "tcg,thread=multi"]),
            Clock::Instructions => command
                .args(["-accel", "tcg,thread=single"])
                .args(["-icount", "shift=0,sleep=off"]),
        };
        command
            .args(["-M", "q35", "-cpu", "max"])
            .args(["-smp", &self.cpus.to_string()])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none"])
            .args(["-device", &format!("isa-debug-exit,iobase={EXIT_PORT:#x}")])
            .args(["-chardev", &console.chardev()])
            .args(["-serial", "chardev:console"])
            .arg("-kernel")
            .arg(&self.kernel)
            .args([
                "-append",
                // The emulator's timer works, if late where the host is busy: then
                // the kernel's check of it would be a panic.
                &format!("console=ttyS0 panic=-1 no_timer_check {}", self.append),
            ]);
        if let Some(initramfs) = &self.initramfs {
            command.arg("-initrd").arg(initramfs);
        }
        command
    }
}

/// The guest's status: from the exit device, which makes the emulator return
/// twice the value written plus one, else from the agent's last word.
fn told(code: i32, console: &str) -> Option<u8> {
    if code != 0 {
        return u8::try_from(code >> 1).ok()?.checked_sub(EXIT_BASE);
    }
    agent_status(console)
}

/// The status in the agent's last word, if that line is complete.
fn agent_status(console: &str) -> Option<u8> {
    let (complete, _) = console.rsplit_once('\n')?;
    complete
        .lines()
        .rev()
        .find_map(|line| line.split_once(AGENT_EXIT))
        .and_then(|(_, status)| status.trim().parse().ok())
}

/// Whether the kernel has said, after the agent's last word, that it halts.
fn halted(console: &str) -> bool {
    let after = console
        .rsplit_once(AGENT_EXIT)
        .map_or("", |(_, after)| after);
    HALTED.iter().any(|last| after.contains(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_comes_from_the_device_or_from_the_agent() {
        assert_eq!(told((0x13 << 1) | 1, ""), Some(3));
        assert_eq!(told(0, "agent: ready\r\nagent: exit 7\r\n"), Some(7));
        assert_eq!(told(0, "[    1.0] agent: exit 0\n"), Some(0));
        assert_eq!(told(0, "agent: exit 1"), None, "the line may go on");
        assert_eq!(told(0, "Kernel panic - not syncing"), None);
    }

    #[test]
    fn machine_halts_after_the_agents_last_word() {
        assert!(halted("agent: exit 0\r\n[    3.2] reboot: Power down\r\n"));
        assert!(halted(
            "agent: exit 0\n[    3.2] reboot: Power off not available: System halted instead\n"
        ));
        assert!(!halted("reboot: Power down\nagent: exit 0\n"));
        assert!(!halted("reboot: Power down\n"));
    }
}
