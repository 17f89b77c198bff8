//! Listens for clients and answers their requests.

use std::fmt;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mshare_protocol::agent::{Failure, MAX_READ, PORT, Reply, Request, Response};
use mshare_protocol::frame::{self, FrameError};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::groups::Groups;
use crate::power::{self, Power};
use crate::reaper::Reaper;
use crate::{exec, figures};

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A vsock port, for the host alone.
    Vsock(u32),
    /// A unix socket.
    Unix(PathBuf),
}

impl Default for Listen {
    fn default() -> Self {
        Self::Vsock(PORT)
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("{s:?}: give vsock, vsock:PORT or unix:PATH");
        match s.split_once(':') {
            None if s == "vsock" => Ok(Self::default()),
            Some(("vsock", port)) => port.parse().map(Self::Vsock).map_err(|_| bad()),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock port {port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Why nobody can be listened to.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers there.
    #[error("cannot listen on {0:?}: another process does; choose another path")]
    InUse(PathBuf),
    /// Something else has the name.
    #[error(
        "cannot listen on {0:?}: the file exists and is not a socket; remove it or choose \
         another path"
    )]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("cannot listen on {at}: {source}")]
    System {
        /// Where.
        at: Listen,
        /// What it said.
        source: io::Error,
    },
}

/// What all connections share.
#[derive(Debug)]
pub struct Agent {
    groups: Groups,
    reaper: &'static Reaper,
    /// Whether clients may switch the machine off.
    allow_power: bool,
}

impl Agent {
    /// An agent without groups.
    pub fn new(reaper: &'static Reaper, allow_power: bool) -> Self {
        Self {
            groups: Groups::new(reaper),
            reaper,
            allow_power,
        }
    }

    /// Carries out a request, except that the power is switched by the caller
    /// once the reply is sent.
    fn handle(&self, request: Request) -> Response {
        match request {
            Request::Info => figures::info().map(Reply::Info),
            Request::Once(op) => self.groups.once(&op).map(Reply::Outcomes),
            Request::StartGroup(start) => self.groups.start(start).map(Reply::Outcomes),
            Request::Run(run) => self.groups.run(&run).map(Reply::Outcomes),
            Request::ListGroups => Ok(Reply::Groups(self.groups.list())),
            Request::StopGroup { group } => self.groups.stop(&group, false).map(Reply::Outcomes),
            Request::KillGroup { group, process } => match process {
                Some(index) => self.groups.kill(&group, index),
                None => self.groups.stop(&group, true),
            }
            .map(Reply::Outcomes),
            Request::Figures => figures::figures(&self.groups.list()).map(Reply::Figures),
            Request::Interrupts => figures::interrupts().map(Reply::Interrupts),
            Request::Dmesg { lines } => figures::dmesg(lines).map(Reply::Dmesg),
            Request::Exec(command) => exec::run(command, self.reaper).map(Reply::Exec),
            Request::ReadFile { path, offset, max } => {
                read_file(&path, offset, max).map(Reply::Bytes)
            }
            Request::WriteFile { path, data } => fs::write(&path, data)
                .map(|()| Reply::Done)
                .map_err(|e| Failure::os(format_args!("write {path}"), &e)),
            Request::ListDir { path } => list_dir(&path)
                .map(Reply::Names)
                .map_err(|e| Failure::os(format_args!("list {path}"), &e)),
            Request::PowerOff | Request::Reboot | Request::Crash if !self.allow_power => {
                Err(Failure {
                    errno: libc::EPERM,
                    message: "the agent was started without --allow-power".into(),
                })
            }
            Request::PowerOff | Request::Reboot => Ok(Reply::Done),
            Request::Crash => power::crash().map(|()| Reply::Done),
            Request::Panic => panic_on_request(),
        }
    }

