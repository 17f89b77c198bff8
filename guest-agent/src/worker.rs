//! One process of a group: reads operations from its standard input, a socket,
//! carries them out and answers.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::time::Duration;

use mshare_protocol::agent::{Failure, Map, MemOp, Op, OpError, Probe, Value};
use mshare_protocol::entry::{PAGE_SIZE, PUD_SIZE};
use mshare_protocol::frame::{self, FrameError};
use rustix::mm::{MapFlags, ProtFlags};

use crate::spin::Spinner;
use crate::{access, mem, paths, probe, region};

/// A mapping of this process.
#[derive(Debug)]
struct Slot {
    start: u64,
    /// Bytes that belong to the region or file.
    len: u64,
    /// Bytes of address space, of which those past `len` fault.
    extent: u64,
}

/// State of the process.
#[derive(Debug, Default)]
struct Worker {
    slots: BTreeMap<u32, Slot>,
    spinner: Option<Spinner>,
    /// See [`Op::Keep`].
    kept: Option<File>,
}

/// Serves the socket on descriptor 0 until the agent closes it.
///
/// # Errors
/// If the handler for faults cannot be installed or the socket fails.
pub fn main() -> Result<(), FrameError> {
    access::install()?;
    // SAFETY: descriptor 0 is the socket that the agent gave this process;
    // nothing else in it uses standard input.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let mut worker = Worker::default();
    loop {
        let op: Op = match frame::receive(&mut socket) {
            Ok(op) => op,
            Err(FrameError::Closed) => return Ok(()),
            Err(e) => return Err(e),
        };
        frame::send(&mut socket, &worker.run(op))?;
    }
}

impl Worker {
    fn run(&mut self, op: Op) -> Result<Value, OpError> {
        match op {
            Op::Map { slot, map } => self.map(slot, &map).map_err(OpError::Failed),
            Op::Unmap { slot } => self.unmap(slot).map_err(OpError::Failed),
            Op::Mem { slot, offset, mem } => self.mem(slot, offset, mem),
            Op::SpinStatus => self
                .spinner
                .as_ref()
                .map(|spinner| Value::Spin(spinner.report()))
                .ok_or_else(no_spinner),
            Op::SpinStop => self
                .spinner
                .take()
                .map(|spinner| Value::Spin(spinner.stop()))
                .ok_or_else(no_spinner),
            Op::Region(op) => region::run(&op).map_err(OpError::Failed),
            Op::Keep { name, oflag } => {
                self.kept = Some(region::open(&name, oflag).map_err(OpError::Failed)?);
                Ok(Value::Done)
            }
            Op::Kept(op) => match &self.kept {
                Some(file) => region::on_file(file, &op).map_err(OpError::Failed),
                None => Err(invalid("the process keeps no file open")),
            },
            Op::Churn {
                name,
                addr,
                len,
                rounds,
            } => region::churn(&name, addr, len, rounds).map_err(OpError::Failed),
            Op::BadCall(call) => paths::bad_call(&call).map_err(OpError::Failed),
            Op::Path { path, op } => paths::run(&path, &op).map_err(OpError::Failed),
            Op::SetUser { uid, gid } => set_user(uid, gid).map_err(OpError::Failed),
            Op::LockFuture { limit } => lock_future(limit).map_err(OpError::Failed),
            Op::Sleep { ms } => {
                std::thread::sleep(Duration::from_millis(ms.into()));
                Ok(Value::Done)
            }
        }
    }

    fn map(&mut self, index: u32, map: &Map) -> Result<Value, Failure> {
        if self.slots.contains_key(&index) {
            return Err(Failure::new(format!(
                "slot {index} is in use: unmap it first, or take another"
            )));
        }
        let slot = match map {
            Map::Mshare {
                name,
                addr,
                len,
                oflag,
                mode,
            } => map_region(name, *addr, *len, *oflag, *mode)?,
            Map::File {
                path,
                addr,
                len,
                write,
            } => map_file(path, *addr, *len, *write)?,
            Map::Anonymous { addr, len } => map_anonymous(*addr, *len)?,
        };
        let (start, len) = (slot.start, slot.len);
        self.slots.insert(index, slot);
        Ok(Value::Mapped { start, len })
    }

