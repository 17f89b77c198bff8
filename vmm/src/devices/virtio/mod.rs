//! Virtio devices (virtio 1.2) behind the virtio-mmio transport.
//!
//! ```text
//!  vCPU threads                       |  thread `devices` (or a device's own)
//!                                     |
//!  MmioTransport  --activate-->  VirtioDevice --Worker::start--> handler
//!   registers, status, queue          | features, configuration  | owns the queues,
//!   addresses                         | space, back end (Arc)    | serves requests
//!        |                            |                          |
//!        +--- Interrupt (Arc): status bits, NEEDS_RESET, irqfd --+
//! ```
//!
//! **Two halves.** The [`VirtioDevice`] is what a vCPU touches through the
//! registers. At DRIVER_OK the transport checks the queues and hands them, with
//! guest memory and the interrupt, to [`VirtioDevice::activate`] as one plain
//! [`Activation`] value. The device moves it into a *handler*, the half that
//! does the work on another thread. The two halves share nothing but the back
//! end (a file, a socket), so no lock is held while a request is served.
//!
//! **Hand-over.** Activation happens on a vCPU thread. A handler joins the
//! event loop of the `devices` thread through its remote endpoint
//! ([`Worker::start`]), which never waits. [`Worker::stop`] takes the handler
//! away again: it waits at most for the event this handler is serving, not for
//! the loop, so it is also safe when the loop has ended. A handler must
//! therefore never lock anything that a vCPU holds during an access (the
//! transport, its device). A device that blocks runs a thread of its own
//! instead; see [`VirtioDevice::activate`].
//!
//! **A guest's mistakes.** A bad request fails by itself (an error status, or a
//! used length of zero). A queue that cannot be trusted any more sets
//! NEEDS_RESET ([`Interrupt::fail`]), and the handler rests until the driver
//! resets the device. Neither ever ends the VMM.
//!
//! **A device's files**, of which [`rng`] is the smallest example:
//! `mod.rs` (what it is, its constants), `device.rs` (the [`VirtioDevice`]),
//! `handler.rs` (the queues), the back end, and `tests.rs`.

pub mod block;
mod device;
mod interrupt;
pub mod mshare;
mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod test_utils;
mod transport;
pub mod vsock;
mod worker;

pub use device::{ActivateError, Activation, ShmRegion, VirtioDevice, read_config_bytes};
pub use interrupt::Interrupt;
pub use queue::{Chain, QueueError, VirtQueue};
pub use transport::{Error as TransportError, MmioTransport};
pub use worker::{Worker, WorkerThread, give_up, unwatch, watch};

/// Queue size every device offers, in descriptors.
pub const QUEUE_SIZE: u16 = 256;
