//! The threads that serve the queues.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use mshare_pool::client::{Acker, Client};
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

use super::attachment::Attachment;
use super::describe;
use super::request::{Call, Errno, parse};
use super::state::{Active, Shared, State};
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

/// The threads of one activation.
#[derive(Debug)]
pub(super) struct Threads {
    stop: EventFd,
    ctrl: JoinHandle<()>,
    ack: JoinHandle<()>,
}

/// The doorbells of the queues, with the number of their activation.
#[derive(Debug)]
struct Doorbells {
    generation: u64,
    mem: GuestMemoryMmap,
    ctrl: EventFd,
    event: EventFd,
    ack: EventFd,
    stop: EventFd,
}

/// What is written into the device's part of a request.
enum Answer {
    Resp(virtio_mshare_resp),
    List(Box<virtio_mshare_list>),
}

impl Threads {
    /// Starts to serve `active`. `before` are the threads of the activation
    /// before, which may still wait for the broker.
    pub(super) fn start(
        service: &Service,
        active: Active,
        before: Option<Self>,
    ) -> std::io::Result<Self> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let bells = || {
            Ok::<_, std::io::Error>(Doorbells {
                generation: service.shared.lock().generation,
                mem: active.mem.clone(),
                ctrl: active.ctrl.notify_fd().try_clone()?,
                event: active.event.notify_fd().try_clone()?,
                ack: active.ack.notify_fd().try_clone()?,
                stop: stop.try_clone()?,
            })
        };
        let (ctrl_bells, ack_bells) = (bells()?, bells()?);
        service.shared.lock().active = Some(active);
        let ctrl_service = service.clone();
        let ctrl = thread::Builder::new()
            .name("mshare-ctrl".to_owned())
            .spawn(move || {
                // Detaches of the activation before go out before anything of
                // this one.
                if let Some(before) = before {
                    before.join();
                }
                ctrl_service.serve_ctrl(&ctrl_bells);
            })?;
        let ack_service = service.clone();
        let ack = thread::Builder::new()
            .name("mshare-ack".to_owned())
            .spawn(move || ack_service.serve_events(&ack_bells))?;
        Ok(Self { stop, ctrl, ack })
    }

    /// Tells the threads to leave; they may still wait for the broker.
    pub(super) fn stop(&self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop the threads of the mshare device: {error}");
        }
    }

    fn join(self) {
        for thread in [self.ctrl, self.ack] {
            if thread.join().is_err() {
                log::error!("a thread of the mshare device panicked");
            }
        }
    }
}

impl Service {
    fn serve_ctrl(&self, bells: &Doorbells) {
        while wait(&[&bells.ctrl], &bells.stop) {
            let _ = bells.ctrl.read();
            if let Err(error) = self.serve_requests(bells) {
                self.give_up(bells, &error);
            }
        }
        let gone = std::mem::take(&mut self.shared.lock().to_detach);
        for id in gone {
            self.tell_detached(id);
        }
    }

    /// Serves requests until there is none and the next one will ring.
    fn serve_requests(&self, bells: &Doorbells) -> Result<(), QueueError> {
        loop {
            while self.serve_one(bells)? {}
            let mut state = self.shared.lock();
            let Some(active) = current(&mut state, bells) else {
                return Ok(());
            };
            if !active.ctrl.enable_notify(&bells.mem)? {
                return Ok(());
            }
        }
    }

    /// Serves the next request; false if there is none.
    fn serve_one(&self, bells: &Doorbells) -> Result<bool, QueueError> {
        let mut state = self.shared.lock();
        let Some(active) = current(&mut state, bells) else {
            return Ok(false);
        };
        let Some(chain) = active.ctrl.pop(&bells.mem)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let request = read_request(&chain, &bells.mem);
        drop(state);

        // No lock here: the broker may need this guest's acknowledgement.
        let answer = match request {
            Ok(request) => match parse(&request, self.policy) {
                Ok(call) => self.execute(call, bells.generation),
                Err(errno) => failed(errno),
            },
            Err(errno) => failed(errno),
        };

        let mut state = self.shared.lock();
        let Some(active) = current(&mut state, bells) else {
            return Ok(false);
        };
        let len = write_answer(&chain, &bells.mem, &answer);
        active.ctrl.add_used(&bells.mem, head, len)?;
        if active.ctrl.needs_interrupt(&bells.mem)? {
            active.interrupt.signal_used();
        }
        Ok(true)
    }

