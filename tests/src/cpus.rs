//! Which CPU of the lab a virtual machine runs on.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::lab::IN_LAB;

/// Calls `start`; in the lab, processes and threads that it starts stay on one
/// CPU for ever, another one with each call.
///
/// The emulator loses a virtual machine now and then whose vCPU moves from one
/// emulated CPU to another (`docs/testing.md`). Elsewhere nothing is bound.
///
/// # Errors
/// The system's, if the calling thread cannot be bound and released again.
pub fn on_one<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    if std::env::var_os(IN_LAB).is_some() {
        bound(start)
    } else {
        Ok(start())
    }
}

/// Calls `start` while this thread is bound to the CPU whose turn it is.
fn bound<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let all = sched_getaffinity(None)?;
    let turn = TURN.fetch_add(1, Ordering::Relaxed) % (all.count() as usize).max(1);
    let mut one = CpuSet::new();
    if let Some(cpu) = (0..CpuSet::MAX_CPU)
        .filter(|&cpu| all.is_set(cpu))
        .nth(turn)
    {
        one.set(cpu);
    }
    sched_setaffinity(None, &one)?;
    let started = start();
    sched_setaffinity(None, &all)?;
    Ok(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_started_has_one_cpu_and_the_caller_keeps_all() {
        let before = sched_getaffinity(None).unwrap();
        let started = || std::thread::spawn(|| sched_getaffinity(None).unwrap());
        let cpus = bound(started).unwrap().join().unwrap();
        assert_eq!(cpus.count(), 1);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
        let next = bound(started).unwrap().join().unwrap();
        assert_eq!(next == cpus, before.count() == 1);
    }
}
