//! Life as PID 1.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mshare_protocol::agent::MSHAREFS;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::exec;
use crate::power::{self, Power};
use crate::reaper::{Reaper, reaper, shell_status};
use crate::server::{self, Agent, Listen};

/// What the kernel command line asks of the agent.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    /// `agent.exec=`: a command to run before switching off.
    exec: Option<Vec<String>>,
    /// `agent.shell`: shells on the console.
    shell: bool,
}

/// Runs the guest. Does not return while the machine is on.
pub fn main() {
    mount_all();
    open_console();
    let options = fs::read_to_string("/proc/cmdline")
        .map(|line| parse(&line))
        .unwrap_or_default();
    match start() {
        Ok(reaper) => {
            say!("agent: ready");
            if let Some(argv) = &options.exec {
                say!("agent: exit {}", run(reaper, argv));
            } else if options.shell {
                shells(reaper);
            } else {
                loop {
                    thread::park();
                }
            }
        }
        Err(e) => say!("agent: cannot start: {e}"),
    }
    // PID 1 must not return: the kernel would panic.
    power::force(Power::Off);
    loop {
        thread::park();
    }
}

fn start() -> io::Result<&'static Reaper> {
    let reaper = reaper()?;
    let listen = Listen::default();
    let agent = Arc::new(Agent::new(reaper, true));
    if let Err(e) = server::listen(&listen, &agent) {
        say!("agent: {e}");
    }
    Ok(reaper)
}

/// Mounts what programs expect. What fails is said and done without.
fn mount_all() {
    let secure = MountFlags::NOSUID | MountFlags::NODEV;
    let table = [
        ("proc", "/proc", secure | MountFlags::NOEXEC),
        ("sysfs", "/sys", secure | MountFlags::NOEXEC),
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("tmpfs", "/dev/shm", secure),
        ("tmpfs", "/tmp", secure),
        ("tmpfs", "/run", secure),
        ("msharefs", MSHAREFS, secure | MountFlags::NOEXEC),
    ];
    for (kind, at, flags) in table {
        // The kernel makes the mount point of msharefs; without it the kernel
        // has no mshare, which is no fault of the boot.
        if kind == "msharefs" && !Path::new(at).exists() {
            continue;
        }
        if let Err(e) = fs::create_dir_all(at) {
            say!("agent: mkdir {at}: {e}");
            continue;
        }
        match mount(kind, at, kind, flags, None) {
            // Busy: the kernel has mounted devtmpfs itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(e) => say!("agent: mount {kind} at {at}: {e}"),
        }
    }
}

/// Standard streams go to the console, even if there was no /dev at the start.
fn open_console() {
    let Ok(console) = console() else { return };
    for redirect in [
        rustix::stdio::dup2_stdin,
        rustix::stdio::dup2_stdout,
        rustix::stdio::dup2_stderr,
    ] {
        // It fails for no reason but a bad descriptor, which this is not.
        let _ = redirect(&console);
    }
}

fn console() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
}

/// Runs a command on the console, and gives its status.
fn run(reaper: &Reaper, argv: &[String]) -> i32 {
    let spawned = exec::command(argv).map_err(|e| e.to_string());
    match spawned.and_then(|mut c| reaper.spawn(&mut c).map_err(|e| e.to_string())) {
        Ok((_child, pid)) => wait(reaper, pid),
        Err(e) => {
            say!("agent: cannot run {:?}: {e}", argv.join(" "));
            127
        }
    }
}

fn wait(reaper: &Reaper, pid: i32) -> i32 {
    loop {
        if let Some(status) = reaper.wait(pid, Duration::from_secs(3600)) {
            return shell_status(status);
        }
    }
}

/// Offers a shell on the console again and again; ends if there is none.
fn shells(reaper: &Reaper) {
    loop {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-l").env("PATH", exec::PATH).env("HOME", "/");
        // SAFETY: the closure runs in the child between fork and exec and only
        // makes system calls.
        unsafe {
            shell.pre_exec(|| {
                // A session of its own with the console as its terminal, for
                // job control and ^C; without it the shell still works.
                let _ = rustix::process::setsid();
                let _ = rustix::process::ioctl_tiocsctty(rustix::stdio::stdin());
                Ok(())
            });
        }
        match reaper.spawn(&mut shell) {
            Ok((_child, pid)) => say!("agent: shell exited with {}", wait(reaper, pid)),
            Err(e) => {
                say!("agent: cannot run /bin/sh: {e}");
                return;
            }
        }
    }
}

/// Finds the agent's options in a kernel command line.
fn parse(line: &str) -> Options {
    let mut options = Options::default();
    for word in words(line) {
        match word.split_once('=') {
            Some(("agent.exec", command)) => {
                options.exec = Some(command.split_whitespace().map(str::to_owned).collect());
            }
            None if word == "agent.shell" => options.shell = true,
            _ => {}
        }
    }
    options
}

/// Splits at spaces outside double quotes, as the kernel's `next_arg()` does.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.trim().chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => words.push(String::new()),
            c => {
                if let Some(word) = words.last_mut() {
                    word.push(c);
                }
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_command_is_one_option() {
        let options = parse("console=ttyS0 \"agent.exec=guest-agent figures --json\" quiet\n");
        assert_eq!(options.exec.unwrap(), ["guest-agent", "figures", "--json"]);
        assert!(!options.shell);
        let options = parse("agent.exec=\"/bin/true x=y\" agent.shell");
        assert_eq!(options.exec.unwrap(), ["/bin/true", "x=y"]);
        assert!(options.shell);
    }

    #[test]
    fn other_options_are_not_the_agents() {
        assert_eq!(
            parse("agent.executable=x agent.shell=1"),
            Options::default()
        );
    }
}
