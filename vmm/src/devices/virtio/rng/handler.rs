//! The entropy device's queue.

use std::io::Write;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::GuestMemoryMmap;

use crate::devices::complaints::Complaints;
use crate::devices::virtio::{
    ActivateError, Activation, Chain, Interrupt, QueueError, VirtQueue, give_up, watch,
};

/// Bytes given for one request at most. The driver asks again if it wants
/// more; a request may not hold the thread for long.
const MAX_BYTES: usize = 4096;

/// Fills the driver's buffers with random bytes.
#[derive(Debug)]
pub(super) struct RngHandler {
    mem: GuestMemoryMmap,
    queue: VirtQueue,
    interrupt: Arc<Interrupt>,
}

impl RngHandler {
    pub(super) fn new(mut activation: Activation) -> Result<Self, ActivateError> {
        let [queue] = activation.take_queues()?;
        Ok(Self {
            mem: activation.mem,
            queue,
            interrupt: activation.interrupt,
        })
    }

    pub(super) fn serve_queue(&mut self) -> Result<(), QueueError> {
        self.queue.clear_notify();
        let complaints = self.interrupt.complaints();
        self.queue.serve_all(&self.mem, &self.interrupt, |chain| {
            fill(&self.mem, complaints, chain)
        })
    }
}

/// Writes random bytes into `chain`; returns how many. A chain that is not
/// usable gets none.
fn fill(mem: &GuestMemoryMmap, complaints: &Complaints, chain: Chain<'_>) -> u32 {
    let Ok(mut writer) = chain.writer(mem) else {
        return 0;
    };
    let mut bytes = [0; MAX_BYTES];
    let wanted = writer.available_bytes().min(MAX_BYTES);
    let random = match getrandom(&mut bytes[..wanted], GetRandomFlags::empty()) {
        Ok(random) => random,
        Err(error) => {
            complaints.warn(format_args!("no random numbers from the host: {error}"));
            return 0;
        }
    };
    if writer.write_all(&bytes[..random]).is_err() {
        return 0;
    }
    u32::try_from(random).unwrap_or(0)
}

impl MutEventSubscriber for RngHandler {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.queue, 0, &self.interrupt);
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        if let Err(error) = self.serve_queue() {
            give_up("rng", &error, &self.interrupt, ops, [&self.queue]);
        }
    }
}
