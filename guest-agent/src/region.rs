//! The mshare interface of the kernel: system calls, ioctls, msharefs.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use mshare_protocol::agent::{Failure, MSHAREFS, RegionInfo, RegionOp, Value};
use mshare_protocol::entry::PUD_SIZE;
use mshare_protocol::msharefs::{
    MSHARE_IOC_DISCARD, MSHARE_IOC_INFO, MSHARE_IOC_PROTECT, SYS_MSHARE, SYS_MSHARE_UNLINK,
    mshare_discard, mshare_info, mshare_protect,
};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, ProtFlags};

/// Turns the result of a C call into an error if it is -1.
///
/// # Errors
/// errno.
pub fn check(ret: i64) -> io::Result<i64> {
    if ret == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

fn c_name(name: &str) -> Result<CString, Failure> {
    CString::new(name).map_err(|_| Failure {
        errno: libc::EINVAL,
        message: format!("the name {name:?} contains a NUL byte"),
    })
}

/// Calls `mshare`.
///
/// # Errors
/// What the system call reports.
pub fn mshare(name: &str, addr: u64, len: u64, oflag: i32, mode: u32) -> Result<i64, Failure> {
    let c = c_name(name)?;
    // SAFETY: the name is a C string that outlives the call. The call maps
    // only where nothing is mapped (it never replaces a mapping).
    check(unsafe { libc::syscall(SYS_MSHARE, c.as_ptr(), addr, len, oflag, mode) })
        .map_err(|e| Failure::os(format_args!("mshare({name:?}, {addr:#x}, {len:#x})"), &e))
}

/// Calls `mshare_unlink`.
///
/// # Errors
/// What the system call reports.
pub fn unlink(name: &str) -> Result<i64, Failure> {
    let c = c_name(name)?;
    // SAFETY: the name is a C string that outlives the call. What it may unmap
    // is a region, which holds no Rust object.
    check(unsafe { libc::syscall(SYS_MSHARE_UNLINK, c.as_ptr()) })
        .map_err(|e| Failure::os(format_args!("mshare_unlink({name:?})"), &e))
}

/// Makes and unlinks a region `rounds` times, and counts what comes of it.
///
/// # Errors
/// Only if a call could not be made.
pub fn churn(name: &str, addr: u64, len: u64, rounds: u32) -> Result<Value, Failure> {
    let errno = |result: Result<i64, Failure>| match result {
        Ok(_) => Ok(0),
        Err(failure) if failure.errno != 0 => Ok(failure.errno),
        Err(failure) => Err(failure),
    };
    let (mut made, mut unlinked) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..rounds {
        let oflag = libc::O_CREAT | libc::O_RDWR;
        let result = errno(mshare(name, addr, len, oflag, 0o600))?;
        *made.entry(result).or_default() += 1;
        let result = errno(unlink(name))?;
        *unlinked.entry(result).or_default() += 1;
        // The name may be gone, or another region's by now, and this process
        // attached yet to the one that had it.
        detach(addr, len);
    }
    Ok(Value::Churned {
        mshare: made,
        unlink: unlinked,
    })
}

fn detach(addr: u64, len: u64) {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(0);
    let at = ptr::with_exposed_provenance_mut(size(addr));
    // SAFETY: the range is the region's, in which no Rust object lives. That
    // nothing is mapped there is no error.
    let _ = unsafe { rustix::mm::munmap(at, size(len.next_multiple_of(PUD_SIZE))) };
}

/// Whether the kernel has the system calls.
pub fn present() -> bool {
    // SAFETY: a null name is refused before anything is done.
    check(unsafe { libc::syscall(SYS_MSHARE_UNLINK, 0) })
        .is_err_and(|e| e.raw_os_error() != Some(libc::ENOSYS))
}

/// Opens a region's file in msharefs.
///
/// # Errors
/// What `open` reports.
pub fn open(name: &str, oflag: i32) -> Result<File, Failure> {
    let path = format!("{MSHAREFS}/{name}");
    let access = oflag & libc::O_ACCMODE;
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(oflag & !libc::O_ACCMODE)
        .open(&path)
        .map_err(|e| Failure::os(format_args!("open {path}"), &e))
}

/// Address and length of a region, from its file.
///
/// # Errors
/// If the file cannot be opened or is not that of a sized region.
pub fn extent(name: &str) -> Result<(u64, u64), Failure> {
    extent_of(&open(name, libc::O_RDONLY)?, name)
}

fn extent_of(mut file: &File, name: &str) -> Result<(u64, u64), Failure> {
    let (mut start, mut len) = ([0; 8], [0; 8]);
    file.rewind()
        .and_then(|()| file.read_exact(&mut start))
        .and_then(|()| file.read_exact(&mut len))
        .map_err(|e| Failure::os(format_args!("read the extent of {name:?}"), &e))?;
    Ok((u64::from_ne_bytes(start), u64::from_ne_bytes(len)))
}

/// Carries out `op`.
///
/// # Errors
/// What the kernel reports.
pub fn run(op: &RegionOp) -> Result<Value, Failure> {
    match op {
        RegionOp::Unlink { name } => unlink(name).map(Value::Ret),
        RegionOp::Protect { name, .. }
        | RegionOp::Discard { name, .. }
        | RegionOp::Punch { name, .. }
        | RegionOp::Mmap { name } => on_file(&open(name, libc::O_RDWR)?, op),
        RegionOp::Info { name } | RegionOp::Extent { name } => {
            on_file(&open(name, libc::O_RDONLY)?, op)
        }
    }
}

/// Carries out `op` on a file that is open.
///
/// # Errors
/// What the kernel reports.
pub fn on_file(file: &File, op: &RegionOp) -> Result<Value, Failure> {
    match op {
        RegionOp::Unlink { .. } => Err(Failure::new("a name is unlinked, not a file")),
        RegionOp::Protect {
            name,
            offset,
            len,
            prot,
        } => {
            let arg = mshare_protect {
                offset: *offset,
                len: *len,
                prot: *prot,
                flags: 0,
            };
            control(file, MSHARE_IOC_PROTECT, &arg, "MSHARE_IOC_PROTECT", name)
        }
        RegionOp::Discard { name, offset, len } => {
            let arg = mshare_discard {
                offset: *offset,
                len: *len,
            };
            control(file, MSHARE_IOC_DISCARD, &arg, "MSHARE_IOC_DISCARD", name)
        }
        RegionOp::Punch { name, offset, len } => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, *offset, *len)
                .map_err(|e| Failure::os(format_args!("fallocate {name:?}"), &e.into()))?;
            Ok(Value::Ret(0))
        }
        RegionOp::Info { name } => {
            let mut info = mshare_info::default();
            // SAFETY: the descriptor is open, and the structure is as long as
            // the number says.
            check(i64::from(unsafe {
                libc::ioctl(file.as_raw_fd(), MSHARE_IOC_INFO.into(), &raw mut info)
            }))
            .map_err(|e| Failure::os(format_args!("MSHARE_IOC_INFO {name:?}"), &e))?;
            Ok(Value::RegionInfo(RegionInfo {
                start: info.start,
                len: info.len,
                id: info.id,
                resident: info.resident,
                table_bytes: info.table_bytes,
                flags: info.flags,
                mappings: info.mappings,
                machines: info.machines,
                swapped: info.swapped,
                huge: info.huge,
                faults: info.faults,
            }))
        }
        RegionOp::Mmap { name } => {
            let (start, len) = extent_of(file, name)?;
            map_and_unmap(file, start, len)
                .map(|()| Value::Ret(0))
                .map_err(|e| Failure::os(format_args!("mmap {name:?}"), &e))
        }
        RegionOp::Extent { name } => {
            extent_of(file, name).map(|(start, len)| Value::Mapped { start, len })
        }
    }
}

fn map_and_unmap(file: &File, start: u64, len: u64) -> io::Result<()> {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(0);
    let span = size(len.next_multiple_of(PUD_SIZE));
    let at = ptr::with_exposed_provenance_mut(size(start));
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE;
    // SAFETY: a new mapping, which replaces nothing (NOREPLACE).
    let new = unsafe { rustix::mm::mmap(at, span, prot, flags, file, 0) }?;
    // SAFETY: exactly that mapping, which nobody has used.
    unsafe { rustix::mm::munmap(new, span) }?;
    Ok(())
}

fn control<T>(
    file: &File,
    request: u32,
    arg: &T,
    what: &str,
    name: &str,
) -> Result<Value, Failure> {
    // SAFETY: the descriptor is open, and the structure is as long as the
    // number says; the kernel only reads it.
    check(i64::from(unsafe {
        libc::ioctl(file.as_raw_fd(), request.into(), &raw const *arg)
    }))
    .map(Value::Ret)
    .map_err(|e| Failure::os(format_args!("{what} {name:?}"), &e))
}
