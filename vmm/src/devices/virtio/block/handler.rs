//! The disk's queue.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::GuestMemoryMmap;

use super::Disk;
use super::request::Server;
use crate::devices::virtio::{
    ActivateError, Activation, Interrupt, QueueError, VirtQueue, give_up, watch,
};

/// Serves the requests in the disk's queue, in order.
#[derive(Debug)]
pub(super) struct BlockHandler {
    mem: GuestMemoryMmap,
    queue: VirtQueue,
    interrupt: Arc<Interrupt>,
    disk: Arc<Disk>,
    server: Server,
}

impl BlockHandler {
    pub(super) fn new(mut activation: Activation, disk: Arc<Disk>) -> Result<Self, ActivateError> {
        let [queue] = activation.take_queues()?;
        Ok(Self {
            mem: activation.mem,
            queue,
            interrupt: activation.interrupt,
            disk,
            server: Server::new(activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0),
        })
    }

    fn serve_queue(&mut self) -> Result<(), QueueError> {
        self.queue.clear_notify();
        let complaints = self.interrupt.complaints();
        self.queue.serve_all(&self.mem, &self.interrupt, |chain| {
            self.server.serve(&self.disk, &self.mem, chain, complaints)
        })
    }
}

impl MutEventSubscriber for BlockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.queue, 0, &self.interrupt);
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        if let Err(error) = self.serve_queue() {
            give_up("block", &error, &self.interrupt, ops, [&self.queue]);
        }
    }
}