    fn execute(&self, call: Call, generation: u64) -> Answer {
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
            Call::Attach { id } => match self.attach(id, generation) {
                Ok(attached) => self.region(&attached),
                Err(errno) => failed(errno),
            },
            Call::Detach { id } => {
                // The memslots go first: once the broker knows, the memory may
                // belong to another region.
                let gone = self.shared.lock().attached.remove(&id);
                match gone {
                    Some(gone) => {
                        drop(gone);
                        done(self.client.detach(id))
                    }
                    None => failed(Errno(libc::ENOTCONN)),
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

    fn attach(&self, id: u64, generation: u64) -> Result<Region, Errno> {
        let state = self.shared.lock();
        let revocations = state.revocations;
        if state.active.as_ref().is_some_and(|a| !a.may_attach) {
            log::error!(
                "region {id} is not attached: the pool has huge pages, and the guest's \
                 driver does not understand them"
            );
            return Err(Errno(libc::EOPNOTSUPP));
        }
        drop(state);
        let region = self.client.attach(id).map_err(|f| errno(&f))?;
        let shown = Attachment::new(
            &self.vm,
            self.client.files(),
            self.client.geometry(),
            self.policy,
            &region,
        );
        let attachment = match shown {
            Ok(attachment) => attachment,
            Err(error) => {
                log::error!("{}", chain(&error));
                self.tell_detached(id);
                return Err(Errno(libc::ENOMEM));
            }
        };
        let mut state = self.shared.lock();
        if state.generation == generation && state.revocations == revocations {
            state.attached.insert(id, attachment);
            return Ok(region);
        }
        // The driver was reset or the broker gave the guest up meanwhile.
        drop(state);
        drop(attachment);
        self.tell_detached(id);
        Err(Errno(libc::EIO))
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

    fn serve_events(&self, bells: &Doorbells) {
        let acker = self.client.acker();
        while wait(&[&bells.event, &bells.ack], &bells.stop) {
            let _ = bells.event.read();
            let _ = bells.ack.read();
            let mut state = self.shared.lock();
            let Some(active) = current(&mut state, bells) else {
                continue;
            };
            let served = active
                .deliver()
                .and_then(|()| take_acks(active, bells, &acker));
            drop(state);
            if let Err(error) = served {
                self.give_up(bells, &error);
            }
        }
    }

    fn give_up(&self, bells: &Doorbells, error: &QueueError) {
        let mut state = self.shared.lock();
        if let Some(active) = current(&mut state, bells) {
            log::warn!("the mshare driver broke a queue: {}", chain(error));
            active.interrupt.fail();
        }
    }
}

/// The activation that `bells` belong to, if it has not ended.
fn current<'s>(state: &'s mut State, bells: &Doorbells) -> Option<&'s mut Active> {
    if state.generation != bells.generation {
        return None;
    }
    state.active.as_mut()
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

fn take_acks(active: &mut Active, bells: &Doorbells, acker: &Acker) -> Result<(), QueueError> {
    let mut used = false;
    loop {
        while let Some(chain) = active.ack.pop(&bells.mem)? {
            let head = chain.head_index();
            let mut bytes = [0; size_of::<virtio_mshare_ack>()];
            let read = chain
                .reader(&bells.mem)
                .map_err(std::io::Error::other)
                .and_then(|mut reader| reader.read_exact(&mut bytes));
            active.ack.add_used(&bells.mem, head, 0)?;
            used = true;
            if read.is_ok() {
                let seq = u64::from_le_bytes(bytes);
                if active.acknowledge(seq) {
                    acker.ack(seq);
                }
            }
        }
        if !active.ack.enable_notify(&bells.mem)? {
            break;
        }
    }
    if used && active.ack.needs_interrupt(&bells.mem)? {
        active.interrupt.signal_used();
    }
    Ok(())
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
