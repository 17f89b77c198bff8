//! The pool that a command line names: joined, or served by this process.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use mshare_pool::broker::{Broker, BrokerError};
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server, ServerError};
use tempfile::TempDir;

use crate::launch::{PageSize, PoolOption, PoolSource};

/// Why the pool is not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pool cannot be as asked for.
    #[error("cannot make the pool")]
    Broker(#[from] BrokerError),
    /// The broker does not listen.
    #[error("cannot serve the pool")]
    Server(#[from] ServerError),
    /// No place for the broker's socket.
    #[error("cannot make a directory in {path} for the broker's socket")]
    Directory {
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// The broker's socket and, if this process is the broker, the broker. Ends
/// with the value.
#[derive(Debug)]
pub struct PoolService {
    // Before the directory: the server removes its socket.
    _server: Option<Server>,
    _directory: Option<TempDir>,
    socket: PathBuf,
}

impl PoolService {
    /// Starts to serve the pool, if it is this command's to serve.
    ///
    /// # Errors
    ///
    /// See [`Error`]; nothing is left behind.
    pub fn start(pool: &PoolOption) -> Result<Self, Error> {
        let (size, socket, window, pages) = match &pool.source {
            PoolSource::Join(socket) => {
                return Ok(Self {
                    _server: None,
                    _directory: None,
                    socket: socket.clone(),
                });
            }
            PoolSource::Create {
                size,
                socket,
                window,
                pages,
            } => (size, socket, window, *pages),
        };
        let mut config = PoolConfig::new(size.0);
        config.huge_pages = pages == PageSize::Huge;
        if let Some(window) = window {
            config.window_gpa = *window;
        }
        let broker = Broker::new(&config)?;
        let (directory, socket) = match socket {
            Some(path) => (None, path.clone()),
            None => {
                let own = own_directory()?;
                let socket = own.path().join("pool");
                (Some(own), socket)
            }
        };
        let server = Server::start(Listener::bind(&socket)?, broker, Options::default())?;
        Ok(Self {
            _server: Some(server),
            _directory: directory,
            socket,
        })
    }

    /// Where the broker listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

/// A directory with a name that cannot be guessed, which only this user can
/// enter. It is removed with the value.
fn own_directory() -> Result<TempDir, Error> {
    let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::Builder::new()
        .prefix("vmm-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(&base)
        .map_err(|source| Error::Directory { path: base, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_of_its_own_is_served_and_leaves_nothing_behind() {
        let service = PoolService::start(&"size=4M".parse().unwrap()).unwrap();
        let socket = service.socket().to_owned();
        let stat = mshare_pool::admin::connect(&socket)
            .unwrap()
            .pool_stat()
            .unwrap();
        assert_eq!(stat.geometry.data_len, 4 << 20);
        let directory = socket.parent().unwrap();
        let mode = directory.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        // The number of the process, which anybody can guess, is not its name.
        let guessed = format!("vmm-{}", std::process::id());
        assert!(!directory.ends_with(guessed), "{directory:?}");
        drop(service);
        assert!(!socket.exists() && !socket.parent().unwrap().exists());
    }

    #[test]
    fn pages_are_as_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        for (pages, huge) in [("2M", true), ("4K", false)] {
            let socket = dir.path().join(pages);
            let pool = format!("size=4M,pages={pages},socket={}", socket.display());
            let service = PoolService::start(&pool.parse().unwrap()).unwrap();
            let stat = mshare_pool::admin::connect(service.socket())
                .unwrap()
                .pool_stat()
                .unwrap();
            assert_eq!(stat.geometry.huge_pages, huge);
        }
    }

    #[test]
    fn pool_that_is_too_small_is_refused() {
        let error = PoolService::start(&"size=4K".parse().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Broker(_)), "{error}");
    }

    #[test]
    fn joined_pool_is_not_served() {
        let service = PoolService::start(&"/nonexistent/pool".parse().unwrap()).unwrap();
        assert_eq!(service.socket(), Path::new("/nonexistent/pool"));
    }
}
