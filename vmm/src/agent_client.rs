//! Client of the agent inside a guest.
//!
//! The agent listens on a vsock port. On the host, the VMM's vsock device
//! offers the guest's ports through one unix socket: a client connects to it,
//! writes `CONNECT <port>\n` and reads `OK <host port>\n`; from then on bytes
//! pass through. See `mshare_protocol::agent` for what is said.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mshare_protocol::agent::{
    Exec, ExecResult, Failure, Figures, GroupInfo, Info, LogLine, MAX_READ, Map, Op, OpError,
    Outcome, PORT, RegionOp, Reply, Request, Response, Run, StartGroup, VERSION, Value,
};
use mshare_protocol::frame::{self, FrameError};

/// How long an answer may take unless [`AgentClient::set_timeout`] says
/// otherwise; more than the agent allows for an operation.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// How long one attempt to connect may take.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts to connect.
const RETRY: Duration = Duration::from_millis(10);
/// Lines of the kernel's log that [`AgentClient::complaints`] looks at.
const LOG_LINES: u32 = 4096;

/// Why the agent could not be asked, or why it refused.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Nobody answered in time.
    #[error("no agent answers at {path} after {waited:?}")]
    NotReady {
        /// The socket.
        path: PathBuf,
        /// How long was tried.
        waited: Duration,
        /// What the last attempt met.
        #[source]
        last: io::Error,
    },
    /// The agent speaks another version.
    #[error("the agent speaks version {0} of the protocol, this program {VERSION}")]
    Version(u32),
    /// The connection failed. It cannot be used any more.
    #[error("lost the connection to the agent")]
    Connection(#[from] FrameError),
    /// The connection failed in an earlier request.
    #[error("the connection to the agent was lost before")]
    Lost,
    /// The agent refused the request.
    #[error("the agent says: {0}")]
    Refused(Failure),
    /// The operation failed in a process.
    #[error("process {process}: {error}")]
    Op {
        /// Index of the process in its group.
        process: u32,
        /// Its error.
        error: OpError,
    },
    /// The answer is none to the question.
    #[error("unexpected answer: {0}")]
    Unexpected(String),
}

impl AgentError {
    /// The errno that a system call in the guest returned, if that is why.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(failure)
            | Self::Op {
                error: OpError::Failed(failure),
                ..
            } => Some(failure.errno).filter(|&errno| errno != 0),
            _ => None,
        }
    }
}

/// A connection to an agent. Requests are answered one by one; for requests at
/// the same time, open several connections.
#[derive(Debug)]
pub struct AgentClient {
    /// `None` once the connection has failed.
    stream: Option<UnixStream>,
}

/// Yields what a reply carries, or says that it is not the expected one.
macro_rules! expect {
    ($reply:expr, $pattern:pat => $value:expr) => {
        match $reply {
            $pattern => Ok($value),
            other => Err(AgentError::Unexpected(format!("{other:?}"))),
        }
    };
}

impl AgentClient {
    /// Connects through the unix socket of a guest's vsock device, trying
    /// again until the agent is up or `timeout` has passed.
    ///
    /// # Errors
    /// [`AgentError::NotReady`] or [`AgentError::Version`].
    pub fn connect(socket: impl AsRef<Path>, timeout: Duration) -> Result<Self, AgentError> {
        Self::retry(socket.as_ref(), timeout, |stream| handshake(stream, PORT))
    }

    /// Connects to an agent that listens on a unix socket itself.
    ///
    /// # Errors
    /// [`AgentError::NotReady`] or [`AgentError::Version`].
    pub fn connect_direct(socket: impl AsRef<Path>, timeout: Duration) -> Result<Self, AgentError> {
        Self::retry(socket.as_ref(), timeout, |_| Ok(()))
    }

