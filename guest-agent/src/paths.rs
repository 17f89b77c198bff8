//! Operations on paths, and calls that must fail.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::ptr;

use mshare_protocol::agent::{BadCall, Failure, FileStat, PathOp, Value};
use mshare_protocol::msharefs;

use crate::region::{self, check};

/// A page that Linux never maps for a process: addresses there are bad.
const NOWHERE: u64 = 0x10;

/// Carries out `op` on `path`.
///
/// # Errors
/// What the kernel reports.
pub fn run(path: &str, op: &PathOp) -> Result<Value, Failure> {
    let done = match op {
        PathOp::Open { flags, mode } => {
            let access = flags & libc::O_ACCMODE;
            fs::OpenOptions::new()
                .read(access != libc::O_WRONLY)
                .write(access != libc::O_RDONLY)
                .mode(*mode)
                .custom_flags(flags & !libc::O_ACCMODE)
                .open(path)
                .map(drop)
        }
        PathOp::Stat => return stat(path).map_err(|e| Failure::os(path, &e)),
        PathOp::Unlink => fs::remove_file(path),
        PathOp::Mkdir => fs::create_dir(path),
        PathOp::Rmdir => fs::remove_dir(path),
        PathOp::Rename { to } => fs::rename(path, to),
        PathOp::Link { to } => fs::hard_link(path, to),
        PathOp::Chmod { mode } => fs::set_permissions(path, Permissions::from_mode(*mode)),
        PathOp::Truncate { len } => fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| file.set_len(*len)),
    };
    done.map(|()| Value::Ret(0))
        .map_err(|e| Failure::os(format_args!("{op:?} {path}"), &e))
}

fn stat(path: &str) -> io::Result<Value> {
    let stat = fs::metadata(path)?;
    Ok(Value::Stat(FileStat {
        mode: stat.mode(),
        uid: stat.uid(),
        gid: stat.gid(),
        ino: stat.ino(),
        size: stat.size(),
        nlink: stat.nlink(),
    }))
}

/// Makes a call that should be refused.
///
/// # Errors
/// What the kernel reports.
pub fn bad_call(call: &BadCall) -> Result<Value, Failure> {
    // SAFETY: the bad pointers are to a page that is never mapped, so the
    // kernel can neither read nor write anything of ours through them.
    let ret = unsafe {
        match call {
            BadCall::MshareName => check(libc::syscall(
                msharefs::SYS_MSHARE,
                NOWHERE,
                0x1_0000_0000_u64,
                2 << 20,
                libc::O_CREAT | libc::O_RDWR,
                0o600,
            )),
            BadCall::UnlinkName => check(libc::syscall(msharefs::SYS_MSHARE_UNLINK, NOWHERE)),
            BadCall::ProtectArg { name } => {
                let file = region::open(name, libc::O_RDWR)?;
                let request = msharefs::MSHARE_IOC_PROTECT.into();
                check(libc::ioctl(file.as_raw_fd(), request, NOWHERE).into())
            }
            BadCall::Ioctl {
                name,
                oflag,
                request,
                words,
            } => {
                let file = region::open(name, *oflag)?;
                // The kernel writes at most what the number can say (16 KiB).
                let mut arg = [0u64; 2048];
                for (slot, word) in arg.iter_mut().zip(words.iter().take(8)) {
                    *slot = *word;
                }
                check(libc::ioctl(file.as_raw_fd(), (*request).into(), arg.as_mut_ptr()).into())
            }
            BadCall::Mmap {
                name,
                addr,
                len,
                prot,
                flags,
                offset,
            } => {
                let access = if prot & libc::PROT_WRITE != 0 {
                    libc::O_RDWR
                } else {
                    libc::O_RDONLY
                };
                let file = region::open(name, access)?;
                let at = ptr::with_exposed_provenance_mut(usize::try_from(*addr).unwrap_or(0));
                let new = libc::mmap(
                    at,
                    usize::try_from(*len).unwrap_or(0),
                    *prot,
                    *flags,
                    file.as_raw_fd(),
                    offset.cast_signed(),
                );
                check(new.expose_provenance().cast_signed() as i64)
            }
        }
    };
    ret.map(Value::Ret)
        .map_err(|e| Failure::os(format_args!("{call:?}"), &e))
}
