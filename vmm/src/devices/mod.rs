//! What the guest sees besides memory and CPUs.
//!
//! Every device answers on a [`bus`]. Work that is not part of a guest's
//! access (host files, sockets, the terminal) is done by the thread named
//! `devices`, which runs one [`EventLoop`]; a device joins it as a
//! [`Subscriber`].

use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint};

pub mod bus;
pub mod complaints;
pub mod console;
pub mod ioapic;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub mod serial_input;
pub mod virtio;

/// A device's part in the event loop of the `devices` thread.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The event loop of the `devices` thread.
pub type EventLoop = EventManager<Subscriber>;

/// A handle with which another thread adds work to the event loop.
///
/// Use [`RemoteEndpoint::fire`] from a vCPU thread: `call_blocking` would wait
/// for the `devices` thread while the caller holds a device's lock.
pub type EventLoopHandle = RemoteEndpoint<Subscriber>;
