//! Runs a test program and shows what it and the kernel say, line by line in
//! one stream: on a console that both write to, they cut each other's lines.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use mshare_protocol::agent::Failure;

use crate::exec;
use crate::reaper::shell_status;

/// Status of a program that ran out of time, as `timeout(1)` has it.
const TIMED_OUT: i32 = 124;
const KMSG: &str = "/dev/kmsg";
/// Between two looks at what has no way to wake us.
const PAUSE: Duration = Duration::from_millis(10);
/// How long to wait for output once the program has ended.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the kernel has to describe what hangs.
const REPORT: Duration = Duration::from_secs(3);
/// CPU flags that say how this guest was set up.
const FLAGS: [&str; 3] = ["la57", "pti", "smep"];

/// What to run, and where.
#[derive(Debug, Args)]
pub struct Watch {
    /// Seconds for the program; then the kernel is asked what hangs
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Write a value to a file first
    #[arg(long = "write", value_name = "PATH=VALUE", value_parser = pair)]
    writes: Vec<(String, String)>,
    /// Set a variable of the environment
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| format!("{text:?} has no '='"))
}

/// Runs it and gives its status as a shell would.
///
/// # Errors
/// If the program cannot be started or what was to be written cannot be.
pub fn run(watch: &Watch) -> Result<i32, Failure> {
    let failed = |what: String| move |e: io::Error| Failure::os(what, &e);
    let kmsg = open_kmsg().map_err(failed(format!("read {KMSG}")))?;
    // From here on only a dying kernel writes to the console itself.
    fs::write("/proc/sys/kernel/printk", "1").map_err(failed("quiet the console".into()))?;
    for (path, value) in &watch.writes {
        fs::write(path, value).map_err(failed(format!("write {value:?} to {path}")))?;
    }
    line(format!("guest: {}", setting()).as_bytes());

    let (reader, writer) = io::pipe().map_err(failed("make a pipe".into()))?;
    let errors = writer.try_clone().map_err(failed("make a pipe".into()))?;
    let mut command = exec::command(&watch.command)?;
    command
        .envs(watch.env.iter().cloned())
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .process_group(0);
    let mut child = command
        .spawn()
        .map_err(failed(format!("run {:?}", watch.command.join(" "))))?;
    // The command holds our ends of the pipe.
    drop(command);

    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let kernel = thread::spawn(move || follow(kmsg, &stopped));
    let (send, drained) = mpsc::channel();
    thread::spawn(move || {
        copy(reader);
        // Nobody may be waiting any more.
        let _ = send.send(());
    });

    let status = wait(&mut child, Duration::from_secs(watch.limit))
        .map_err(failed("wait for the program".into()))?;
    // What it left in the background may keep the pipe open for ever.
    if drained.recv_timeout(DRAIN).is_err() {
        line(b"guest: the program left processes behind that hold its output");
    }
    stop.store(true, Ordering::Release);
    if kernel.join().is_err() {
        return Err(Failure::new("the reader of the kernel log died"));
    }
    Ok(status)
}

fn open_kmsg() -> io::Result<File> {
    let mut kmsg = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(KMSG)?;
    // What there is already is on the console.
    kmsg.seek(SeekFrom::End(0))?;
    Ok(kmsg)
}

/// Waits for the program; one that runs out of time leaves word of what hangs.
fn wait(child: &mut Child, limit: Duration) -> io::Result<i32> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(shell_status(status));
        }
        if Instant::now() > deadline {
            break;
        }
        thread::sleep(PAUSE);
    }
    line(format!("guest: the program was not done after {limit:?}").as_bytes());
    // Blocked tasks, then what the CPUs are at.
    for key in ["w", "l"] {
        fs::write("/proc/sysrq-trigger", key)?;
    }
    thread::sleep(REPORT);
    child.kill()?;
    Ok(TIMED_OUT)
}

/// Passes the program's output on, whole lines only.
fn copy(from: impl Read) {
    let mut from = BufReader::new(from);
    let mut buffer = Vec::new();
    while from.read_until(b'\n', &mut buffer).is_ok_and(|n| n > 0) {
        if buffer.ends_with(b"\n") {
            buffer.pop();
        }
        line(&buffer);
        buffer.clear();
    }
}

/// Passes the kernel's messages on until `stop` is set and none is left.
fn follow(mut kmsg: File, stop: &AtomicBool) {
    let mut record = vec![0; 8192];
    loop {
        let last = stop.load(Ordering::Acquire);
        match kmsg.read(&mut record) {
            Ok(len) => {
                if let Some(text) = message(&String::from_utf8_lossy(&record[..len])) {
                    line(format!("kernel: {text}").as_bytes());
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if last {
                    return;
                }
                thread::sleep(PAUSE);
            }
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {
                line(b"kernel: messages were lost");
            }
            Err(e) => {
                line(format!("kernel: messages cannot be read: {e}").as_bytes());
                return;
            }
        }
    }
}

/// "6,339,5140900,-;text\n KEY=value\n" as the console would show it.
fn message(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    let text = text.lines().next().unwrap_or_default();
    let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
    Some(format!("[{seconds:5}.{micros:06}] {text}"))
}

/// Writes a line in one piece; without a console there is nothing to be done.
fn line(text: &[u8]) {
    let mut whole = Vec::with_capacity(text.len() + 1);
    whole.extend_from_slice(text);
    whole.push(b'\n');
    let mut out = io::stdout().lock();
    let _ = out.write_all(&whole).and_then(|()| out.flush());
}

/// How this guest is set up, as far as it shows: "cpus 0-3 flags la57 pti".
fn setting() -> String {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .map_or("", |(_, flags)| flags);
    let found: Vec<&str> = FLAGS
        .into_iter()
        .filter(|known| flags.split_whitespace().any(|flag| flag == *known))
        .collect();
    format!("cpus {} flags {}", online.trim(), found.join(" "))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn record_becomes_a_console_line() {
        let record = "4,339,5140900,-;WARNING: CPU: 0 PID: 1 at x\n SUBSYSTEM=y\n";
        assert_eq!(
            message(record).unwrap(),
            "[    5.140900] WARNING: CPU: 0 PID: 1 at x"
        );
        assert_eq!(message("no record"), None);
    }

    #[test]
    fn pair_needs_an_equals_sign() {
        assert_eq!(pair("/a=b=c").unwrap(), ("/a".into(), "b=c".into()));
        pair("/a").unwrap_err();
    }

    #[test]
    fn program_in_time_gives_its_status() {
        let mut child = Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap();
        assert_eq!(wait(&mut child, Duration::from_secs(60)).unwrap(), 3);
    }
}
