//! The socket that a broker listens on.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::socket::{BindError, BoundSocket};

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A broker is there.
    #[error("a broker already serves {0}; use another path, or end that broker first")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket; use another path, or remove it")]
    NotASocket(PathBuf),
    /// Somebody keeps the directory locked.
    #[error(
        "another process holds a lock (flock) on the directory {directory}; end it, or use another \
         directory for the socket {path}"
    )]
    Locked {
        /// The directory.
        directory: PathBuf,
        /// Where the socket would be.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot make the socket {path}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// A bound socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct Listener {
    bound: BoundSocket,
}

impl Listener {
    /// Binds `path` with mode 0600. A socket file that nobody serves is
    /// replaced. Never waits for longer than a second.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let failed = |error| {
            let path = path.to_owned();
            match error {
                BindError::InUse => ServerError::InUse(path),
                BindError::NotASocket => ServerError::NotASocket(path),
                BindError::Locked(directory) => ServerError::Locked { directory, path },
                BindError::Host(source) => ServerError::Bind { path, source },
            }
        };
        let bound = BoundSocket::bind(path).map_err(failed)?;
        // A thread waits in accept().
        let blocking = bound.listener().set_nonblocking(false);
        blocking.map_err(|source| failed(BindError::Host(source)))?;
        Ok(Self { bound })
    }

    pub(super) fn socket(&self) -> &UnixListener {
        self.bound.listener()
    }
}
