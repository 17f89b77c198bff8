//! The mshare interface of the kernel: system calls, ioctls, msharefs.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use mshare_protocol::agent::{Failure, MSHAREFS, RegionInfo, RegionOp, Value};
use mshare_protocol::msharefs::{
    MSHARE_IOC_DISCARD, MSHARE_IOC_INFO, MSHARE_IOC_PROTECT, SYS_MSHARE, SYS_MSHARE_UNLINK,
    mshare_discard, mshare_info, mshare_protect,
};
use rustix::fs::{FallocateFlags, fallocate};

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
    let mut file = open(name, libc::O_RDONLY)?;
    let (mut start, mut len) = ([0; 8], [0; 8]);
    file.read_exact(&mut start)
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
            control(name, MSHARE_IOC_PROTECT, &arg, "MSHARE_IOC_PROTECT")
        }
        RegionOp::Discard { name, offset, len } => {
            let arg = mshare_discard {
                offset: *offset,
                len: *len,
            };
            control(name, MSHARE_IOC_DISCARD, &arg, "MSHARE_IOC_DISCARD")
        }
        RegionOp::Punch { name, offset, len } => {
            let file = open(name, libc::O_RDWR)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&file, flags, *offset, *len)
                .map_err(|e| Failure::os(format_args!("fallocate {name:?}"), &e.into()))?;
            Ok(Value::Ret(0))
        }
        RegionOp::Info { name } => {
            let mut info = mshare_info::default();
            let file = open(name, libc::O_RDONLY)?;
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
        RegionOp::Extent { name } => extent(name).map(|(start, len)| Value::Mapped { start, len }),
    }
}

fn control<T>(name: &str, request: u32, arg: &T, what: &str) -> Result<Value, Failure> {
    let file = open(name, libc::O_RDWR)?;
    // SAFETY: the descriptor is open, and the structure is as long as the
    // number says; the kernel only reads it.
    check(i64::from(unsafe {
        libc::ioctl(file.as_raw_fd(), request.into(), &raw const *arg)
    }))
    .map(Value::Ret)
    .map_err(|e| Failure::os(format_args!("{what} {name:?}"), &e))
}
