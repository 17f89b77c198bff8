//! The unix sockets on the host's side.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, chmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How long a directory may be locked. Whoever takes turns at binding needs
/// milliseconds, and a start that cannot go on says so within a second.
const LOCK_LIMIT: Duration = Duration::from_millis(700);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// A listening socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody answers there.
    #[error("vsock socket {0:?} is in use by another process; choose another path")]
    InUse(PathBuf),
    /// Something else has the name.
    #[error(
        "vsock socket {0:?}: the file exists and is not a socket; remove it or choose another path"
    )]
    NotASocket(PathBuf),
    /// Somebody keeps the directory locked.
    #[error(
        "another process holds a lock (flock) on the directory {directory:?}; end it, or choose \
         another directory for the vsock socket {path:?}"
    )]
    Locked {
        /// The directory.
        directory: PathBuf,
        /// The path of the socket.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("cannot listen on vsock socket {path:?}")]
    Listen {
        /// The path of the socket.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

/// The listening socket at PATH. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct HostSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that no other file is removed.
    file: (u64, u64),
}

impl HostSocket {
    /// Listens at `path`, with mode 0600: who may connect may run programs as
    /// root in a guest with an agent. A socket that a dead process left there is
    /// replaced.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Listen {
            path: path.into(),
            source,
        };
        // Two VMMs that find the same dead socket take turns, or the second
        // would remove the first one's.
        let _turn = lock_directory(path, LOCK_LIMIT)?;
        let listener = match listen_at(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_dead_socket(path)?;
                listen_at(path)
            }
            result => result,
        }
        .map_err(fail)?;
        let file = file_identity(path).map_err(fail)?;
        Ok(Self {
            listener,
            path: path.into(),
            file,
        })
    }

    /// The socket that clients connect to. It does not block.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The next client that has connected, if there is one. It does not block.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects to the program that serves `port` on the host. Neither this
    /// nor the stream blocks: a program whose backlog is full refuses.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect_without_waiting(Path::new(&path))
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        let ours = file_identity(&self.path).is_ok_and(|file| file == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove vsock socket {:?}: {error}", self.path);
        }
    }
}

/// A listening socket that does not block.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = stream_socket()?;
    bind(&socket, &address)?;
    // Nobody can connect before listen(), so there is no moment in which the
    // mode is wrong.
    let listening = chmod(path, Mode::RUSR | Mode::WUSR).and_then(|()| listen(&socket, BACKLOG));
    if let Err(error) = listening {
        fs::remove_file(path)?;
        return Err(error.into());
    }
    Ok(socket.into())
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

fn connect_without_waiting(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = stream_socket()?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

/// Removes the socket at `path` if nobody listens on it.
fn remove_dead_socket(path: &Path) -> Result<(), Error> {
    let fail = |source| Error::Listen {
        path: path.into(),
        source,
    };
    let kind = fs::symlink_metadata(path).map_err(fail)?.file_type();
    if !kind.is_socket() {
        return Err(Error::NotASocket(path.into()));
    }
    match connect_without_waiting(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(fail)
        }
        // It listens, though perhaps with a full backlog.
        Ok(_) => Err(Error::InUse(path.into())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Error::InUse(path.into())),
        Err(error) => Err(fail(error)),
    }
}

/// An exclusive lock on the directory of `path`, until the value is dropped.
fn lock_directory(path: &Path, limit: Duration) -> Result<File, Error> {
    let fail = |source| Error::Listen {
        path: path.into(),
        source,
    };
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent).map_err(fail)?;
    let deadline = Instant::now() + limit;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::Error(error)) => return Err(fail(error)),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                return Err(Error::Locked {
                    directory: parent.into(),
                    path: path.into(),
                });
            }
            // Not a lock that blocks: the signals that end a run are blocked.
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_RETRY),
        }
    }
}

fn file_identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    #[test]
    fn bind_twice_is_refused_and_the_first_stays() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let _first = HostSocket::bind(&path).unwrap();
        assert!(matches!(HostSocket::bind(&path), Err(Error::InUse(_))));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn only_the_owner_may_connect() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let _socket = HostSocket::bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn directory_that_stays_locked_is_named() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let lock = File::open(dir.path()).unwrap();
        lock.lock().unwrap();
        let error = HostSocket::bind(&path).unwrap_err();
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        assert!(!path.exists());
        drop(lock);
        HostSocket::bind(&path).unwrap();
    }

    #[test]
    fn lock_that_is_given_back_is_waited_for() {
        let dir = tempdir().unwrap();
        let lock = File::open(dir.path()).unwrap();
        lock.lock().unwrap();
        let owner = std::thread::spawn(move || {
            std::thread::sleep(3 * LOCK_RETRY);
            drop(lock);
        });
        lock_directory(&dir.path().join("v.sock"), Duration::from_secs(60)).unwrap();
        owner.join().unwrap();
    }

    #[test]
    fn dead_socket_is_replaced_and_removed_at_the_end() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = HostSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn file_that_is_no_socket_is_left_alone() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(HostSocket::bind(&path), Err(Error::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn file_that_took_the_place_is_left_alone() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let socket = HostSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn path_without_a_directory_or_too_long_is_named() {
        let dir = tempdir().unwrap();
        for path in [
            dir.path().join("absent/v.sock"),
            dir.path().join("x".repeat(200)),
        ] {
            let error = HostSocket::bind(&path).unwrap_err();
            assert!(matches!(error, Error::Listen { .. }), "{error}");
        }
    }

    #[test]
    fn connect_goes_to_the_socket_of_the_port() {
        let dir = tempdir().unwrap();
        let socket = HostSocket::bind(&dir.path().join("v.sock")).unwrap();
        assert!(socket.connect(52).is_err());
        let _listener = UnixListener::bind(dir.path().join("v.sock_52")).unwrap();
        socket.connect(52).unwrap();
    }
}
