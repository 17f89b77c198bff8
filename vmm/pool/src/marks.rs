//! Marks: proof that a client of a former broker is dead.
//!
//! The end of its connection tells a broker that a client is dead, but a
//! broker that recovers has no connection to those that have not come back. So
//! each client is given an open file description of the directory of its own,
//! which carries a shared lock (`F_OFD_SETLK`) on one byte far beyond the
//! file's end: its *mark*. The byte's number is the generation of the broker
//! that the client belongs to; when it has resumed, the next broker moves the
//! mark. Invariant: a client that may have memory of the pool mapped and has
//! not resumed has a mark below the broker's generation. The kernel removes it
//! with the last descriptor, and a process that dies loses its memory before
//! its descriptors.
//!
//! Locks belong to descriptions: the broker has one of its own, which has no
//! mark, and keeps none that a client has sent.

use std::ffi::{c_int, c_short};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Byte of generation 0.
const FIRST: i64 = 1 << 40;

/// Opens the file of `fd` once more: a description that shares no lock.
///
/// # Errors
/// That of `open(2)`.
pub fn reopen(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // A memfd has no other name.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// A description of the directory for a new client of the broker of this
/// generation.
///
/// # Errors
/// That of `open(2)` or `fcntl(2)`.
pub fn for_client(directory: BorrowedFd<'_>, generation: u32) -> io::Result<OwnedFd> {
    let fd = reopen(directory)?;
    set(fd.as_fd(), generation)?;
    Ok(fd)
}

/// Moves the mark of a client, whose description `directory` is, to this
/// generation.
///
/// # Errors
/// That of `fcntl(2)`; then its mark is where it was.
pub fn set(directory: BorrowedFd<'_>, generation: u32) -> io::Result<()> {
    let end = i64::from(generation);
    lock(directory, libc::F_OFD_SETLK, libc::F_RDLCK, end..end + 1)?;
    lock(directory, libc::F_OFD_SETLK, libc::F_UNLCK, 0..end)?;
    Ok(())
}

/// Whether there are clients of brokers before this generation that have not
/// resumed. `directory` is the broker's own description.
///
/// # Errors
/// That of `fcntl(2)`.
pub fn any_before(directory: BorrowedFd<'_>, generation: u32) -> io::Result<bool> {
    let before = 0..i64::from(generation);
    let found = lock(directory, libc::F_OFD_GETLK, libc::F_WRLCK, before)?;
    Ok(c_int::from(found) != libc::F_UNLCK)
}

/// `fcntl(2)` on the bytes of these generations; the type of lock after it.
#[allow(clippy::cast_possible_truncation)] // Constants of 0 to 2.
fn lock(
    fd: BorrowedFd<'_>,
    command: c_int,
    kind: c_int,
    generations: Range<i64>,
) -> io::Result<c_short> {
    // A length of zero would mean all that follows.
    if generations.is_empty() {
        return Ok(libc::F_UNLCK as c_short);
    }
    let mut lock = libc::flock {
        l_type: kind as c_short,
        l_whence: libc::SEEK_SET as c_short,
        l_start: FIRST + generations.start,
        l_len: generations.end - generations.start,
        l_pid: 0,
    };
    // SAFETY: these commands read and write the one `flock` that the argument
    // points to, which outlives the call.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_earlier_generations_are_seen_until_they_move_or_close() {
        let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let any = |generation| any_before(file.as_fd(), generation).unwrap();
        let a = for_client(file.as_fd(), 1).unwrap();
        let b = for_client(file.as_fd(), 2).unwrap();
        assert!(!any(0) && !any(1) && any(2));
        set(a.as_fd(), 3).unwrap();
        assert!(!any(2) && any(3) && any(4));
        let second = b.try_clone().unwrap();
        drop(b);
        assert!(any(3), "the description is still open");
        drop(second);
        assert!(!any(3) && any(4));
        drop(a);
        assert!(!any(u32::MAX));
    }
}
