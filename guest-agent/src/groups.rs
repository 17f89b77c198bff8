//! Groups of worker processes, from the agent's side.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use mshare_protocol::agent::{Failure, GroupInfo, Op, OpError, Outcome, Run, StartGroup, Value};
use mshare_protocol::frame::{self, FrameError};
use rustix::process::{Pid, Resource, getrlimit, setrlimit};

use crate::reaper::Reaper;

/// Limits a typing error, not a machine.
const MAX_PROCESSES: u32 = 4096;
/// How long an operation may take if the request does not say.
const TIMEOUT: Duration = Duration::from_secs(240);
/// How long a worker may take to exit when asked to.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// One worker process.
#[derive(Debug)]
struct Worker {
    index: u32,
    pid: i32,
    /// Held during an operation.
    channel: Mutex<Channel>,
    /// How it ended, if that was found during an operation. The reaper tells it
    /// once.
    ended: OnceLock<ExitStatus>,
}

#[derive(Debug)]
enum Channel {
    Open(UnixStream),
    /// The process is gone, and why.
    Closed(String),
}

type Group = Arc<Vec<Worker>>;

/// All groups by name.
#[derive(Debug)]
pub struct Groups {
    groups: Mutex<BTreeMap<String, Group>>,
    reaper: &'static Reaper,
}

impl Groups {
    /// No groups yet.
    pub fn new(reaper: &'static Reaper) -> Self {
        allow_descriptors();
        Self {
            groups: Mutex::default(),
            reaper,
        }
    }

    /// Starts a group.
    ///
    /// # Errors
    /// If the name is taken or processes cannot be started; then none stays.
    pub fn start(&self, start: StartGroup) -> Result<Vec<Outcome>, Failure> {
        if start.processes == 0 || start.processes > MAX_PROCESSES {
            return Err(Failure::new(format!(
                "{} processes: a group has 1 to {MAX_PROCESSES}",
                start.processes
            )));
        }
        // Take the name first, so that two requests cannot both start it.
        let workers = {
            let mut groups = self.lock();
            if groups.contains_key(&start.group) {
                return Err(Failure {
                    errno: libc::EEXIST,
                    message: format!("there is a group {:?}: stop it first", start.group),
                });
            }
            let workers = Arc::new(self.spawn_all(start.processes, &start.pin)?);
            groups.insert(start.group, Arc::clone(&workers));
            workers
        };
        Ok(match start.map {
            Some(map) => {
                let op = Op::Map { slot: 0, map };
                self.run_all(workers.iter().collect(), &op, TIMEOUT)
            }
            None => workers
                .iter()
                .map(|worker| worker.outcome(Ok(Value::Done)))
                .collect(),
        })
    }

    /// Runs an operation in a group.
    ///
    /// # Errors
    /// If there is no such group or process.
    pub fn run(&self, run: &Run) -> Result<Vec<Outcome>, Failure> {
        let group = self.find(&run.group)?;
        let workers = match run.process {
            None => group.iter().collect(),
            Some(index) => vec![find_process(&group, &run.group, index)?],
        };
        let timeout = match run.timeout_ms {
            0 => TIMEOUT,
            ms => Duration::from_millis(ms.into()),
        };
        Ok(self.run_all(workers, &run.op, timeout))
    }

