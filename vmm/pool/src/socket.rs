//! Listening unix sockets whose files come and go with the process that serves
//! them.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
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

/// Why a path cannot be listened at. The caller knows what it was for, and what
/// would be right instead.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("it is in use by another process")]
    InUse,
    /// Something else has the name.
    #[error("the file exists and is not a socket")]
    NotASocket,
    /// Somebody keeps the directory locked.
    #[error("another process holds a lock (flock) on the directory {0:?}")]
    Locked(PathBuf),
    /// The host refuses.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// A listening socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that no other file is removed.
    file: (u64, u64),
}

impl BoundSocket {
    /// Listens at `path`, with mode 0600. A socket that a dead process left
    /// there is replaced. Never waits for longer than a second.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        // Two processes that find the same dead socket take turns, or the second
        // would remove the first one's.
        let _turn = lock_directory(path, LOCK_LIMIT)?;
        let listener = match listen_at(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_dead_socket(path)?;
                listen_at(path)?
            }
            result => result?,
        };
        Ok(Self {
            listener,
            path: path.into(),
            file: file_identity(path)?,
        })
    }

    /// The socket that clients connect to. It does not block.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let ours = file_identity(&self.path).is_ok_and(|file| file == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove the socket {:?}: {error}", self.path);
        }
    }
}

/// Connects to the program that serves `path`. Neither this nor the stream
/// blocks: a program whose backlog is full refuses.
///
/// # Errors
/// What the host says; `WouldBlock` if the backlog is full.
pub fn connect_without_waiting(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = stream_socket()?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

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

/// Removes the socket at `path` if nobody listens on it.
fn remove_dead_socket(path: &Path) -> Result<(), BindError> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(BindError::NotASocket);
    }
    match connect_without_waiting(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            log::info!("replacing the socket {path:?}, which nobody serves");
            Ok(fs::remove_file(path)?)
        }
        // It listens, though perhaps with a full backlog.
        Ok(_) => Err(BindError::InUse),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(BindError::InUse),
        Err(error) => Err(error.into()),
    }
}

/// An exclusive lock on the directory of `path`, until the value is dropped.
fn lock_directory(path: &Path, limit: Duration) -> Result<File, BindError> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent)?;
    let deadline = Instant::now() + limit;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::Error(error)) => return Err(error.into()),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                return Err(BindError::Locked(parent.into()));
            }
            // Not a lock that blocks: the signals that end a run are blocked.
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
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
        let path = dir.path().join("s");
        let _first = BoundSocket::bind(&path).unwrap();
        assert!(matches!(BoundSocket::bind(&path), Err(BindError::InUse)));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn socket_with_a_full_backlog_is_in_use_and_not_waited_for() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = BoundSocket::bind(&path).unwrap();
        let mut waiting = Vec::new();
        let full = loop {
            match connect_without_waiting(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(matches!(BoundSocket::bind(&path), Err(BindError::InUse)));
    }

    #[test]
    fn only_the_owner_may_connect() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("s");
        let _socket = BoundSocket::bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn directory_that_stays_locked_is_named() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("s");
        let lock = File::open(dir.path()).unwrap();
        lock.lock().unwrap();
        let error = BoundSocket::bind(&path).unwrap_err();
        assert!(
            matches!(&error, BindError::Locked(named) if named == dir.path()),
            "{error}"
        );
        assert!(!path.exists());
        drop(lock);
        BoundSocket::bind(&path).unwrap();
    }

    #[test]
    fn lock_that_is_given_back_is_waited_for() {
        let dir = tempdir().unwrap();
        let lock = File::open(dir.path()).unwrap();
        lock.lock().unwrap();
        let owner = thread::spawn(move || {
            thread::sleep(3 * LOCK_RETRY);
            drop(lock);
        });
        lock_directory(&dir.path().join("s"), Duration::from_secs(60)).unwrap();
        owner.join().unwrap();
    }

    #[test]
    fn dead_socket_is_replaced_and_removed_at_the_end() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = BoundSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn file_that_is_no_socket_is_left_alone() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            BoundSocket::bind(&path),
            Err(BindError::NotASocket)
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn file_that_took_the_place_is_left_alone() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = BoundSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn path_without_a_directory_or_too_long_is_the_hosts_error() {
        let dir = tempdir().unwrap();
        for path in [
            dir.path().join("absent/s"),
            dir.path().join("x".repeat(200)),
        ] {
            let error = BoundSocket::bind(&path).unwrap_err();
            assert!(matches!(error, BindError::Host(_)), "{error}");
        }
    }
}
