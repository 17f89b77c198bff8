//! The unix sockets on the host's side.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use mshare_pool::socket::{BindError, BoundSocket, connect_without_waiting};

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
pub struct HostSocket(BoundSocket);

impl HostSocket {
    /// Listens at `path`, with mode 0600: who may connect may run programs as
    /// root in a guest with an agent. A socket that a dead process left there is
    /// replaced.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn bind(path: &Path) -> Result<Self, Error> {
        BoundSocket::bind(path).map(Self).map_err(|error| {
            let path = path.into();
            match error {
                BindError::InUse => Error::InUse(path),
                BindError::NotASocket => Error::NotASocket(path),
                BindError::Locked(directory) => Error::Locked { directory, path },
                BindError::Host(source) => Error::Listen { path, source },
            }
        })
    }

    /// The socket that clients connect to. It does not block.
    pub(super) fn listener(&self) -> &UnixListener {
        self.0.listener()
    }

    /// The next client that has connected, if there is one. It does not block.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener().accept() {
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
        let mut path = self.0.path().as_os_str().to_owned();
        path.push(format!("_{port}"));
        connect_without_waiting(Path::new(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use tempfile::tempdir;

    #[test]
    fn path_that_cannot_be_had_is_named_with_what_is_wrong() {
        let dir = tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let _first = HostSocket::bind(&path("used")).unwrap();
        fs::write(path("file"), "precious").unwrap();
        for (name, words) in [
            ("used", "in use by another process"),
            ("file", "not a socket"),
            ("absent/v", "cannot listen"),
        ] {
            let error = HostSocket::bind(&path(name)).unwrap_err().to_string();
            let named = error.contains(path(name).to_str().unwrap());
            assert!(named && error.contains(words), "{error}");
        }
        let lock = File::open(dir.path()).unwrap();
        lock.lock().unwrap();
        let error = HostSocket::bind(&path("v")).unwrap_err().to_string();
        assert!(error.contains("holds a lock"), "{error}");
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
