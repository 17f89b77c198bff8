//! The entropy device as the guest's CPUs see it.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::handler::RngHandler;
use crate::devices::EventLoopHandle;
use crate::devices::virtio::{
    ActivateError, Activation, QUEUE_SIZE, VirtioDevice, Worker, WorkerThread,
};

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    thread: WorkerThread,
    worker: Option<Worker>,
}

impl Rng {
    /// An entropy device that works on the event loop `events`.
    pub fn new(events: EventLoopHandle) -> Self {
        Self {
            thread: events.into(),
            worker: None,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn avail_features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {
        // It has no configuration space.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let handler = RngHandler::new(activation)?;
        self.worker = Some(Worker::start(&self.thread, handler)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}
