//! System calls on mapped memory. Each is made as asked and its result is
//! reported as it came: a refusal is a finding, not an error of the agent.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use mshare_protocol::agent::{Failure, Probe, Probed};

use crate::access;
use crate::region::check;

/// Makes the call on the memory at `addr`.
///
/// # Errors
/// Only if the call could not be made, such as for a file that is not there.
///
/// # Safety
/// As [`access::load`], for as many bytes as the probe names.
pub unsafe fn run(probe: &Probe, addr: u64) -> Result<Probed, Failure> {
    let at = ptr::with_exposed_provenance_mut::<libc::c_void>(size(addr));
    let vector = |len: u32| libc::iovec {
        iov_base: at,
        iov_len: size(len.into()),
    };
    let mut extra = 0;
    // SAFETY: for every call below: the kernel checks addresses and lengths
    // and reports bad ones; what it writes, unmaps or replaces is the memory
    // at `addr`, where by contract no Rust object lives. Other pointers are to
    // locals that outlive the call.
    let ret = unsafe {
        match probe {
            Probe::ODirectRead { path, len } => {
                let file = open(path, false, libc::O_DIRECT)?;
                check(libc::pread(file.as_raw_fd(), at, size((*len).into()), 0) as i64)
            }
            Probe::Pread { path, len } => {
                let file = open(path, false, 0)?;
                check(libc::pread(file.as_raw_fd(), at, size((*len).into()), 0) as i64)
            }
            Probe::Pwrite { path, len } => {
                let file = open(path, true, 0)?;
                check(libc::pwrite(file.as_raw_fd(), at, size((*len).into()), 0) as i64)
            }
            Probe::VmRead { len } | Probe::VmWrite { len } => {
                let write = matches!(probe, Probe::VmWrite { .. });
                let mut buffer = vec![0xa5u8; size((*len).into())];
                let local = libc::iovec {
                    iov_base: buffer.as_mut_ptr().cast(),
                    iov_len: buffer.len(),
                };
                let (remote, me) = (vector(*len), libc::getpid());
                let result = if write {
                    libc::process_vm_writev(me, &raw const local, 1, &raw const remote, 1, 0)
                } else {
                    libc::process_vm_readv(me, &raw const local, 1, &raw const remote, 1, 0)
                };
                extra = buffer.first().copied().unwrap_or(0).into();
                check(result as i64)
            }
            Probe::FutexWake { private } => {
                let op = libc::FUTEX_WAKE | flag(*private);
                check(libc::syscall(libc::SYS_futex, addr, op, i32::MAX))
            }
            Probe::FutexWait { private } => {
                let value = access::load(addr).map_err(|f| Failure::new(f.to_string()))?;
                let op = libc::FUTEX_WAIT | flag(*private);
                let timeout = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 10_000_000,
                };
                let low = value & 0xffff_ffff;
                check(libc::syscall(
                    libc::SYS_futex,
                    addr,
                    op,
                    low,
                    &raw const timeout,
                ))
            }
            Probe::MovePages => {
                let page = at;
                let mut status = 0i32;
                let ret = check(libc::syscall(
                    libc::SYS_move_pages,
                    0,
                    1,
                    &raw const page,
                    0,
                    &raw mut status,
                    0,
                ));
                extra = i64::from(status).cast_unsigned();
                ret
            }
            Probe::Madvise { len, advice } => check(libc::madvise(at, size(*len), *advice).into()),
            Probe::Mprotect { len, prot } => check(libc::mprotect(at, size(*len), *prot).into()),
            Probe::Munmap { len } => check(libc::munmap(at, size(*len)).into()),
            Probe::MmapFixed { len } => map_fixed(at, size(*len)),
            Probe::Mremap {
                old_len,
                new_len,
                flags,
            } => {
                let new = libc::mremap(at, size(*old_len), size(*new_len), *flags);
                check(new.expose_provenance().cast_signed() as i64)
            }
            Probe::Mlock { len } => check(libc::mlock(at, size(*len)).into()),
            Probe::Mincore => {
                let mut byte = 0;
                let ret = check(libc::mincore(at, 4096, &raw mut byte).into());
                extra = byte.into();
                ret
            }
            Probe::Mbind { len } => check(libc::syscall(libc::SYS_mbind, addr, *len, 0, 0, 0, 0)),
            Probe::ForkRead => forked(|pipe| tell(pipe, access::load(addr)), &mut extra),
            Probe::ForkExec => exec_peek(addr, &mut extra)?,
            Probe::ForkWrite { value } => forked(
                |pipe| tell(pipe, access::store(addr, *value).map(|()| *value)),
                &mut extra,
            ),
            Probe::Vmsplice { len } => {
                let (_reader, writer) = pipe()?;
                let vector = vector(*len);
                // SPLICE_F_NONBLOCK: a pipe holds 64 KiB, the rest is not waited for.
                check(libc::vmsplice(writer.as_raw_fd(), &raw const vector, 1, 2) as i64)
            }
            Probe::KvmSlot { len } => kvm_slot(addr, *len)?,
            Probe::Userfault { len } => userfault(addr, *len)?,
        }
    };
    Ok(match ret {
        Ok(ret) => Probed {
            ret,
            errno: 0,
            extra,
        },
        Err(e) => Probed {
            ret: -1,
            errno: e.raw_os_error().unwrap_or(0),
            extra,
        },
    })
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn flag(private: bool) -> i32 {
    if private { libc::FUTEX_PRIVATE_FLAG } else { 0 }
}

