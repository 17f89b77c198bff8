//! One start of an emulated machine: the qemu process and its channels.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// A qemu process that cannot outlive the thread that started it.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
}

/// The host's end of a character device: `chardev` arguments and the stream.
#[derive(Debug)]
pub struct Channel {
    /// Our end.
    ours: UnixStream,
    /// The emulator's end, handed over at its start.
    theirs: OwnedFd,
    id: &'static str,
}

impl Channel {
    /// A new pair, named `id` on the command line.
    pub fn new(id: &'static str) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok(Self {
            ours,
            theirs: theirs.into(),
            id,
        })
    }

    /// Our end; the emulator's end is closed here, so that ours ends with the
    /// emulator.
    pub fn into_ours(self) -> UnixStream {
        self.ours
    }

    /// What `-chardev` takes.
    pub fn chardev(&self) -> String {
        format!("socket,id={},fd={}", self.id, self.theirs.as_raw_fd())
    }
}

/// A path under which the emulator can open a file it inherits.
pub fn inherited_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

impl Qemu {
    /// Starts the emulator. It inherits the channels and `files`. Call this
    /// on a thread that lives as long as the emulator shall: the kernel ends
    /// the emulator together with that thread, however it ends.
    pub fn start(mut command: Command, channels: &[&Channel], files: &[&File]) -> io::Result<Self> {
        let inherit: Vec<i32> = channels
            .iter()
            .map(|channel| channel.theirs.as_raw_fd())
            .chain(files.iter().map(|file| file.as_raw_fd()))
            .collect();
        let parent = std::process::id();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let prepare = move || {
            for &fd in &inherit {
                // SAFETY: channels and files are borrowed until the spawn below
                // has returned, so the descriptors are open.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have gone before the line above.
            match getppid() {
                Some(pid) if pid.as_raw_nonzero().get().cast_unsigned() == parent => Ok(()),
                _ => Err(io::Error::from(io::ErrorKind::NotFound)),
            }
        };
        // SAFETY: between fork and exec the closure makes system calls only; it
        // neither allocates nor locks.
        unsafe { command.pre_exec(prepare) };
        Ok(Self {
            child: command.spawn()?,
        })
    }

    /// What the emulator says about itself; taken once.
    pub fn messages(&mut self) -> Option<impl Read + Send + use<>> {
        self.child.stderr.take()
    }

    /// Ends the emulator if it still runs and returns its status.
    pub fn end(&mut self) -> io::Result<ExitStatus> {
        // Fails only where it has ended already.
        let _ = self.child.kill();
        self.child.wait()
    }

    /// Waits for the emulator to end by itself.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