    fn retry(
        path: &Path,
        timeout: Duration,
        handshake: impl Fn(&mut UnixStream) -> io::Result<()>,
    ) -> Result<Self, AgentError> {
        let begun = Instant::now();
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            match attempt(path, left, &handshake) {
                Ok((client, VERSION)) => return Ok(client),
                Ok((_, version)) => return Err(AgentError::Version(version)),
                Err(last) if begun.elapsed() >= timeout => {
                    return Err(AgentError::NotReady {
                        path: path.to_owned(),
                        waited: begun.elapsed(),
                        last,
                    });
                }
                Err(_) => thread::sleep(RETRY.min(left)),
            }
        }
    }

    /// Sets how long an answer may take; when it takes longer, the connection
    /// is lost.
    ///
    /// # Errors
    /// If the timeout is zero.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        match &self.stream {
            Some(stream) => stream.set_read_timeout(Some(timeout)),
            None => Ok(()),
        }
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// [`AgentError::Refused`], or an error of the connection.
    pub fn call(&mut self, request: &Request) -> Result<Reply, AgentError> {
        let stream = self.stream.as_mut().ok_or(AgentError::Lost)?;
        let answer = frame::send(stream, request).and_then(|()| frame::receive(stream));
        let response: Response = answer.inspect_err(|_| self.stream = None)?;
        response.map_err(AgentError::Refused)
    }

    /// Who the agent is.
    ///
    /// # Errors
    /// As [`Self::call`]; so for all the following.
    pub fn info(&mut self) -> Result<Info, AgentError> {
        expect!(self.call(&Request::Info)?, Reply::Info(info) => info)
    }

    /// Starts `processes` processes, each of which maps `map` by itself. An
    /// error if one of them cannot; the group is then there nevertheless.
    ///
    /// # Errors
    /// [`AgentError::Op`] too.
    pub fn start_group(
        &mut self,
        group: &str,
        processes: u32,
        map: Option<Map>,
    ) -> Result<Vec<Value>, AgentError> {
        let outcomes = self.start_group_with(StartGroup {
            group: group.to_owned(),
            processes,
            map,
            pin: vec![],
        })?;
        values(outcomes)
    }

    /// Starts a group and reports for each process whether it could map.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn start_group_with(&mut self, start: StartGroup) -> Result<Vec<Outcome>, AgentError> {
        self.outcomes(&Request::StartGroup(start))
    }

    /// Runs an operation in all processes of a group at the same time.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn run(&mut self, group: &str, op: Op) -> Result<Vec<Outcome>, AgentError> {
        self.run_with(group, None, op, Duration::ZERO)
    }

    /// As [`Self::run`], but one process that fails makes it an error.
    ///
    /// # Errors
    /// [`AgentError::Op`] too.
    pub fn run_all(&mut self, group: &str, op: Op) -> Result<Vec<Value>, AgentError> {
        values(self.run(group, op)?)
    }

    /// Runs an operation in one process of a group.
    ///
    /// # Errors
    /// [`AgentError::Op`] too.
    pub fn run_one(&mut self, group: &str, process: u32, op: Op) -> Result<Value, AgentError> {
        one(self.run_with(group, Some(process), op, Duration::ZERO)?)
    }

    /// Runs an operation in one process, or in all, within a time (zero: the
    /// agent's default).
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn run_with(
        &mut self,
        group: &str,
        process: Option<u32>,
        op: Op,
        timeout: Duration,
    ) -> Result<Vec<Outcome>, AgentError> {
        self.outcomes(&Request::Run(Run {
            group: group.to_owned(),
            process,
            op,
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        }))
    }

    /// Runs an operation in a process that lives for it alone.
    ///
    /// # Errors
    /// [`AgentError::Op`] too.
    pub fn once(&mut self, op: Op) -> Result<Value, AgentError> {
        one(self.outcomes(&Request::Once(op))?)
    }

    /// Creates a region, which nobody is attached to afterwards.
    ///
    /// # Errors
    /// [`AgentError::Op`] too.
    pub fn create(&mut self, name: &str, addr: u64, len: u64) -> Result<(), AgentError> {
        let map = Map::create(name, addr, len);
        self.once(Op::Map { slot: 0, map }).map(drop)
    }

    /// Unlinks, protects, discards or reports on a region by name.
    ///
    /// # Errors
    /// [`AgentError::Op`] too.
    pub fn region(&mut self, op: RegionOp) -> Result<Value, AgentError> {
        self.once(Op::Region(op))
    }

    /// Ends a group and reports how its processes ended.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn stop_group(&mut self, group: &str) -> Result<Vec<Outcome>, AgentError> {
        self.outcomes(&Request::StopGroup {
            group: group.to_owned(),
        })
    }

    /// SIGKILLs a group, or one process of it.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn kill_group(
        &mut self,
        group: &str,
        process: Option<u32>,
    ) -> Result<Vec<Outcome>, AgentError> {
        self.outcomes(&Request::KillGroup {
            group: group.to_owned(),
            process,
        })
    }

    /// The groups.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn groups(&mut self) -> Result<Vec<GroupInfo>, AgentError> {
        expect!(self.call(&Request::ListGroups)?, Reply::Groups(groups) => groups)
    }

    /// Memory and fault figures.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn figures(&mut self) -> Result<Figures, AgentError> {
        expect!(self.call(&Request::Figures)?, Reply::Figures(figures) => figures)
    }

    /// Interrupt counts by name, summed over the CPUs.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn interrupts(&mut self) -> Result<BTreeMap<String, u64>, AgentError> {
        expect!(self.call(&Request::Interrupts)?, Reply::Interrupts(counts) => counts)
    }

    /// The last lines of the kernel's log.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn dmesg(&mut self, lines: u32) -> Result<Vec<LogLine>, AgentError> {
        expect!(self.call(&Request::Dmesg { lines })?, Reply::Dmesg(lines) => lines)
    }

    /// Lines of the kernel's log that say that it misbehaved.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn complaints(&mut self) -> Result<Vec<String>, AgentError> {
        let lines = self.dmesg(LOG_LINES)?.into_iter();
        Ok(lines
            .filter(LogLine::is_complaint)
            .map(|line| line.text)
            .collect())
    }

    /// Runs a command without input.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn exec(&mut self, argv: &[&str]) -> Result<ExecResult, AgentError> {
        self.exec_with(Exec {
            argv: argv.iter().map(|&arg| arg.to_owned()).collect(),
            ..Exec::default()
        })
    }

    /// Runs a command.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn exec_with(&mut self, exec: Exec) -> Result<ExecResult, AgentError> {
        expect!(self.call(&Request::Exec(exec))?, Reply::Exec(result) => result)
    }

    /// Reads a file of the guest.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn read_file(&mut self, path: &str) -> Result<Vec<u8>, AgentError> {
        let mut whole = Vec::new();
        loop {
            let piece = self.read_piece(path, whole.len() as u64, MAX_READ)?;
            whole.extend_from_slice(&piece);
            if piece.len() < MAX_READ as usize {
                return Ok(whole);
            }
        }
    }

    /// Reads a piece of a file of the guest: `max` bytes or [`MAX_READ`], and
    /// less only where the file ends.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn read_piece(&mut self, path: &str, offset: u64, max: u32) -> Result<Vec<u8>, AgentError> {
        let request = Request::ReadFile {
            path: path.to_owned(),
            offset,
            max,
        };
        expect!(self.call(&request)?, Reply::Bytes(bytes) => bytes)
    }

    /// Writes a file of the guest.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn write_file(&mut self, path: &str, data: &[u8]) -> Result<(), AgentError> {
        self.done(&Request::WriteFile {
            path: path.to_owned(),
            data: data.to_vec(),
        })
    }

    /// Names in a directory of the guest.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn list_dir(&mut self, path: &str) -> Result<Vec<String>, AgentError> {
        let request = Request::ListDir {
            path: path.to_owned(),
        };
        expect!(self.call(&request)?, Reply::Names(names) => names)
    }

    /// Switches the guest off.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn power_off(&mut self) -> Result<(), AgentError> {
        self.done(&Request::PowerOff)
    }

    /// Restarts the guest.
    ///
    /// # Errors
    /// See [`Self::info`].
    pub fn reboot(&mut self) -> Result<(), AgentError> {
        self.done(&Request::Reboot)
    }

    /// Crashes the guest's kernel. That the connection ends or falls silent
    /// for 5 s is what is to be expected.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn crash(&mut self) -> Result<(), AgentError> {
        self.set_timeout(ATTEMPT_TIMEOUT)
            .map_err(FrameError::from)?;
        match self.done(&Request::Crash) {
            Err(AgentError::Connection(_)) => Ok(()),
            other => other,
        }
    }

    fn outcomes(&mut self, request: &Request) -> Result<Vec<Outcome>, AgentError> {
        expect!(self.call(request)?, Reply::Outcomes(outcomes) => outcomes)
    }

    fn done(&mut self, request: &Request) -> Result<(), AgentError> {
        expect!(self.call(request)?, Reply::Done => ())
    }
}