    fn unmap(&mut self, index: u32) -> Result<Value, Failure> {
        let slot = self.slots.get(&index).ok_or_else(|| no_slot(index))?;
        // SAFETY: exactly the mapping that this slot made; the slot goes.
        unsafe { rustix::mm::munmap(pointer(slot.start), size(slot.extent)?) }
            .map_err(|e| Failure::os("munmap", &e.into()))?;
        self.slots.remove(&index);
        Ok(Value::Done)
    }

    fn mem(&mut self, index: u32, offset: u64, mem: MemOp) -> Result<Value, OpError> {
        let slot = self
            .slots
            .get(&index)
            .ok_or_else(|| OpError::Failed(no_slot(index)))?;
        let addr = slot.start.saturating_add(offset);
        // SAFETY, for all accesses: `range` checks that they lie in the slot,
        // a mapping made for the purpose at an address where the process has
        // nothing else. If a probe or an unlink has torn a hole in it, the
        // kernel does not choose that place for anything else: it lies far
        // below the top of the address space, where it puts new mappings.
        match mem {
            MemOp::Touch { len, stride, write } => {
                if stride < 8 {
                    return Err(invalid("a stride is at least 8 bytes"));
                }
                let range = slot.range(offset, len)?;
                // SAFETY: see above.
                Ok(Value::Touched(unsafe { mem::touch(range, stride, write) }?))
            }
            MemOp::Fill { len, seed } => {
                let range = slot.range(offset, len)?;
                // SAFETY: see above.
                unsafe { mem::fill(range, offset, seed) }?;
                Ok(Value::Done)
            }
            MemOp::Verify { len, seed } => {
                let range = slot.range(offset, len)?;
                // SAFETY: see above.
                let seen = unsafe { mem::verify(range, offset, Some(seed)) }?;
                Ok(Value::Verified(seen))
            }
            MemOp::VerifyZero { len } => {
                let range = slot.range(offset, len)?;
                // SAFETY: see above.
                Ok(Value::Verified(unsafe {
                    mem::verify(range, offset, None)
                }?))
            }
            MemOp::Load => {
                slot.range(offset, 8)?;
                // SAFETY: see above.
                Ok(Value::Word(unsafe { access::load(addr) }?))
            }
            MemOp::Store { value } => {
                slot.range(offset, 8)?;
                // SAFETY: see above.
                unsafe { access::store(addr, value) }?;
                Ok(Value::Done)
            }
            MemOp::Try { write } => {
                slot.range(offset, 8)?;
                let result = if write {
                    // SAFETY: see above.
                    unsafe { access::touch_write(addr) }
                } else {
                    // SAFETY: see above.
                    unsafe { access::load(addr) }.map(drop)
                };
                Ok(Value::Access(result.err()))
            }
            MemOp::Spin(kind) => {
                slot.range(offset, 8)?;
                if self.spinner.is_some() {
                    return Err(invalid("the process has a spinner: stop it first"));
                }
                // SAFETY: see above.
                let spinner = unsafe { Spinner::start(addr, kind) }
                    .map_err(|e| OpError::Failed(Failure::os("start a thread", &e)))?;
                self.spinner = Some(spinner);
                Ok(Value::Done)
            }
            MemOp::Probe(call) => {
                slot.range(offset, 8)?;
                // SAFETY: see above; the lengths of a probe are the caller's
                // to choose, the process is there to be experimented on.
                let mut probed = unsafe { probe::run(&call, addr) }.map_err(OpError::Failed)?;
                if let (Probe::Munmap { .. }, Some(spinner)) = (&call, &self.spinner) {
                    probed.extra = spinner.accesses_within(Duration::from_millis(1));
                }
                Ok(Value::Probe(probed))
            }
        }
    }
}

impl Slot {
    /// Addresses of `len` bytes (0: all up to the end) at `offset`. May reach
    /// past the region's end to the end of its address space.
    fn range(&self, offset: u64, len: u64) -> Result<Range<u64>, OpError> {
        let len = match len {
            0 => self.len.saturating_sub(offset),
            len => len,
        };
        match offset.checked_add(len) {
            Some(end)
                if end <= self.extent && offset.is_multiple_of(8) && len.is_multiple_of(8) =>
            {
                Ok(self.start + offset..self.start + end)
            }
            _ => Err(invalid(&format!(
                "offset {offset:#x} and length {len:#x} must be multiples of 8 within {:#x}",
                self.extent
            ))),
        }
    }
}

