//! The threads that serve the queues.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread;

use mshare_pool::client::Client;
use mshare_protocol::broker::{Failure, Policy, Region};
use mshare_protocol::device::{
    VIRTIO_MSHARE_LIST_MAX, VIRTIO_MSHARE_NAME_LEN, virtio_mshare_ack, virtio_mshare_list,
    virtio_mshare_req, virtio_mshare_resp,
};
use mshare_protocol::report::chain;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::attachment::{AttachError, Attachment};
use super::describe;
use super::request::{Call, Errno, parse};
use super::state::{Active, Doorbells, Shared, current};
use crate::devices::virtio::{Chain, QueueError};
use crate::vstate::vm::Vm;

/// What the threads need besides the shared state.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) shared: Arc<Shared>,
    pub(super) client: Arc<Client>,
    pub(super) vm: Arc<Vm>,
    pub(super) policy: Policy,
}

/// What is written into the device's part of a request.
enum Answer {
    Resp(virtio_mshare_resp),
    List(Box<virtio_mshare_list>),
}

impl Service {
    /// Starts the two threads. They wait for activations until the device
    /// ends, and are not joined: one that waits for a broker which never comes
    /// must not keep the process.
    pub(super) fn start(&self) -> std::io::Result<()> {
        let service = self.clone();
        thread::Builder::new()
            .name("mshare-ctrl".to_owned())
            .spawn(move || {
                let _guard = service.shared.unless_panic("the thread mshare-ctrl");
                service.serve_ctrl();
            })?;
        let service = self.clone();
        let started = thread::Builder::new()
            .name("mshare-ack".to_owned())
            .spawn(move || {
                let _guard = service.shared.unless_panic("the thread mshare-ack");
                service.serve_events();
            });
        if started.is_err() {
            self.shared.end();
        }
        started.map(drop)
    }

    fn serve_ctrl(&self) {
        let mut last = 0;
        while let Some(bells) = self.shared.next_activation(last) {
            last = bells.generation;
            self.attend(&bells, &[&bells.ctrl], || self.serve_requests(&bells));
            // Before anything of the next activation.
            let gone = std::mem::take(&mut self.shared.lock().to_detach);
            for id in gone {
                self.tell_detached(id);
            }
        }
    }

    fn serve_events(&self) {
        let mut last = 0;
        while let Some(bells) = self.shared.next_activation(last) {
            last = bells.generation;
            let rings = [&bells.event, &bells.ack];
            self.attend(&bells, &rings, || self.serve_driver(&bells));
            for seq in self.shared.acks_of_reset() {
                self.client.ack(seq);
            }
        }
    }

    /// Calls `serve` whenever one of `rings` does, to the end of the
    /// activation. A broken queue is not looked at again.
    fn attend(
        &self,
        bells: &Doorbells,
        mut rings: &[&EventFd],
        serve: impl Fn() -> Result<(), QueueError>,
    ) {
        while wait(rings, &bells.stop) {
            for ring in rings {
                let _ = ring.read();
            }
            if let Err(error) = serve() {
                self.give_up(bells, &error);
                rings = &[];
            }
        }
    }

    /// Serves requests until there is none and the next one will ring.
    fn serve_requests(&self, bells: &Doorbells) -> Result<(), QueueError> {
        loop {
            while self.serve_one(bells)? {}
            let mut queues = self.shared.queues();
            let Some(active) = current(&mut queues, bells) else {
                return Ok(());
            };
            if !active.ctrl.enable_notify(&bells.mem)? {
                return Ok(());
            }
        }
    }

    /// Serves the next request; false if there is none.
    fn serve_one(&self, bells: &Doorbells) -> Result<bool, QueueError> {
        let mut queues = self.shared.queues();
        let Some(active) = current(&mut queues, bells) else {
            return Ok(false);
        };
        let Some(chain) = active.ctrl.pop(&bells.mem)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let request = read_request(&chain, &bells.mem);
        drop(queues);

        // No lock here: the broker may need this guest's acknowledgement.
        let answer = match request {
            Ok(request) => match parse(&request, self.policy) {
                Ok(call) => self.execute(call, bells),
                Err(errno) => failed(errno),
            },
            Err(errno) => failed(errno),
        };

        let mut queues = self.shared.queues();
        let Some(active) = current(&mut queues, bells) else {
            return Ok(false);
        };
        let len = write_answer(&chain, &bells.mem, &answer);
        active.ctrl.add_used(&bells.mem, head, len)?;
        if active.ctrl.needs_interrupt(&bells.mem)? {
            active.interrupt.signal_used();
        }
        Ok(true)
    }