    /// Runs an operation in a process of its own.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn once(&self, op: &Op) -> Result<Vec<Outcome>, Failure> {
        let workers = self.spawn_all(1, &[])?;
        let outcomes = self.run_all(workers.iter().collect(), op, TIMEOUT);
        self.end(&workers, false);
        Ok(outcomes)
    }

    /// Ends a group, by asking or by SIGKILL.
    ///
    /// # Errors
    /// If there is no such group.
    pub fn stop(&self, name: &str, kill: bool) -> Result<Vec<Outcome>, Failure> {
        let group = self.lock().remove(name).ok_or_else(|| no_group(name))?;
        Ok(self.end(&group, kill))
    }

    /// SIGKILLs one process of a group.
    ///
    /// # Errors
    /// If there is no such group or process.
    pub fn kill(&self, name: &str, index: u32) -> Result<Vec<Outcome>, Failure> {
        let group = self.find(name)?;
        let worker = find_process(&group, name, index)?;
        Ok(self.end(std::slice::from_ref(worker), true))
    }

    /// All groups.
    pub fn list(&self) -> Vec<GroupInfo> {
        self.lock()
            .iter()
            .map(|(name, group)| GroupInfo {
                group: name.clone(),
                pids: group.iter().map(Worker::live_pid).collect(),
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Group>> {
        // Each change is one insertion or removal: a panic leaves no half.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<Group, Failure> {
        self.lock().get(name).cloned().ok_or_else(|| no_group(name))
    }

    fn spawn_all(&self, count: u32, pin: &[u32]) -> Result<Vec<Worker>, Failure> {
        let mut workers = Vec::new();
        for index in 0..count {
            let cpu = pin.get(index as usize % pin.len().max(1)).copied();
            match self.spawn(index, cpu) {
                Ok(worker) => workers.push(worker),
                Err(e) => {
                    self.end(&workers, true);
                    let what = format_args!("start process {index} of {count}");
                    return Err(Failure::os(what, &e));
                }
            }
        }
        Ok(workers)
    }

    fn spawn(&self, index: u32, cpu: Option<u32>) -> io::Result<Worker> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("worker")
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        let (child, pid) = self.reaper.spawn(&mut command)?;
        drop(child);
        let worker = Worker {
            index,
            pid,
            channel: Mutex::new(Channel::Open(ours)),
            ended: OnceLock::new(),
        };
        if let Some(cpu) = cpu
            && let Err(e) = pin_to(pid, cpu)
        {
            self.end(&[worker], true);
            return Err(e);
        }
        Ok(worker)
    }

    /// Sends `op` to all, then collects the answers.
    fn run_all(&self, workers: Vec<&Worker>, op: &Op, timeout: Duration) -> Vec<Outcome> {
        // Locks are taken in order of the index, so that two requests for the
        // whole group cannot each wait for the other.
        let mut channels: Vec<_> = workers
            .iter()
            .map(|worker| {
                let mut channel = worker.lock();
                if let Channel::Open(stream) = &mut *channel
                    && let Err(e) = frame::send(stream, op)
                {
                    let why = self.gone(worker, &e);
                    *channel = Channel::Closed(why);
                }
                channel
            })
            .collect();
        let deadline = Instant::now() + timeout;
        workers
            .into_iter()
            .zip(&mut channels)
            .map(|(worker, channel)| {
                let result = match &mut **channel {
                    Channel::Closed(why) => Err(OpError::Gone(why.clone())),
                    Channel::Open(stream) => match receive(stream, deadline) {
                        Ok(result) => result,
                        Err(e) => {
                            let why = self.gone(worker, &e);
                            **channel = Channel::Closed(why.clone());
                            Err(OpError::Gone(why))
                        }
                    },
                };
                worker.outcome(result)
            })
            .collect()
    }

    /// After an error on the channel of a worker: it has died, or hangs and is
    /// killed. Says which.
    fn gone(&self, worker: &Worker, error: &FrameError) -> String {
        let late = matches!(error, FrameError::Io(e)
            if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
        if late {
            self.reaper.kill(worker.pid, false);
        }
        let status = self.reaper.wait(worker.pid, EXIT_TIMEOUT);
        if let Some(status) = status {
            worker.ended.get_or_init(|| status);
        }
        let end = status.map_or_else(|| error.to_string(), |s| s.to_string());
        if late {
            format!("no answer in time, killed ({end})")
        } else {
            end
        }
    }

    fn end(&self, workers: &[Worker], kill: bool) -> Vec<Outcome> {
        for worker in workers {
            if kill {
                // Without the channel's lock: an operation may be under way,
                // and then it ends with the process.
                self.reaper.kill(worker.pid, false);
            } else {
                worker.close("it was stopped");
            }
        }
        workers
            .iter()
            .map(|worker| {
                let mut status = self.reaper.wait(worker.pid, EXIT_TIMEOUT);
                if status.is_none() && !kill {
                    self.reaper.kill(worker.pid, false);
                    status = self.reaper.wait(worker.pid, EXIT_TIMEOUT);
                }
                // Waits for an operation under way, which may have been told first.
                let before = worker.close("it was killed");
                let status = status.or_else(|| worker.ended.get().copied());
                worker.outcome(match (status, before) {
                    (Some(status), _) => Ok(exited(status)),
                    (None, Some(why)) => Err(OpError::Gone(why)),
                    (None, None) => Err(OpError::Gone("it does not end".into())),
                })
            })
            .collect()
    }
}

impl Worker {
    fn lock(&self) -> MutexGuard<'_, Channel> {
        // A panic between two frames at worst leaves an unread answer, which
        // the next request would take for its own: close instead.
        self.channel.lock().unwrap_or_else(|poisoned| {
            let mut channel = poisoned.into_inner();
            *channel = Channel::Closed("the agent lost track of it".into());
            channel
        })
    }

    /// Closes the channel, upon which the process exits. Returns why it was
    /// closed already, if it was.
    fn close(&self, why: &str) -> Option<String> {
        let mut channel = self.lock();
        match &*channel {
            Channel::Closed(why) => Some(why.clone()),
            Channel::Open(_) => {
                *channel = Channel::Closed(why.into());
                None
            }
        }
    }

    fn live_pid(&self) -> i32 {
        match self.channel.try_lock().as_deref() {
            Ok(Channel::Closed(_)) => 0,
            // Busy with an operation, so alive as far as anybody knows.
            Ok(Channel::Open(_)) | Err(_) => self.pid,
        }
    }

    fn outcome(&self, result: Result<Value, OpError>) -> Outcome {
        Outcome {
            process: self.index,
            pid: self.pid,
            result,
        }
    }
}

fn receive(
    stream: &mut UnixStream,
    deadline: Instant,
) -> Result<Result<Value, OpError>, FrameError> {
    let left = deadline.saturating_duration_since(Instant::now());
    stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
    frame::receive(stream)
}

fn exited(status: ExitStatus) -> Value {
    match status.signal() {
        Some(signal) => Value::Signalled(signal),
        None => Value::Exited(status.code().unwrap_or(0)),
    }
}

fn pin_to(pid: i32, cpu: u32) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    let cpu = cpu as usize;
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(Pid::from_raw(pid), &set)?)
}

/// Raises the limit on open files: each process of a group takes one.
fn allow_descriptors() {
    const FILES: u64 = 2 * MAX_PROCESSES as u64;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|now| now >= FILES) {
        return;
    }
    limit.current = Some(FILES);
    let hard = limit.maximum;
    limit.maximum = hard.map(|most| most.max(FILES));
    if setrlimit(Resource::Nofile, limit).is_err() {
        // Not root: as far as allowed. If that is not enough, starting a
        // process fails and says so.
        limit.current = hard;
        limit.maximum = hard;
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

fn no_group(name: &str) -> Failure {
    Failure {
        errno: libc::ENOENT,
        message: format!("there is no group {name:?}"),
    }
}

fn find_process<'a>(group: &'a Group, name: &str, index: u32) -> Result<&'a Worker, Failure> {
    group.get(index as usize).ok_or_else(|| Failure {
        errno: libc::ENOENT,
        message: format!(
            "group {name:?} has no process {index}, only 0 to {}",
            group.len() - 1
        ),
    })
}
