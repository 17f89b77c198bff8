//! Puts a Linux kernel, its initrd and its boot parameters into guest memory.

pub mod initrd;
pub mod kernel;
pub mod params;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens `path` if it is a regular file (a named pipe would block for ever).
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK the open itself would wait for a pipe's writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        Ok(file)
    } else if kind.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else {
        Err(io::Error::other("not a regular file"))
    }
}