fn open(path: &str, write: bool, flags: i32) -> Result<File, Failure> {
    OpenOptions::new()
        .read(!write)
        .write(write)
        .create(write)
        .custom_flags(flags)
        .open(path)
        .map_err(|e| Failure::os(format_args!("open {path}"), &e))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| Failure::os("pipe", &e.into()))
}

/// # Safety
/// No Rust object lives in the range.
unsafe fn map_fixed(at: *mut libc::c_void, len: usize) -> io::Result<i64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: replaces only what the caller vouches for.
    let new = unsafe { libc::mmap(at, len, prot, flags, -1, 0) };
    check(new.expose_provenance().cast_signed() as i64)
}

/// Writes the word of a successful access to a pipe; the status otherwise.
///
/// Runs in a forked child: async-signal-safe.
fn tell(pipe: i32, result: Result<u64, mshare_protocol::agent::Fault>) -> i32 {
    match result {
        Ok(word) => {
            // SAFETY: the source is a local of that length.
            let n = unsafe { libc::write(pipe, (&raw const word).cast(), 8) };
            i32::from(n != 8)
        }
        Err(fault) => 128 + fault.signal,
    }
}

/// Runs `child` in a forked process; its word goes to `extra`, its exit status
/// is the result.
///
/// # Safety
/// `child` is async-signal-safe: another thread (the spinner) may have held a
/// lock of the allocator at the time of the fork.
unsafe fn forked(child: impl Fn(i32) -> i32, extra: &mut u64) -> io::Result<i64> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the child calls only `child` and `_exit`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let status = child(writer.as_raw_fd());
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(status) };
    }
    check(pid.into())?;
    drop(writer);
    let mut word = [0; 8];
    if rustix::io::read(&reader, &mut word).is_ok_and(|n| n == 8) {
        *extra = u64::from_ne_bytes(word);
    }
    let mut status = 0;
    // SAFETY: `status` is a local; the child is ours and not yet waited for.
    check(unsafe { libc::waitpid(pid, &raw mut status, 0) }.into())?;
    Ok(if libc::WIFSIGNALED(status) {
        (128 + libc::WTERMSIG(status)).into()
    } else {
        libc::WEXITSTATUS(status).into()
    })
}

/// Becomes `guest-agent peek ADDR` in a forked process.
///
/// # Safety
/// None of its own: the new program has none of this one's memory.
unsafe fn exec_peek(addr: u64, extra: &mut u64) -> Result<io::Result<i64>, Failure> {
    // All that allocates is done before the fork.
    let word = format!("{addr:#x}");
    let word = CString::new(word).map_err(|e| Failure::new(e.to_string()))?;
    let argv = [
        c"guest-agent".as_ptr(),
        c"peek".as_ptr(),
        word.as_ptr(),
        ptr::null(),
    ];
    let envp = [ptr::null::<libc::c_char>()];
    let child = |_| {
        // SAFETY: both lists end with a null pointer and outlive the call, which
        // returns only if it fails.
        unsafe { libc::execve(c"/proc/self/exe".as_ptr(), argv.as_ptr(), envp.as_ptr()) };
        127
    };
    // SAFETY: `child` makes a system call and nothing else.
    Ok(unsafe { forked(child, extra) })
}

/// `KVM_SET_USER_MEMORY_REGION` on a fresh VM.
///
/// # Safety
/// No Rust object lives in the range (no vCPU runs, so nothing is accessed).
unsafe fn kvm_slot(addr: u64, len: u64) -> Result<io::Result<i64>, Failure> {
    const KVM_CREATE_VM: u64 = 0xae01;
    const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| Failure::os("open /dev/kvm", &e))?;
    // SAFETY: takes no pointer.
    let vm = check(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) }.into());
    let vm = match vm {
        // Registering the notifier of a VM is itself refused on an attached mm.
        Err(e) => return Ok(Err(e)),
        Ok(fd) => fd,
    };
    // SAFETY: a descriptor that the kernel has just made for us.
    let vm = unsafe { OwnedFd::from_raw_fd(i32::try_from(vm).unwrap_or(-1)) };
    // slot and flags, guest_phys_addr, memory_size, userspace_addr
    let slot = [0, 0, len, addr];
    // SAFETY: the structure is 32 bytes, as the number says.
    Ok(check(
        unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, slot.as_ptr()) }.into(),
    ))
}

/// `UFFDIO_REGISTER` for missing pages.
///
/// # Safety
/// No Rust object lives in the range.
unsafe fn userfault(addr: u64, len: u64) -> Result<io::Result<i64>, Failure> {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    // SAFETY: takes no pointer. 1 is UFFD_USER_MODE_ONLY.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) })
        .map_err(|e| Failure::os("userfaultfd", &e))?;
    // SAFETY: a descriptor that the kernel has just made for us.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap_or(-1)) };
    // api, features, ioctls
    let mut api = [0xaau64, 0, 0];
    // SAFETY: the structure is 24 bytes, as the number says.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }.into())
        .map_err(|e| Failure::os("UFFDIO_API", &e))?;
    // start, len, mode (1 = missing), ioctls
    let mut register = [addr, len, 1, 0];
    // SAFETY: the structure is 32 bytes, as the number says. The registration
    // ends when `fd` is closed, before any further access.
    Ok(check(
        unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) }.into(),
    ))
}