    fn execute(&self, call: Call, bells: &Doorbells) -> Answer {
        let region = |result: Result<Region, Failure>| match result {
            Ok(region) => self.region(&region),
            Err(failure) => failed(errno(&failure)),
        };
        let done = |result: Result<(), Failure>| match result {
            Ok(()) => Answer::Resp(virtio_mshare_resp::default()),
            Err(failure) => failed(errno(&failure)),
        };
        match call {
            Call::Lookup { name } => region(self.client.lookup(&name)),
            Call::Create {
                name,
                mode,
                uid,
                gid,
            } => region(self.client.create(&name, mode, uid, gid)),
            Call::Size { id, start, len } => region(self.client.size(id, start, len)),
            Call::Attach { id } => match self.attach(id, bells) {
                Ok(attached) => self.region(&attached),
                Err(errno) => failed(errno),
            },
            Call::Detach { id } => {
                // The memslots go first: once the broker knows, the memory may
                // belong to another region.
                match self.shared.detach(id) {
                    Ok(true) => done(self.client.detach(id)),
                    Ok(false) => failed(Errno(libc::ENOTCONN)),
                    Err(_) => failed(Errno(libc::EIO)),
                }
            }
            Call::Protect {
                id,
                offset,
                len,
                prot,
            } => done(self.client.protect(id, offset, len, prot)),
            Call::Discard { id, offset, len } => done(self.client.discard(id, offset, len)),
            Call::Unlink { name, id } => done(self.client.unlink(&name, Some(id))),
            Call::Stat { id } => region(self.client.stat(id)),
            Call::List { from } => self.list(from),
        }
    }

    fn region(&self, region: &Region) -> Answer {
        Answer::Resp(virtio_mshare_resp {
            region: describe(self.client.geometry(), self.policy, region),
            ..Default::default()
        })
    }

    fn attach(&self, id: u64, bells: &Doorbells) -> Result<Region, Errno> {
        if !bells.may_attach {
            bells.interrupt.complaints().warn(format_args!(
                "region {id} is not attached: the pool has huge pages, and the guest's \
                 driver does not understand them"
            ));
            return Err(Errno(libc::EOPNOTSUPP));
        }
        let revocations = self.shared.lock().revocations;
        let region = self.client.attach(id).map_err(|f| errno(&f))?;
        let shown = self.shared.attach(id, bells, revocations, || {
            let (files, geometry) = (self.client.files(), self.client.geometry());
            Attachment::new(&self.vm, files, geometry, self.policy, &region)
        });
        match shown {
            Ok(()) => Ok(region),
            // The run ends; until then the broker must believe in it.
            Err(AttachError::Remove(_)) => Err(Errno(libc::EIO)),
            Err(AttachError::Overtaken { .. }) => {
                self.tell_detached(id);
                Err(Errno(libc::EIO))
            }
            Err(error) => {
                let complaints = bells.interrupt.complaints();
                complaints.warn(format_args!("{}", chain(&error)));
                self.tell_detached(id);
                Err(Errno(libc::ENOMEM))
            }
        }
    }

    fn list(&self, mut from: u64) -> Answer {
        let mut list = Box::new(virtio_mshare_list::new_zeroed());
        let mut count = 0;
        while count < VIRTIO_MSHARE_LIST_MAX {
            let max = u32::try_from(VIRTIO_MSHARE_LIST_MAX - count).unwrap_or(u32::MAX);
            let regions = match self.client.list(from, max) {
                Ok(regions) => regions,
                Err(failure) => return failed(errno(&failure)),
            };
            let Some(last) = regions.last() else { break };
            from = last.id.saturating_add(1);
            for region in regions.iter().take(VIRTIO_MSHARE_LIST_MAX - count) {
                let entry = &mut list.entry[count];
                let len = region.name.len().min(VIRTIO_MSHARE_NAME_LEN - 1);
                entry.id = region.id.into();
                entry.name_len = u32::try_from(len).unwrap_or(0).into();
                entry.name[..len].copy_from_slice(&region.name[..len]);
                count += 1;
            }
        }
        list.count = u32::try_from(count).unwrap_or(0).into();
        Answer::List(list)
    }

