//! A guest that has been assembled: its threads, and the end of its run.
//!
//! | thread    | does                                                        |
//! |-----------|-------------------------------------------------------------|
//! | (main)    | waits for the end or a signal, stops the others             |
//! | `vcpuN`   | runs the guest, serves register accesses                    |
//! | `devices` | serves queues, sockets, disks and the console's input       |

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::devices::{EventLoop, EventLoopHandle};
use crate::exit::{Exit, GuestExit, StoppedBy};
use crate::signals::Signals;
use crate::vstate::vcpu::{self, Buses, Vcpu, VcpuHandle};
use crate::vstate::vm::Vm;

/// How long a guest that reported a panic may go on printing.
const PANIC_GRACE: Duration = Duration::from_millis(250);
/// How long the `devices` thread is waited for at the end.
const DEVICES_TIMEOUT: Duration = Duration::from_secs(1);

/// A run that could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// The `devices` thread.
    #[error("cannot start the devices thread")]
    Thread(#[source] io::Error),
    /// Waiting for the end.
    #[error("cannot wait for the guest")]
    Wait(#[source] io::Error),
}

/// A guest that is ready to run.
#[derive(Debug)]
pub struct Machine {
    // Kept to the end: the machine owns the guest's memory slots.
    pub(crate) vm: Arc<Vm>,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) buses: Buses,
    pub(crate) devices: DevicesThread,
    pub(crate) exit: Exit,
}

impl Machine {
    /// The virtual machine.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Where the end of the run is reported.
    pub fn exit(&self) -> &Exit {
        &self.exit
    }

    /// Runs the guest to its end. `signals`, if given, end it as well.
    ///
    /// # Errors
    ///
    /// A thread cannot be started.
    pub fn run(self, mut signals: Option<Signals>) -> Result<GuestExit, Error> {
        vcpu::install_kick_handler()?;
        let devices = self.devices.start(self.exit.clone())?;
        let mut running = Vec::with_capacity(self.vcpus.len());
        let mut failed = None;
        for vcpu in self.vcpus {
            match vcpu.start(self.buses.clone(), self.exit.clone()) {
                Ok(handle) => running.push(handle),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let result = match failed {
            Some(error) => Err(error.into()),
            None => wait(&self.exit, signals.as_mut()),
        };
        let ending = Instant::now();
        // From here on nothing waits for the console any more.
        if result.is_err() {
            self.exit.report(GuestExit::Stopped(StoppedBy::Caller));
        }
        VcpuHandle::stop_all(running);
        devices.stop();
        log::debug!("threads stopped in {:?}", ending.elapsed());
        result
    }
}

/// Waits until the end has been reported or a signal comes.
fn wait(exit: &Exit, mut signals: Option<&mut Signals>) -> Result<GuestExit, Error> {
    let mut deadline: Option<Instant> = None;
    loop {
        let timeout = deadline.map(|d| {
            let left = d.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or_default()
        });
        {
            // SAFETY: the exit outlives the borrow.
            let event = unsafe { BorrowedFd::borrow_raw(exit.event().as_raw_fd()) };
            let mut fds = vec![PollFd::from_borrowed_fd(event, PollFlags::IN)];
            if let Some(signals) = &signals {
                fds.push(PollFd::new(*signals, PollFlags::IN));
            }
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::Wait(e.into())),
            }
        }
        if let Some(signal) = signals.as_mut().and_then(|s| s.pending()) {
            exit.report(GuestExit::Stopped(StoppedBy::Signal(signal)));
            return Ok(exit
                .reported()
                .unwrap_or(GuestExit::Stopped(StoppedBy::Signal(signal))));
        }
        let woken = exit.event().read().is_ok();
        match (exit.reported(), deadline) {
            (None, _) => {}
            // Linux tells about a panic before it has printed all of it. It is
            // done when it reboots or powers off, or after a while.
            (Some(GuestExit::Panicked), None) => deadline = Some(Instant::now() + PANIC_GRACE),
            (Some(reason), Some(deadline)) => {
                if woken || Instant::now() >= deadline {
                    return Ok(reason);
                }
            }
            (Some(reason), None) => return Ok(reason),
        }
    }
}

/// The `devices` thread before it starts: the event loop can take subscribers.
pub struct DevicesThread {
    event_loop: EventLoop,
}

impl std::fmt::Debug for DevicesThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DevicesThread")
    }
}

impl DevicesThread {
    /// A thread for `event_loop`.
    pub fn new(event_loop: EventLoop) -> Self {
        Self { event_loop }
    }

    fn start(self, exit: Exit) -> Result<RunningDevices, Error> {
        let handle = self.event_loop.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let mut event_loop = self.event_loop;
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("devices".into())
            .spawn(move || {
                let _guard = exit.unless_panic("the devices thread");
                while !stopping.load(Ordering::Acquire) {
                    if let Err(error) = event_loop.run() {
                        let what = format!("the devices thread cannot wait for events: {error}");
                        exit.report(GuestExit::VmmFailed(what));
                        return;
                    }
                }
            })
            .map_err(Error::Thread)?;
        Ok(RunningDevices {
            stop,
            handle,
            thread,
        })
    }
}

struct RunningDevices {
    stop: Arc<AtomicBool>,
    handle: EventLoopHandle,
    thread: JoinHandle<()>,
}

impl RunningDevices {
    /// Ends the thread. One that hangs in a host call (a disk on a dead
    /// server) is left behind.
    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        if self.handle.kick().is_err() {
            log::debug!("the devices thread has ended already");
        }
        let deadline = Instant::now() + DEVICES_TIMEOUT;
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                log::error!("the devices thread does not stop; leaving it behind");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
