//! A client's connection: the handshake, and what it must know to resume.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mshare_protocol::broker::{
    Failure, FromBroker, Geometry, Hello, Reply, Request, Resume, Role, ToBroker, VERSION,
};
use mshare_protocol::frame::{FrameError, MAX_FRAME};

use crate::memory::{MemoryError, PoolFiles};
use crate::wire::{self, FdReader};

/// How long a broker may take over the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Why a connection to a broker could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("no broker answers at {path}; is it running?")]
    Connect {
        /// Path of the socket.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The broker does not serve this client.
    #[error("the broker refused the connection")]
    Refused(#[source] Failure),
    /// The peer is no broker, or died.
    #[error("the broker at {path} did not complete the handshake")]
    Handshake {
        /// Path of the socket.
        path: String,
        /// Cause.
        #[source]
        source: FrameError,
    },
    /// The broker sent something else than an answer to the hello.
    #[error("the broker at {0} answered the hello with another message")]
    Unexpected(String),
    /// The descriptors that came with the welcome are not those of a pool.
    #[error("the broker's descriptors cannot be used")]
    Files(#[source] MemoryError),
    /// The reader thread could not be started.
    #[error("cannot start a thread for the broker's messages")]
    Thread(#[source] io::Error),
}

/// What a client holds of the pool, to be told to the next broker.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub attached: BTreeSet<u64>,
    pub created: BTreeMap<u64, Vec<u8>>,
}

impl Held {
    /// Notes a request that is about to be sent. A detach counts from here:
    /// the client has unmapped the region already.
    pub fn before(&mut self, request: &Request) {
        if let Request::Detach { id } = request {
            self.attached.remove(id);
        }
    }

    /// Notes that `request` was answered with `reply`.
    pub fn after(&mut self, request: &Request, reply: &Reply) {
        match (request, reply) {
            (Request::Attach { id }, _) => {
                self.attached.insert(*id);
            }
            (Request::Create { name, .. }, Reply::Region(region)) => {
                self.created.insert(region.id, name.clone());
            }
            (Request::Size { id, .. }, _) => {
                self.created.remove(id);
            }
            (Request::Unlink { name, .. }, _) => self.created.retain(|_, n| n != name),
            _ => {}
        }
    }

    fn resume(&self, uuid: [u8; 16]) -> Resume {
        Resume {
            uuid,
            attached: self.attached.iter().copied().collect(),
            created: self.created.keys().copied().collect(),
        }
    }
}

/// Connects and says hello; on a resume the pool's files go along.
pub(crate) fn open(
    path: &Path,
    role: &Role,
    resume: Option<(&Geometry, &Held, &PoolFiles)>,
) -> Result<(UnixStream, Geometry, PoolFiles), ClientError> {
    let shown = || path.display().to_string();
    let connect = |source| ClientError::Connect {
        path: shown(),
        source,
    };
    let broken = |source: FrameError| ClientError::Handshake {
        path: shown(),
        source,
    };
    let stream = UnixStream::connect(path).map_err(connect)?;
    stream
        .set_read_timeout(Some(HANDSHAKE_LIMIT))
        .map_err(connect)?;
    let hello = ToBroker::Hello(Hello {
        version: VERSION,
        role: role.clone(),
        resume: resume.map(|(geometry, held, _)| held.resume(geometry.uuid)),
    });
    let fds = resume.map(|(_, _, files)| files.all());
    let sent = wire::send_with_fds(&stream, &hello, fds.as_ref().map_or(&[], |f| f.as_slice()));
    // A broker that refuses at once closes before it has read the hello: its
    // answer is there all the same, and says more than "broken pipe".
    let mut reader = FdReader::new(&stream);
    let answer = wire::receive(&mut reader, MAX_FRAME);
    let fds = reader.into_fds();
    let geometry = match (answer, sent) {
        (Ok(FromBroker::Welcome(geometry)), Ok(())) => geometry,
        (Ok(FromBroker::Refused(failure)), _) => return Err(ClientError::Refused(failure)),
        (Ok(_), Ok(())) => return Err(ClientError::Unexpected(shown())),
        (_, Err(e)) | (Err(e), _) => return Err(broken(e)),
    };
    let files = PoolFiles::from_received(fds).map_err(ClientError::Files)?;
    files.check(&geometry).map_err(ClientError::Files)?;
    stream.set_read_timeout(None).map_err(connect)?;
    Ok((stream, geometry, files))
}