    fn tell_detached(&self, id: u64) {
        if let Err(failure) = self.client.detach(id) {
            log::debug!("the broker on the detach of region {id}: {failure}");
        }
    }

    /// Tells the driver of events and takes its acknowledgements.
    fn serve_driver(&self, bells: &Doorbells) -> Result<(), QueueError> {
        let mut queues = self.shared.queues();
        let Some(active) = current(&mut queues, bells) else {
            return Ok(());
        };
        let mut acked = Vec::new();
        let served = self
            .shared
            .deliver(active)
            .and_then(|()| self.take_acks(active, &mut acked));
        // A broker that is slow to read keeps this thread only.
        drop(queues);
        for seq in acked {
            self.client.ack(seq);
        }
        served
    }

    /// Takes acknowledgements, at most as many as the queue is long; then the
    /// queue's bell rings again.
    fn take_acks(&self, active: &mut Active, acked: &mut Vec<u64>) -> Result<(), QueueError> {
        let (mem, queue) = (&active.mem, &mut active.ack);
        let mut used = false;
        for budget in (0..=queue.size()).rev() {
            if budget == 0 {
                queue.notify_self();
                break;
            }
            let Some(chain) = queue.pop(mem)? else {
                if queue.enable_notify(mem)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let mut bytes = [0; size_of::<virtio_mshare_ack>()];
            let read = chain
                .reader(mem)
                .map_err(std::io::Error::other)
                .and_then(|mut reader| reader.read_exact(&mut bytes));
            queue.add_used(mem, head, 0)?;
            used = true;
            let seq = u64::from_le_bytes(bytes);
            if read.is_ok() && self.shared.acknowledge(seq) {
                acked.push(seq);
            }
        }
        if used && queue.needs_interrupt(mem)? {
            active.interrupt.signal_used();
        }
        Ok(())
    }

    /// Ends the service of an activation whose driver broke a queue.
    fn give_up(&self, bells: &Doorbells, error: &QueueError) {
        let mut queues = self.shared.queues();
        if let Some(active) = current(&mut queues, bells) {
            active.interrupt.complaints().warn(format_args!(
                "the mshare driver broke a queue: {}",
                chain(error)
            ));
            active.interrupt.fail();
            *queues = None;
        }
    }
}

/// Waits for a doorbell; false when told to stop.
fn wait(bells: &[&EventFd], stop: &EventFd) -> bool {
    let mut fds: Vec<_> = bells
        .iter()
        .chain(&[stop])
        .map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN))
        .collect();
    loop {
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("the mshare device cannot wait for its queues: {error}");
                return false;
            }
        }
    }
    fds.last().is_some_and(|stop| stop.revents().is_empty())
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn read_request(chain: &Chain<'_>, mem: &GuestMemoryMmap) -> Result<virtio_mshare_req, Errno> {
    let mut bytes = [0; size_of::<virtio_mshare_req>()];
    let mut reader = chain.clone().reader(mem).map_err(|_| Errno(libc::EFAULT))?;
    reader
        .read_exact(&mut bytes)
        .map_err(|_| Errno(libc::EINVAL))?;
    virtio_mshare_req::read_from_bytes(&bytes).map_err(|_| Errno(libc::EINVAL))
}

/// Bytes written; 0 if the driver left no room for the answer.
fn write_answer(chain: &Chain<'_>, mem: &GuestMemoryMmap, answer: &Answer) -> u32 {
    let bytes = match answer {
        Answer::Resp(resp) => resp.as_bytes(),
        Answer::List(list) => list.as_bytes(),
    };
    let Ok(mut writer) = chain.clone().writer(mem) else {
        return 0;
    };
    if writer.available_bytes() < bytes.len() || writer.write_all(bytes).is_err() {
        return 0;
    }
    u32::try_from(bytes.len()).unwrap_or(0)
}

fn failed(errno: Errno) -> Answer {
    Answer::Resp(virtio_mshare_resp {
        status: errno.status().into(),
        ..Default::default()
    })
}

fn errno(failure: &Failure) -> Errno {
    log::debug!("the broker refuses: {failure}");
    Errno(failure.errno)
}
