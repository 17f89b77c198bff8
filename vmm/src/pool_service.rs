//! The pool that a command line names: joined, or served by this process.

use std::io;
use std::path::{Path, PathBuf};

use mshare_pool::broker::{Broker, BrokerError};
use mshare_pool::layout::PoolConfig;
use mshare_pool::server::{Listener, Options, Server, ServerError};

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
    #[error("cannot make the directory {path} for the broker's socket")]
    Directory {
        /// Which.
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
    _directory: Option<OwnDirectory>,
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
                let own = OwnDirectory::new()?;
                let socket = own.0.join("pool");
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

/// A directory that only this user can enter, removed with the value.
#[derive(Debug)]
struct OwnDirectory(PathBuf);

impl OwnDirectory {
    fn new() -> Result<Self, Error> {
        let base =
            std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = base.join(format!("vmm-{}", std::process::id()));
        match rustix::fs::mkdir(&path, rustix::fs::Mode::RWXU) {
            Ok(()) => Ok(Self(path)),
            Err(e) => Err(Error::Directory {
                path,
                source: e.into(),
            }),
        }
    }
}

impl Drop for OwnDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
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
