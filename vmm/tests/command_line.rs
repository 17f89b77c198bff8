//! The program as a user meets it: messages and exit statuses of the `vmm`
//! binary, as far as they do not depend on what the host can run.

// The helpers of the tests are tests as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use common::{command, kernel, within_a_second};
use rustix::process::{Pid, Signal, kill_process};

fn vmm(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// Waits until `done`, for as long as a busy machine may need.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The end of a process that should end.
fn ended(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the process ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Runs `vmm`; checks the status and that the message holds each text.
fn fails(args: &[&str], status: i32, texts: &[&str]) {
    let output = vmm(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {message}");
    for text in texts {
        assert!(
            message.contains(text),
            "{args:?}: no {text:?} in: {message}"
        );
    }
}

#[test]
fn help_lists_the_exit_statuses_and_keys() {
    let output = vmm(&["--help"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    for expected in ["--kernel", "16  the guest rebooted", "Ctrl-A x"] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn wrong_command_lines_are_usage_errors() {
    fails(&[], 2, &["--kernel"]);
    fails(&["--kernel"], 2, &["--kernel"]);
    fails(&["--nonsense"], 2, &["--nonsense"]);
    fails(&["--kernel", "k", "--memory", "lots"], 2, &["lots", "512M"]);
    fails(&["--kernel", "k", "--disk", ""], 2, &["PATH"]);
    fails(
        &["--kernel", "k", "--vsock", "3"],
        2,
        &["cid=N,path=SOCKET"],
    );
    fails(&["--kernel", "k", "--console", "x"], 2, &["stdio"]);
}

#[test]
fn impossible_guests_are_usage_errors() {
    fails(
        &["--kernel", "k", "--cpus", "0"],
        2,
        &["0 vCPUs", "1 to 32"],
    );
    fails(
        &["--kernel", "k", "--cpus", "33"],
        2,
        &["33 vCPUs", "1 to 32"],
    );
    fails(&["--kernel", "k", "--memory", "0"], 2, &["0 bytes"]);
    fails(&["--kernel", "k", "--memory", "3M"], 2, &["2 MiB"]);
    fails(&["--kernel", "k", "--memory", "1000T"], 2, &["255 GiB"]);
}

#[test]
fn bad_files_are_named() {
    fails(
        &["--kernel", "/nonexistent"],
        1,
        &["/nonexistent", "No such file"],
    );
    fails(&["--kernel", "/proc/self"], 1, &["/proc/self", "directory"]);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let empty = file("empty", b"");
    fails(&["--kernel", &empty], 1, &[&empty, "is empty"]);
    let text = file("text", b"hello\n");
    fails(&["--kernel", &text], 1, &[&text, "it is text"]);
    let elf = file("elf", b"\x7fELF\x02\x01\x01");
    fails(&["--kernel", &elf], 1, &[&elf, "truncated"]);
}

#[test]
fn run_tells_within_a_second_what_became_of_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path());
    let can_boot = vmm(&["doctor"]).status.code() != Some(21);
    let in_time = within_a_second(|| {
        if can_boot {
            fails(&["--kernel", &kernel, "--console", "off"], 0, &[]);
        } else {
            fails(
                &["--kernel", &kernel],
                1,
                &["this host cannot run the guest"],
            );
        }
    });
    assert!(in_time);
}

#[test]
fn doctor_gives_verdicts_as_text_and_json() {
    let text = vmm(&["doctor"]);
    assert!(matches!(text.status.code(), Some(0 | 20 | 21)));
    let lines = String::from_utf8_lossy(&text.stdout).into_owned();
    let last = lines.lines().last().unwrap();
    assert!(last.contains("can boot Linux guests: "), "{last}");
    assert!(lines.lines().count() <= 25, "one screen: {lines}");
    let json = vmm(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(report["can_boot_linux"].is_boolean());
    assert!(report["shared_tables"].is_boolean());
    assert_eq!(json.status.code(), text.status.code());
}

/// A broker that takes connections and says nothing.
struct MuteBroker {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl MuteBroker {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("pool")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { dir, listener }
    }

    /// Runs `vmm pool` until it has connected.
    fn ask(&self, args: &[&str]) -> (Child, std::os::unix::net::UnixStream) {
        let socket = self.dir.path().join("pool");
        let mut command = command(&["pool", "--socket", socket.to_str().unwrap()]);
        command.args(args).stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: signal may be called between fork and exec. A shell without
        // job control lets programs in the background ignore SIGINT.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let mut connection = None;
        wait_until("vmm pool connects", || {
            connection = self.listener.accept().ok();
            connection.is_some()
        });
        (child, connection.unwrap().0)
    }
}

#[test]
fn requests_to_a_broker_end_by_signals() {
    let broker = MuteBroker::new();
    for (args, signal) in [
        (&["ls"][..], Signal::INT),
        (&["fill", "x", "-"], Signal::INT),
        (&["stat"], Signal::TERM),
        (&["rm", "x"], Signal::HUP),
        (&["read", "x"], Signal::QUIT),
    ] {
        let (mut child, _connection) = broker.ask(args);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = ended(&mut child);
        assert_eq!(status.signal(), Some(signal.as_raw()), "{args:?}: {status}");
    }
}

#[test]
fn request_to_a_silent_broker_says_what_it_waits_for() {
    let broker = MuteBroker::new();
    let (mut child, _connection) = broker.ask(&["ls"]);
    let mut text = String::new();
    // It comes while the program still waits, or the line would be another.
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    lines.read_line(&mut text).unwrap();
    let socket = broker.dir.path().join("pool");
    let expected = format!("vmm: waiting for the broker at {}", socket.display());
    assert!(text.contains(&expected), "{text}");
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    ended(&mut child);
}

#[test]
fn broker_and_request_at_once_are_a_usage_error() {
    for option in [&["--size", "1G"][..], &["--recover"]] {
        let args = [&["pool", "--socket", "/nonexistent"], option, &["ls"]].concat();
        fails(&args, 2, &["--size", "--recover"]);
    }
    fails(&["pool", "ls"], 2, &["--socket"]);
}

#[test]
fn last_lines_of_all_guests_are_passed_on() {
    for _ in 0..5 {
        let output = vmm(&["--guests", "16", "--kernel", "/nonexistent"]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr);
        for n in 0..16 {
            let line = format!("guest{n} | vmm: cannot open the kernel");
            assert!(text.contains(&line), "no {line:?} in: {text}");
        }
    }
}

/// The processes whose parent is `parent`.
fn children(parent: u32) -> Vec<Pid> {
    let parent_of = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Behind the name, which may hold anything: the state and the parent.
        let rest = stat.rsplit_once(") ")?.1;
        rest.split(' ').nth(1)?.parse::<u32>().ok()
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| parent_of(name) == Some(parent))
        .filter_map(|name| Pid::from_raw(name.parse().ok()?))
        .collect()
}

#[test]
fn guest_that_a_signal_killed_gives_128_and_its_number() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..2 {
        let path = dir.path().join(format!("console{n}"));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    }
    // A guest waits for somebody who reads its console.
    let console = format!("file={}", dir.path().join("console{n}").display());
    let kernel = kernel(dir.path());
    let args = ["--guests", "2", "--kernel", &kernel, "--console", &console];
    let mut child = command(&args).stderr(Stdio::piped()).spawn().unwrap();
    let mut guests = Vec::new();
    wait_until("both guests run", || {
        guests = children(child.id());
        guests.len() == 2
    });
    for guest in guests {
        kill_process(guest, Signal::KILL).unwrap();
    }
    assert_eq!(ended(&mut child).code(), Some(128 + libc::SIGKILL));
    let mut text = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut text).unwrap();
    assert!(text.contains("guest1: killed by signal 9"), "{text}");
}

/// A process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It fails only if the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn file_that_grows_too_large_is_an_error_and_no_death() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("pool");
    let socket = socket.to_str().unwrap();
    let _broker = Killed(
        command(&["pool", "--socket", socket, "--size", "4M"])
            .spawn()
            .unwrap(),
    );
    wait_until("the broker serves", || {
        vmm(&["pool", "--socket", socket, "ls"]).status.success()
    });
    let pool = |args: &[&str]| command(&[&["pool", "--socket", socket], args].concat());
    let create = ["create", "a", "--address", "0x100000000000", "--len", "2M"];
    assert!(pool(&create).output().unwrap().status.success());
    let mut read = pool(&["read", "a"]);
    read.stdout(File::create(dir.path().join("copy")).unwrap());
    // SAFETY: the call may be made between fork and exec.
    unsafe {
        read.pre_exec(|| {
            let limit = libc::rlimit {
                rlim_cur: 4096,
                rlim_max: 4096,
            };
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
            Ok(())
        });
    }
    let output = read.stderr(Stdio::piped()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{}: {text}", output.status);
    assert!(text.contains("File too large"), "{text}");
}