    /// Serves one connection until its end.
    fn converse(&self, mut stream: impl Read + Write) -> Result<(), FrameError> {
        loop {
            let request: Request = match frame::receive(&mut stream) {
                Ok(request) => request,
                Err(FrameError::Closed) => return Ok(()),
                Err(e) => return Err(e),
            };
            let switch = match request {
                Request::PowerOff => Some(Power::Off),
                Request::Reboot => Some(Power::Restart),
                _ => None,
            };
            // A panic is a mistake in the agent. It ends the request, not the
            // machine: the locks that it may poison are all recovered from.
            let response = panic::catch_unwind(AssertUnwindSafe(|| self.handle(request)))
                .unwrap_or_else(|_| Err(Failure::new("the agent panicked; see its console")));
            let agreed = response.is_ok();
            match frame::send(&mut stream, &response) {
                Err(e @ (FrameError::TooLong(_) | FrameError::Codec(_))) => {
                    let failure: Response = Err(Failure::new(format!("the answer: {e}")));
                    frame::send(&mut stream, &failure)?;
                }
                other => other?,
            }
            if let Some(switch) = switch
                && agreed
            {
                // Let the reply leave before its sender is gone.
                thread::sleep(Duration::from_millis(20));
                power::switch(switch, self.reaper);
            }
        }
    }
}

#[expect(clippy::panic, reason = "it is what the request asks for")]
fn panic_on_request() -> Response {
    panic!("a client asked for a panic")
}

fn read_file(path: &str, offset: u64, max: u32) -> Result<Vec<u8>, Failure> {
    let read = || {
        let mut bytes = Vec::new();
        let mut file = fs::File::open(path)?;
        // What has no offsets, such as a pipe, can be read from the start.
        if offset > 0 {
            file.seek(SeekFrom::Start(offset))?;
        }
        file.take(max.min(MAX_READ).into())
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|e| Failure::os(format_args!("read {path} at {offset:#x}"), &e))
}

fn list_dir(path: &str) -> io::Result<Vec<String>> {
    let mut names = fs::read_dir(path)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Starts to listen; connections are served by threads of their own.
///
/// # Errors
/// If the address cannot be listened at.
pub fn listen(at: &Listen, agent: &Arc<Agent>) -> Result<(), ListenError> {
    let agent = Arc::clone(agent);
    let fail = |source| ListenError::System {
        at: at.clone(),
        source,
    };
    match at {
        Listen::Vsock(port) => {
            let listener =
                VsockListener::bind_with_cid_port(VMADDR_CID_ANY, *port).map_err(fail)?;
            let accept = move || {
                let (stream, peer) = listener.accept()?;
                Ok(may_ask(peer.cid()).then_some(stream))
            };
            accept_all(agent, accept).map_err(fail)
        }
        Listen::Unix(path) => {
            let listener = match UnixListener::bind(path) {
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                    remove_dead_socket(path, fail)?;
                    UnixListener::bind(path)
                }
                result => result,
            }
            .map_err(fail)?;
            accept_all(agent, move || Ok(Some(listener.accept()?.0))).map_err(fail)
        }
    }
}

/// Who is behind a vsock connection may have root here: the host may. By way of
/// the loopback any user of the machine could be.
fn may_ask(cid: u32) -> bool {
    cid == VMADDR_CID_HOST
}

/// Removes the socket that a dead agent left at `path`, and nothing else.
fn remove_dead_socket(
    path: &Path,
    fail: impl Fn(io::Error) -> ListenError,
) -> Result<(), ListenError> {
    let kind = fs::symlink_metadata(path).map_err(&fail)?.file_type();
    if !kind.is_socket() {
        return Err(ListenError::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(fail)
        }
        Ok(_) => Err(ListenError::InUse(path.into())),
        Err(e) => Err(fail(e)),
    }
}

fn accept_all<S: Read + Write + Send + 'static>(
    agent: Arc<Agent>,
    accept: impl Fn() -> io::Result<Option<S>> + Send + 'static,
) -> io::Result<()> {
    let serve = move || {
        loop {
            let started = accept().and_then(|stream| {
                // One that may not ask is closed without a word: it must not be
                // able to fill the console, or to keep the host waiting.
                let Some(stream) = stream else { return Ok(()) };
                let agent = Arc::clone(&agent);
                let client = thread::Builder::new().name("client".into());
                client
                    .spawn(move || {
                        if let Err(e) = agent.converse(stream) {
                            say!("agent: a connection ended: {e}");
                        }
                    })
                    .map(drop)
            });
            if let Err(e) = started {
                // No memory or no descriptors: others may give some back.
                say!("agent: cannot serve a connection: {e}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    };
    thread::Builder::new().name("listen".into()).spawn(serve)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_host_may_ask_over_vsock() {
        assert!(may_ask(2));
        // The loopback, this guest itself, another guest.
        for cid in [1, 3, 4, u32::MAX] {
            assert!(!may_ask(cid), "{cid}");
        }
    }
}