fn no_slot(index: u32) -> Failure {
    Failure::new(format!("nothing is mapped in slot {index}"))
}

fn no_spinner() -> OpError {
    invalid("the process has no spinner")
}

fn invalid(message: &str) -> OpError {
    OpError::Failed(Failure::new(message))
}

fn pointer(addr: u64) -> *mut core::ffi::c_void {
    ptr::with_exposed_provenance_mut(usize::try_from(addr).unwrap_or(0))
}

fn size(len: u64) -> Result<usize, Failure> {
    usize::try_from(len).map_err(|_| Failure::new(format!("length {len:#x} is too long")))
}

fn map_region(name: &str, addr: u64, len: u64, oflag: i32, mode: u32) -> Result<Slot, Failure> {
    region::mshare(name, addr, len, oflag, mode)?;
    let (start, len) = if addr == 0 || len == 0 {
        region::extent(name)?
    } else {
        (addr, len)
    };
    Ok(Slot {
        start,
        len,
        extent: len.next_multiple_of(PUD_SIZE),
    })
}

fn map_file(path: &str, addr: u64, len: u64, write: bool) -> Result<Slot, Failure> {
    let fail = |e: std::io::Error| Failure::os(format_args!("map {path}"), &e);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(fail)?;
    // Only ever longer: other processes of the group map it at the same time.
    if file.metadata().map_err(fail)?.len() < len {
        file.set_len(len).map_err(fail)?;
    }
    let prot = if write {
        ProtFlags::READ | ProtFlags::WRITE
    } else {
        ProtFlags::READ
    };
    let flags = MapFlags::SHARED | fixed(addr);
    // SAFETY: a new mapping, which replaces nothing (NOREPLACE).
    let start = unsafe { rustix::mm::mmap(pointer(addr), size(len)?, prot, flags, &file, 0) };
    finish(start, len)
}

fn map_anonymous(addr: u64, len: u64) -> Result<Slot, Failure> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | fixed(addr);
    // SAFETY: a new mapping, which replaces nothing (NOREPLACE).
    let start = unsafe { rustix::mm::mmap_anonymous(pointer(addr), size(len)?, prot, flags) };
    finish(start, len)
}

fn fixed(addr: u64) -> MapFlags {
    if addr == 0 {
        MapFlags::empty()
    } else {
        MapFlags::FIXED_NOREPLACE
    }
}

fn finish(start: rustix::io::Result<*mut core::ffi::c_void>, len: u64) -> Result<Slot, Failure> {
    let start = start.map_err(|e| Failure::os("mmap", &e.into()))?;
    Ok(Slot {
        start: start.expose_provenance() as u64,
        len,
        extent: len.next_multiple_of(PAGE_SIZE),
    })
}

fn lock_future(limit: u64) -> Result<Value, Failure> {
    let limit = rustix::process::Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    rustix::process::setrlimit(rustix::process::Resource::Memlock, limit)
        .map_err(|e| Failure::os("setrlimit", &e.into()))?;
    rustix::mm::mlockall(rustix::mm::MlockAllFlags::FUTURE)
        .map_err(|e| Failure::os("mlockall", &e.into()))?;
    Ok(Value::Done)
}

fn set_user(uid: u32, gid: u32) -> Result<Value, Failure> {
    let fail = |what: &str| Failure::os(what, &std::io::Error::last_os_error());
    // SAFETY: the list of groups is empty, so no pointer is followed.
    if unsafe { libc::setgroups(0, ptr::null()) } != 0 {
        return Err(fail("setgroups"));
    }
    // SAFETY: takes no pointer. (glibc applies it to every thread.)
    if unsafe { libc::setgid(gid) } != 0 {
        return Err(fail("setgid"));
    }
    // SAFETY: takes no pointer.
    if unsafe { libc::setuid(uid) } != 0 {
        return Err(fail("setuid"));
    }
    Ok(Value::Done)
}
