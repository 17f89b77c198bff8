//! Several guests of one command: a process for each, and this one, which
//! watches over them (and serves their pool, see [`crate::pool_service`]).
//!
//! ```text
//! vmm --guests 3 --pool size=1G         (this process)
//!  |-- vmm --config ...  guest0
//!  |-- vmm --config ...  guest1         lines of their consoles, each with
//!  `-- vmm --config ...  guest2         its guest's name in front
//! ```
//!
//! A guest that dies takes nobody along; the broker detaches it. When the
//! supervisor dies, so do its guests (`PR_SET_PDEATHSIG`).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, getpid, getppid};

use crate::config::Config;
use crate::signals::Signals;

/// How long the guests that run already may take to end when one of them does
/// not start. What is left then dies with this process.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long the last lines of the guests may take to be passed on: a reader of
/// ours that is stuck must not keep us.
const LINES_LIMIT: Duration = Duration::from_secs(2);

/// Why the guests could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A guest's process does not start.
    #[error("cannot start the process of {name}")]
    Start {
        /// Name of the guest.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A configuration cannot be handed over.
    #[error("cannot hand its configuration to {name}")]
    HandOver {
        /// Name of the guest.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Something the watcher waits for.
enum Event {
    /// The guest with this index has ended.
    Ended(usize, io::Result<ExitStatus>),
    /// This process was told to end.
    Signalled(i32),
}

/// A guest's process.
struct Running {
    name: String,
    pid: Pid,
    /// The threads that pass its lines on.
    lines: Vec<JoinHandle<()>>,
    ended: Option<ExitStatus>,
}

/// Runs all guests to their end; the exit status is that of the first guest
/// (in order of their numbers) that did not end with 0.
///
/// # Errors
///
/// Nothing was started, or what was started has been ended again.
pub fn run(configs: &[Config], signals: Signals) -> Result<u8, Error> {
    let (sender, events) = mpsc::channel();
    watch_signals(signals, sender.clone())
        .map_err(|source| start_error("the signal watcher", source))?;
    let mut guests: Vec<Running> = Vec::with_capacity(configs.len());
    for (i, config) in configs.iter().enumerate() {
        match start(i, config, &sender) {
            Ok(guest) => guests.push(guest),
            Err(error) => {
                // They remove their sockets before they end.
                end_all(&guests);
                wait(&mut guests, &events, Some(Instant::now() + END_LIMIT));
                finish_lines(guests, LINES_LIMIT);
                return Err(error);
            }
        }
    }
    drop(sender);
    wait(&mut guests, &events, None);
    let code = first_failure(&guests);
    finish_lines(guests, LINES_LIMIT);
    Ok(code)
}

fn start_error(name: &str, source: io::Error) -> Error {
    Error::Start {
        name: name.to_owned(),
        source,
    }
}

fn start(index: usize, config: &Config, events: &Sender<Event>) -> Result<Running, Error> {
    let name = config.name.clone().unwrap_or_else(|| index.to_string());
    let fail = |source| start_error(&name, source);
    let file = hand_over(&name, config).map_err(|source| Error::HandOver {
        name: name.clone(),
        source,
    })?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("--config")
        .arg(format!("/proc/self/fd/{}", file.as_raw_fd()))
        // Where a person looks at the processes.
        .args(["--name", &name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let fd = file.as_raw_fd();
    let supervisor = getpid();
    // SAFETY: the closure runs between fork and exec and makes a few system
    // calls that are safe there; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The supervisor may have gone before the line above.
            if getppid() != Some(supervisor) {
                return Err(io::ErrorKind::NotFound.into());
            }
            // The configuration's descriptor is the one thing that is passed on.
            let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            Ok(())
        });
    }
    let child = command.spawn().map_err(fail)?;
    let pid = Pid::from_child(&child);
    match watch(index, &name, child, events) {
        Ok(lines) => Ok(Running {
            name,
            pid,
            lines,
            ended: None,
        }),
        Err(source) => {
            // Without its watchers it would never be missed.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            Err(fail(source))
        }
    }
}

/// Starts the threads that pass the lines of a guest on and wait for its end;
/// returns the former.
fn watch(
    index: usize,
    name: &str,
    mut child: Child,
    events: &Sender<Event>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let mut lines = Vec::new();
    for (stream, to) in streams(&mut child) {
        let prefix = format!("{name} | ");
        lines.push(
            thread::Builder::new()
                .name(format!("lines-{index}"))
                .spawn(move || pass_lines(stream, &prefix, to))?,
        );
    }
    let events = events.clone();
    thread::Builder::new()
        .name(format!("wait-{index}"))
        .spawn(move || {
            let status = child.wait();
            // Nobody listens once the supervisor has given up.
            let _ = events.send(Event::Ended(index, status));
        })?;
    Ok(lines)
}

/// A sealed-off file with the configuration, to be read by the child.
fn hand_over(name: &str, config: &Config) -> io::Result<OwnedFd> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create(name, flags)?);
    serde_json::to_writer(&mut file, config)?;
    file.flush()?;
    Ok(file.into())
}

