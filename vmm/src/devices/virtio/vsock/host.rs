//! The unix sockets on the host's side.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

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
    /// Listens at `path`. A socket that a dead process left there is replaced.
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
        let _turn = lock_directory(path).map_err(fail)?;
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_dead_socket(path)?;
                UnixListener::bind(path)
            }
            result => result,
        }
        .map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
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

fn connect_without_waiting(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
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
fn lock_directory(path: &Path) -> io::Result<File> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent)?;
    directory.lock()?;
    Ok(directory)
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
