//! The terminal of the person at the console: raw while the guest runs, and
//! as it was afterwards, however the run ends.
//!
//! Three things restore it: dropping [`RawMode`] (every return, and signals
//! that the main thread waits for), a panic hook (the message must be
//! readable), and a handler of the fatal signals (SIGSEGV and its kin).
//! SIGKILL cannot be handled; `stty sane` repairs what it leaves behind.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

/// The settings to go back to. Set once per process: a second guest in the
/// same process must find the same terminal.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

const TERMINAL: i32 = libc::STDIN_FILENO;
/// What ends a process by default, without the signals that the main thread
/// waits for.
const FATAL_SIGNALS: [i32; 12] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGXCPU,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// A terminal that could not be switched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings could not be read.
    #[error("cannot read the settings of the terminal")]
    Read(#[source] io::Error),
    /// The settings could not be changed.
    #[error("cannot switch the terminal to raw mode")]
    Write(#[source] io::Error),
}

/// Standard input in raw mode; dropping it restores the terminal.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Switches standard input to raw mode if it is a terminal and ours: a
    /// process in the background may not touch it.
    ///
    /// # Errors
    ///
    /// The terminal refuses.
    pub fn enter() -> Result<Option<Self>, Error> {
        let stdin = io::stdin();
        if !rustix::termios::isatty(stdin.as_fd()) || !in_foreground() {
            return Ok(None);
        }
        let original = current().map_err(Error::Read)?;
        let original = *ORIGINAL.get_or_init(|| original);
        install_hooks();
        let mut raw = original;
        // SAFETY: `raw` is a valid termios for the duration of the call.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // The VMM's own messages still need their carriage returns.
        raw.c_oflag = original.c_oflag;
        apply(&raw).map_err(Error::Write)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin().as_fd())
        .is_ok_and(|group| group == rustix::process::getpgrp())
}

fn current() -> io::Result<libc::termios> {
    // SAFETY: all-zero bytes are a valid termios.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `settings` is valid for writes during the call.
    match unsafe { libc::tcgetattr(io::stdin().as_raw_fd(), &raw mut settings) } {
        0 => Ok(settings),
        _ => Err(io::Error::last_os_error()),
    }
}

fn apply(settings: &libc::termios) -> io::Result<()> {
    // SAFETY: `settings` is valid for the call.
    match unsafe { libc::tcsetattr(TERMINAL, libc::TCSANOW, settings) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts the terminal back. May be called at any time, also in a signal
/// handler: it reads a cell that is set once and makes one system call.
fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // A terminal that is gone needs no restoring.
        let _ = apply(original);
    }
}

fn install_hooks() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            print(info);
        }));
        for signal in FATAL_SIGNALS {
            install_fatal_handler(signal);
        }
    });
}

fn install_fatal_handler(signal: i32) {
    extern "C" fn handler(signal: i32) {
        restore();
        // The handler was reset to the default (SA_RESETHAND), so this ends
        // the process as if there had been no handler.
        // SAFETY: raise may be called in a signal handler.
        unsafe { libc::raise(signal) };
    }
    // SAFETY: an all-zero sigaction is valid: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as extern "C" fn(i32) as usize;
    action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: the handler makes async-signal-safe calls only.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}