/// Connects once and asks for the agent's version.
fn attempt(
    path: &Path,
    left: Duration,
    handshake: &impl Fn(&mut UnixStream) -> io::Result<()>,
) -> io::Result<(AgentClient, u32)> {
    let mut stream = UnixStream::connect(path)?;
    // At least one attempt is made, however little time is left.
    let limit = left.clamp(Duration::from_millis(10), ATTEMPT_TIMEOUT);
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    handshake(&mut stream)?;
    let mut client = AgentClient {
        stream: Some(stream),
    };
    let version = match client.info() {
        Ok(info) => info.version,
        Err(e) => return Err(io::Error::other(e)),
    };
    client.set_timeout(ANSWER_TIMEOUT)?;
    Ok((client, version))
}

/// Asks the vsock device for a connection to `port` of the guest.
fn handshake(stream: &mut UnixStream, port: u32) -> io::Result<()> {
    writeln!(stream, "CONNECT {port}")?;
    let mut line = Vec::new();
    let mut byte = [0];
    // One byte at a time: what follows the line is the agent's.
    while byte[0] != b'\n' && line.len() < 64 {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&line);
    Err(io::Error::other(format!("the vsock device says {said:?}")))
}

fn values(outcomes: Vec<Outcome>) -> Result<Vec<Value>, AgentError> {
    let value = |outcome: Outcome| {
        let process = outcome.process;
        outcome
            .result
            .map_err(|error| AgentError::Op { process, error })
    };
    outcomes.into_iter().map(value).collect()
}

