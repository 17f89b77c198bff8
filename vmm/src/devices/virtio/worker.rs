//! A handler's stay on the `devices` thread.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::{ActivateError, Interrupt, QueueError, VirtQueue};
use crate::devices::EventLoopHandle;

type Handler = Box<dyn MutEventSubscriber + Send>;

/// Where handlers work: the event loop of the `devices` thread.
#[derive(Clone)]
pub struct WorkerThread(EventLoopHandle);

impl From<EventLoopHandle> for WorkerThread {
    fn from(events: EventLoopHandle) -> Self {
        Self(events)
    }
}

impl std::fmt::Debug for WorkerThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkerThread")
    }
}

/// A handler at work. See the hand-over rules in the module's overview.
pub struct Worker {
    thread: WorkerThread,
    slot: Arc<Mutex<Slot>>,
    /// The loop's name for the slot, once it is there.
    id: Arc<OnceLock<event_manager::SubscriberId>>,
}

/// The subscriber the loop knows: a handler until it is stopped, then nothing.
struct Slot(Option<Handler>);

impl MutEventSubscriber for Slot {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Some(handler) = &mut self.0 {
            handler.process(events, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Some(handler) = &mut self.0 {
            handler.init(ops);
        }
    }
}

impl Worker {
    /// Gives `handler` to the event loop of `thread`. Does not wait for it.
    ///
    /// # Errors
    ///
    /// The loop has ended.
    pub fn start<H>(thread: &WorkerThread, handler: H) -> Result<Self, ActivateError>
    where
        H: MutEventSubscriber + Send + 'static,
    {
        let slot = Arc::new(Mutex::new(Slot(Some(Box::new(handler)))));
        let id = Arc::new(OnceLock::new());
        let (subscriber, cell) = (slot.clone(), id.clone());
        thread
            .0
            .fire(move |ops| {
                // Set once: this closure runs once.
                let _ = cell.set(ops.add_subscriber(subscriber));
            })
            .map_err(ActivateError::EventLoop)?;
        Ok(Self {
            thread: thread.clone(),
            slot,
            id,
        })
    }

    /// Takes the handler out of the loop. When this returns it does nothing
    /// any more.
    pub fn stop(self) {
        // Dropping does it.
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The loop holds this lock while the handler serves an event.
        let handler = self
            .slot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .take();
        let id = self.id.clone();
        // The handler's descriptors are closed by the loop's thread, after they
        // have left the loop: a number must not be used again before.
        // Requests are served in order, so the handler has been added by then.
        // If the loop has ended, the handler is dropped here and now.
        let _ = self.thread.0.fire(move |ops| {
            if let Some(id) = id.get() {
                let _ = ops.remove_subscriber(*id);
            }
            drop(handler);
        });
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Lets the loop call the handler, with `token`, when the driver notifies
/// `queue`.
///
/// A queue that cannot be watched is a device that never answers, so the
/// device then asks for a reset.
pub fn watch(ops: &mut EventOps, queue: &VirtQueue, token: u32, interrupt: &Interrupt) {
    let events = Events::with_data(queue.notify_fd(), token, EventSet::IN);
    if let Err(error) = ops.add(events) {
        log::error!("cannot watch a virtio queue: {error}");
        interrupt.fail();
    }
}

/// Stops watching `queue`.
pub fn unwatch(ops: &mut EventOps, queue: &VirtQueue) {
    // It fails if the queue is not watched, which is the state asked for.
    let _ = ops.remove(Events::empty(queue.notify_fd()));
}

/// Ends the service of a device whose driver broke a queue: NEEDS_RESET, and
/// no more events from its queues.
pub fn give_up<'q>(
    device: &str,
    error: &QueueError,
    interrupt: &Interrupt,
    ops: &mut EventOps,
    queues: impl IntoIterator<Item = &'q VirtQueue>,
) {
    let cause = std::error::Error::source(error).map_or_else(String::new, |c| format!(": {c}"));
    interrupt.complaints().warn(format_args!(
        "{device}: the guest broke a queue and must reset the device: {error}{cause}"
    ));
    interrupt.fail();
    for queue in queues {
        unwatch(ops, queue);
    }
}
