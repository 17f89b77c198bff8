//! The terminal is as it was before, however a process in raw mode ends.
//!
//! Each test starts this program again, as the foreground process of a new
//! pseudo-terminal, lets it end in one way and looks at the terminal.

// The helpers of the tests are tests as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

use rustix::termios::{LocalModes, Termios, tcgetattr};
use vmm::terminal::RawMode;

const MODE: &str = "VMM_TEST_TERMINAL_MODE";

/// A new pseudo-terminal: the person's end and the program's end.
fn pty() -> (File, OwnedFd) {
    let pair = rustix_openpty::openpty(None, None).unwrap();
    (pair.controller.into(), pair.user)
}

fn modes(terminal: &impl AsFd) -> (u32, u32, u32, u32) {
    let t: Termios = tcgetattr(terminal).unwrap();
    (
        t.input_modes.bits(),
        t.output_modes.bits(),
        t.control_modes.bits(),
        t.local_modes.bits(),
    )
}

/// Runs `child` with `mode` at a terminal; checks that the terminal ends up as
/// it started.
fn run(mode: &str) -> ExitStatus {
    let (_person, program) = pty();
    let before = modes(&program);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(MODE, mode)
        .stdin(Stdio::from(program.try_clone().unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: both calls may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let status = command.status().unwrap();
    assert_eq!(modes(&program), before, "{mode}: {status}");
    status
}

/// Not a test: what the tests start.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    let Ok(mode) = std::env::var(MODE) else {
        return;
    };
    let stdin = std::io::stdin();
    let is_raw = || {
        let modes = tcgetattr(stdin.as_fd()).unwrap().local_modes;
        !modes.contains(LocalModes::ICANON) && !modes.contains(LocalModes::ISIG)
    };
    assert!(!is_raw());
    let raw = RawMode::enter().unwrap().expect("a terminal");
    assert!(is_raw());
    match mode.as_str() {
        "return" => {
            drop(raw);
            assert!(!is_raw());
        }
        "panic" => panic!("as asked"),
        "panic-elsewhere" => {
            let thread = std::thread::spawn(|| panic!("as asked"));
            assert!(thread.join().is_err());
            std::mem::forget(raw);
            assert!(!is_raw());
        }
        "abort" => std::process::abort(),
        signal => {
            let signal: i32 = signal.parse().unwrap();
            // SAFETY: raising a signal has no preconditions.
            unsafe { libc::raise(signal) };
        }
    }
}

#[test]
fn terminal_is_restored_after_a_return() {
    assert!(run("return").success());
}

#[test]
fn terminal_is_restored_after_a_panic() {
    assert!(!run("panic").success());
}

#[test]
fn terminal_is_restored_after_a_panic_of_another_thread() {
    assert!(run("panic-elsewhere").success());
}

#[test]
fn terminal_is_restored_after_fatal_signals() {
    assert_eq!(run("abort").signal(), Some(libc::SIGABRT));
    for signal in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
        libc::SIGXCPU,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGUSR1,
        libc::SIGUSR2,
    ] {
        assert_eq!(run(&signal.to_string()).signal(), Some(signal));
    }
}
