//! Sockets between guest and host (virtio 1.2, section 5.10), stream type.
//!
//! The host's end is a unix socket at a PATH of the user's choice:
//!
//! - **Host to guest**: a program connects to PATH, sends `CONNECT <port>\n`
//!   and, once a program in the guest has accepted, receives `OK <port>\n`
//!   with the port on the host's side. From then on the stream is the
//!   connection. If nobody listens in the guest, the stream ends instead.
//! - **Guest to host**: a connection to port P of the host (CID 2) goes to the
//!   unix socket at `PATH_P`.
//!
//! ```text
//!  guest                      handler: mux                   host
//!  tx queue --> connection: buffer (BUF_ALLOC at most) --> unix stream
//!  rx queue <-- connection  <--------- nothing buffered -- unix stream
//! ```
//!
//! **Backpressure.** Towards the guest a stream is read only when the guest
//! has credit and an rx buffer, so what it cannot take stays in the host's
//! socket. Towards the host, what the stream does not take at once is kept,
//! never more than the credit the guest was given; a guest that sends more has
//! its connection reset. Answers the guest did not take yet are limited too:
//! the tx queue rests until it does.
//!
//! **Ends.** A half-closed stream is a SHUTDOWN in one direction, and the other
//! way round. When the guest has closed a connection, what it sent before is
//! still delivered. A reset of the device closes all connections; the
//! listening socket stays and new clients wait for the next driver.
//!
//! The packet layout is written here rather than taken from the `virtio-vsock`
//! crate, whose parser refuses a payload spread over several descriptors;
//! Linux sends such payloads.

mod connection;
mod device;
mod handler;
mod host;
mod mux;
mod packet;
#[cfg(test)]
mod tests;

pub use device::{BadCid, Vsock};
pub use host::{Error, HostSocket};

/// CID of the host (section 5.10.4).
pub const HOST_CID: u64 = 2;

/// Bytes of each connection the guest may have sent and the host's stream not
/// yet taken.
const BUF_ALLOC: u32 = 256 * 1024;

/// Largest payload of a packet, in bytes: what Linux sends at most.
const MAX_PAYLOAD: usize = 64 * 1024;