fn one(outcomes: Vec<Outcome>) -> Result<Value, AgentError> {
    let mut values = values(outcomes)?;
    values
        .pop()
        .ok_or_else(|| AgentError::Unexpected("no outcome".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A vsock device that is asked twice: it hangs up on the first client, as
    /// if the guest did not listen yet, and plays the agent for the second.
    fn device(listener: &UnixListener, version: u32) {
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = [0; 13];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        stream.write_all(b"OK 1073741824\n").unwrap();
        assert_eq!(
            frame::receive::<Request>(&mut stream).unwrap(),
            Request::Info
        );
        let info: Response = Ok(Reply::Info(Info {
            version,
            init: true,
            release: "6.12".into(),
            cpus: 1,
            cmdline: String::new(),
            mshare: true,
            pool: true,
            monotonic_ns: 0,
        }));
        frame::send(&mut stream, &info).unwrap();
        if let Ok(request) = frame::receive::<Request>(&mut stream) {
            assert_eq!(request, Request::PowerOff);
            let reply: Response = Err(Failure::new("no"));
            frame::send(&mut stream, &reply).unwrap();
        }
    }

    fn meet(version: u32) -> Result<AgentClient, AgentError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || device(&listener, version));
        AgentClient::connect(&path, Duration::from_secs(10))
    }

    #[test]
    fn connect_retries_until_the_guest_listens() {
        let mut client = meet(VERSION).unwrap();
        let refused = client.power_off();
        assert!(
            matches!(refused, Err(AgentError::Refused(_))),
            "{refused:?}"
        );
        assert!(matches!(client.info(), Err(AgentError::Connection(_))));
        assert!(matches!(client.info(), Err(AgentError::Lost)));
    }

    #[test]
    fn connect_refuses_another_version() {
        let refused = meet(VERSION + 1);
        assert!(matches!(refused, Err(AgentError::Version(v)) if v == VERSION + 1));
    }

    #[test]
    fn connect_gives_up_when_the_time_is_over() {
        let refused = AgentClient::connect("/nonexistent/vsock", Duration::from_millis(30));
        assert!(matches!(refused, Err(AgentError::NotReady { .. })));
    }
}
