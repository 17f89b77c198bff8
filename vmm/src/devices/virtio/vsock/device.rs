//! The socket device as the guest's CPUs see it.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::HostSocket;
use super::handler::VsockHandler;
use crate::devices::EventLoopHandle;
use crate::devices::virtio::{
    ActivateError, Activation, QUEUE_SIZE, VirtioDevice, Worker, WorkerThread, read_config_bytes,
};

/// A guest cannot have this CID.
#[derive(Debug, thiserror::Error)]
#[error("vsock CID {0} is not usable; choose one from 3 to 4294967294")]
pub struct BadCid(pub u64);

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    host: Arc<HostSocket>,
    thread: WorkerThread,
    worker: Option<Worker>,
}

impl Vsock {
    /// The socket device of the guest with CID `guest_cid`, whose connections
    /// go through `host`; works on the event loop `events`.
    ///
    /// # Errors
    ///
    /// `guest_cid` is reserved (virtio 1.2, section 5.10.4) or not 32 bits.
    pub fn new(guest_cid: u64, host: HostSocket, events: EventLoopHandle) -> Result<Self, BadCid> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(BadCid(guest_cid));
        }
        Ok(Self {
            guest_cid,
            host: Arc::new(host),
            thread: events.into(),
            worker: None,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn avail_features(&self) -> u64 {
        // Without any, it is a device of stream sockets (section 5.10.3).
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let handler = VsockHandler::new(activation, self.guest_cid, self.host.clone())?;
        self.worker = Some(Worker::start(&self.thread, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}
