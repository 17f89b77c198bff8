//! The socket that a broker listens on.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A broker is there.
    #[error("a broker already serves {0}; use another path, or end that broker first")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket; use another path, or remove it")]
    NotASocket(PathBuf),
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
    pub(super) socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that a successor's is not removed.
    identity: (u64, u64),
}

impl Listener {
    /// Binds `path` with mode 0600. A socket file that nobody serves is
    /// replaced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let failed = |source: io::Error| ServerError::Bind {
            path: path.to_owned(),
            source,
        };
        let failed_errno = |e: Errno| failed(e.into());
        let parent = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        // Two brokers that start at once take turns.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(parent, flags, Mode::empty()).map_err(failed_errno)?;
        rustix::fs::flock(&dir, FlockOperation::LockExclusive).map_err(failed_errno)?;
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(ServerError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    log::info!("replacing the stale socket {}", path.display());
                    std::fs::remove_file(path).map_err(failed)?;
                }
                Ok(_) => return Err(ServerError::InUse(path.to_owned())),
                Err(e) => return Err(failed(e)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        let address = SocketAddrUnix::new(path).map_err(failed_errno)?;
        let socket: OwnedFd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed_errno)?;
        rustix::net::bind(&socket, &address).map_err(failed_errno)?;
        // Nobody can connect before listen(), so there is no moment in which
        // the mode is wrong.
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(failed_errno)?;
        rustix::net::listen(&socket, 128).map_err(failed_errno)?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            socket: socket.into(),
            path: path.to_owned(),
            identity: (meta.dev(), meta.ino()),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours && let Err(e) = std::fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}
