//! Waits for children: those that the agent started, and, as PID 1, everybody
//! else's orphans.
//!
//! One thread reaps for the whole process, since a `waitpid(-1)` anywhere else
//! would take exit statuses away from who waits for them. It reaps only while
//! it holds the table's lock, and processes are started and signalled under
//! the same lock: a registered child that has not been reaped keeps its id, so
//! a signal never reaches a stranger.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, wait, waitid};

/// The children and what became of them.
#[derive(Debug, Default)]
pub struct Reaper {
    /// Registered children; the status of those that have ended.
    children: Mutex<BTreeMap<i32, Option<ExitStatus>>>,
    /// A child has been started or has ended.
    changed: Condvar,
}

static REAPER: OnceLock<Reaper> = OnceLock::new();

/// The reaper of this process; its thread starts with the first use.
///
/// # Errors
/// If the thread cannot be started.
pub fn reaper() -> io::Result<&'static Reaper> {
    static STARTED: Mutex<bool> = Mutex::new(false);
    let reaper = REAPER.get_or_init(Reaper::default);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*started {
        thread::Builder::new()
            .name("reaper".into())
            .spawn(|| reaper.run())?;
        *started = true;
    }
    Ok(reaper)
}

impl Reaper {
    /// Starts a process and registers it. Whoever starts it waits for it.
    ///
    /// # Errors
    /// What starting it reports.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Child, i32)> {
        let mut children = self.lock();
        let child = command.spawn()?;
        let pid = child.id().cast_signed();
        children.insert(pid, None);
        drop(children);
        self.changed.notify_all();
        Ok((child, pid))
    }

    /// Sends a signal to a registered child, and to its process group if
    /// `group` is set. Does nothing if the child has ended.
    pub fn kill(&self, pid: i32, group: bool) {
        let children = self.lock();
        if !matches!(children.get(&pid), Some(None)) {
            return;
        }
        if let Some(id) = Pid::from_raw(pid) {
            // ESRCH: it is ending at this moment. Nothing else can happen.
            let _ = rustix::process::kill_process(id, Signal::KILL);
            if group {
                let _ = rustix::process::kill_process_group(id, Signal::KILL);
            }
        }
    }

    /// Waits for a registered child and forgets it; `None` when the time is
    /// up, or if there is no such child.
    pub fn wait(&self, pid: i32, timeout: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + timeout;
        let mut children = self.lock();
        loop {
            match children.get(&pid)? {
                Some(status) => {
                    let status = *status;
                    children.remove(&pid);
                    return Some(status);
                }
                None => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    children = self
                        .changed
                        .wait_timeout(children, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, Option<ExitStatus>>> {
        // Each change is one insertion or removal: a panic leaves no half.
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            // Look without reaping: outside the lock nothing may be reaped.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            if waitid(WaitId::All, options).is_err_and(|e| e == rustix::io::Errno::CHILD) {
                // No children, so no orphans either: wait for a start. The
                // time limit covers one between the look and the lock.
                let children = self.lock();
                drop(
                    self.changed
                        .wait_timeout(children, Duration::from_millis(100)),
                );
                continue;
            }
            let mut children = self.lock();
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                if let Some(slot) = children.get_mut(&pid.as_raw_pid()) {
                    *slot = Some(ExitStatus::from_raw(status.as_raw()));
                }
            }
            drop(children);
            self.changed.notify_all();
        }
    }
}

/// The status as a shell reports it: 128 + the signal if one ended it.
pub fn shell_status(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
