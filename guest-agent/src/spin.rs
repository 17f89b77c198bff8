//! The background spinner: one thread that accesses one word in a loop and
//! publishes, after every access, how far it got and when.

use std::arch::x86_64::_rdtsc;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mshare_protocol::agent::{Fault, Spin, SpinKind};
use rustix::time::{ClockId, clock_gettime};

use crate::access;

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    iterations: AtomicU64,
    last_value: AtomicU64,
    changes: AtomicU64,
    /// Time-stamp counter after the last successful access: reading it costs
    /// a few nanoseconds, a clock in a guest may cost a system call.
    last_tsc: AtomicU64,
    fault: OnceLock<Fault>,
}

/// A running or ended spinner.
#[derive(Debug)]
pub struct Spinner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Counter and clock at the start, to turn one into the other.
    origin: (u64, u64),
}

impl Spinner {
    /// Starts to access the word at `addr`.
    ///
    /// # Errors
    /// If no thread can be started.
    ///
    /// # Safety
    /// As [`access::load`], until the spinner is stopped.
    pub unsafe fn start(addr: u64, kind: SpinKind) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let origin = (tsc(), monotonic_ns());
        shared.last_tsc.store(origin.0, Relaxed);
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("spin".into())
            // SAFETY: passed on from our caller.
            .spawn(move || unsafe { spin(addr, kind, &theirs) })?;
        Ok(Self {
            shared,
            thread: Some(thread),
            origin,
        })
    }

    /// What it did so far.
    pub fn report(&self) -> Spin {
        let running = self.thread.as_ref().is_some_and(|t| !t.is_finished());
        let shared = &self.shared;
        let fault = shared.fault.get().copied();
        let (tsc0, ns0) = self.origin;
        let (tsc1, now_ns) = (tsc(), monotonic_ns());
        let ago = u128::from(tsc1.saturating_sub(shared.last_tsc.load(Acquire)))
            * u128::from(now_ns.saturating_sub(ns0))
            / u128::from(tsc1.saturating_sub(tsc0).max(1));
        Spin {
            running,
            iterations: shared.iterations.load(Relaxed),
            last_value: shared.last_value.load(Relaxed),
            changes: shared.changes.load(Relaxed),
            last_ok_ns: now_ns.saturating_sub(u64::try_from(ago).unwrap_or(0)),
            now_ns,
            fault,
        }
    }

    /// How many accesses it makes from now on in a time, which is waited for
    /// without sleeping: in a sleep the CPU would flush by itself.
    pub fn accesses_within(&self, time: Duration) -> u64 {
        let before = self.shared.iterations.load(Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < time {
            std::hint::spin_loop();
        }
        self.shared.iterations.load(Relaxed) - before
    }

    /// Stops it and reports.
    pub fn stop(mut self) -> Spin {
        self.halt();
        self.report()
    }

    fn halt(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // It holds no lock and does not panic; an error says nothing new.
            drop(thread.join());
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.halt();
    }
}

/// # Safety
/// As [`access::load`].
unsafe fn spin(addr: u64, kind: SpinKind, shared: &Shared) {
    let mut last = None;
    let (mut iterations, mut changes) = (0u64, 0u64);
    while !shared.stop.load(Relaxed) {
        let result = match kind {
            // SAFETY: passed on from our caller.
            SpinKind::Read => unsafe { access::load(addr) },
            SpinKind::Write => {
                let value = iterations + 1;
                // SAFETY: passed on from our caller.
                unsafe { access::store(addr, value) }.map(|()| value)
            }
        };
        match result {
            Ok(value) => {
                iterations += 1;
                if last.is_some_and(|last| last != value) {
                    changes += 1;
                    shared.changes.store(changes, Relaxed);
                }
                last = Some(value);
                shared.last_value.store(value, Relaxed);
                shared.iterations.store(iterations, Relaxed);
                shared.last_tsc.store(tsc(), Relaxed);
            }
            Err(fault) => {
                // The first and only fault: the loop ends with it.
                let _ = shared.fault.set(fault);
                return;
            }
        }
    }
}

fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has rdtsc, and Linux lets user mode use it.
    unsafe { _rdtsc() }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let ns = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    u64::try_from(ns).unwrap_or(0)
}