/// Where the lines of a child go.
#[derive(Clone, Copy)]
enum To {
    Stdout,
    Stderr,
}

fn streams(child: &mut Child) -> Vec<(Box<dyn Read + Send>, To)> {
    let mut streams: Vec<(Box<dyn Read + Send>, To)> = Vec::new();
    if let Some(out) = child.stdout.take() {
        streams.push((Box::new(out), To::Stdout));
    }
    if let Some(err) = child.stderr.take() {
        streams.push((Box::new(err), To::Stderr));
    }
    streams
}

/// Copies line by line; a line of a console may hold any bytes.
fn pass_lines(stream: Box<dyn Read + Send>, prefix: &str, to: To) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A console without line ends must not fill the memory.
        match (&mut reader).take(4096).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        let text = [prefix.as_bytes(), &line].concat();
        // A reader that is gone must not end the guest.
        let _ = match to {
            To::Stdout => io::stdout().write_all(&text),
            To::Stderr => io::stderr().write_all(&text),
        };
    }
}

fn watch_signals(mut signals: Signals, events: Sender<Event>) -> io::Result<()> {
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let readable =
                |signals: &Signals| poll(&mut [PollFd::new(signals, PollFlags::IN)], None).is_ok();
            while readable(&signals) {
                if let Some(signal) = signals.pending()
                    && events.send(Event::Signalled(signal)).is_err()
                {
                    return;
                }
            }
        })
        .map(drop)
}

fn end_all(guests: &[Running]) {
    for guest in guests.iter().filter(|guest| guest.ended.is_none()) {
        // It fails only if the process has just ended.
        let _ = rustix::process::kill_process(guest.pid, Signal::TERM);
    }
}

/// Waits until all guests have ended, or until `deadline`.
fn wait(guests: &mut [Running], events: &Receiver<Event>, deadline: Option<Instant>) {
    while guests.iter().any(|guest| guest.ended.is_none()) {
        let event = match deadline {
            None => events.recv().ok(),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                events.recv_timeout(left).ok()
            }
        };
        match event {
            Some(Event::Ended(index, Ok(status))) => {
                report(&guests[index].name, status);
                guests[index].ended = Some(status);
            }
            Some(Event::Ended(index, Err(error))) => {
                log::error!("cannot wait for {}: {error}", guests[index].name);
                guests[index].ended = Some(ExitStatus::from_raw(1 << 8));
            }
            Some(Event::Signalled(signal)) => {
                log::info!("signal {signal}: ending the guests");
                end_all(guests);
            }
            None => break,
        }
    }
}

/// The exit status of the first guest that did not end with 0.
fn first_failure(guests: &[Running]) -> u8 {
    guests
        .iter()
        .filter_map(|guest| guest.ended)
        .map(exit_code)
        .find(|&code| code != 0)
        .unwrap_or(0)
}

/// Waits until all that the guests printed has been passed on, or for `limit`;
/// returns whether it has been.
fn finish_lines(guests: Vec<Running>, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut lines = guests.into_iter().flat_map(|guest| guest.lines);
    lines.all(|thread| {
        while !thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        thread.is_finished()
    })
}

fn report(name: &str, status: ExitStatus) {
    match status.signal() {
        Some(signal) => eprintln!("{name}: killed by signal {signal}"),
        None => eprintln!("{name}: ended with status {}", status.code().unwrap_or(0)),
    }
}

/// As a shell has it: 128 + N for a process that signal N killed.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    u8::try_from(code & 0xff).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_the_guests_or_128_and_its_signal() {
        let ended = |raw| ExitStatus::from_raw(raw);
        assert_eq!(exit_code(ended(17 << 8)), 17);
        assert_eq!(exit_code(ended(libc::SIGKILL)), 137);
        assert_eq!(exit_code(ended(libc::SIGSEGV)), 139);
    }

    /// A guest that has ended, with a thread that still passes lines on until
    /// the sender goes.
    fn guest(status: i32) -> (Running, Sender<()>) {
        let (sender, receiver) = mpsc::channel::<()>();
        let lines = thread::spawn(move || while receiver.recv().is_ok() {});
        let guest = Running {
            name: "g".to_owned(),
            pid: getpid(),
            lines: vec![lines],
            ended: Some(ExitStatus::from_raw(status)),
        };
        (guest, sender)
    }

    #[test]
    fn first_guest_that_failed_gives_the_status() {
        let guests = [0, 19 << 8, libc::SIGKILL].map(|status| guest(status).0);
        assert_eq!(first_failure(&guests), 19);
        assert_eq!(first_failure(&guests[..1]), 0);
    }

    #[test]
    fn lines_are_waited_for_up_to_the_limit() {
        let (stuck, sender) = guest(0);
        assert!(!finish_lines(vec![stuck], Duration::from_millis(20)));
        drop(sender);
        let (slow, sender) = guest(0);
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            drop(sender);
        });
        assert!(finish_lines(vec![slow], Duration::from_secs(60)));
    }
}
