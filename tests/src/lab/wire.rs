//! What the lab and its init say to each other, over one virtio-serial port:
//! frames of a kind byte, a little-endian 32-bit length and the payload.

use std::io::{self, Read, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port.
pub const PORT: &str = "mshare.lab";
/// Path of the job inside the initramfs.
pub const JOB: &str = "/etc/lab-job.json";
/// Longest payload either side accepts, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Time between two [`Frame::Alive`].
pub const BEAT: Duration = Duration::from_secs(5);
const HEADER: usize = 5;

/// What the init is to do; a file of the initramfs.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Job {
    /// The command and its arguments.
    pub argv: Vec<String>,
    /// Environment of the command, nothing else is in it.
    pub env: Vec<(String, String)>,
    /// Working directory of the command; made when missing.
    pub cwd: String,
    /// Kernel modules to load, in order.
    pub modules: Vec<String>,
    /// Paths to send back when the command has ended.
    pub outputs: Vec<String>,
    /// Whether standard input comes through the port; otherwise it is empty.
    pub stdin: bool,
}

/// The state of the machine just before the command starts.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Hello {
    /// Release of the running kernel.
    pub kernel: String,
    /// CPUs online.
    pub cpus: usize,
    /// `npt` of `kvm_amd`: second-stage tables in hardware.
    pub npt: bool,
    /// `tdp_mmu` of `kvm`.
    pub tdp_mmu: bool,
    /// Time since the kernel started.
    pub uptime: Duration,
}

/// How the command ended.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
pub enum Ended {
    /// It returned this status.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
}

/// One entry of a returned path.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Entry {
    /// Which of [`Job::outputs`] it belongs to.
    pub index: usize,
    /// Path below the returned path; empty for the path itself.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Whether it is a directory; otherwise its data frames follow.
    pub is_dir: bool,
}

/// A message on the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Lab → host: the command starts now.
    Hello(Hello),
    /// Lab → host: bytes of standard output.
    Stdout(Vec<u8>),
    /// Lab → host: bytes of standard error.
    Stderr(Vec<u8>),
    /// Lab → host: an entry of a returned path.
    Entry(Entry),
    /// Lab → host: bytes of the last entry.
    Data(Vec<u8>),
    /// Lab → host: a path could not be returned.
    OutputFailed(String),
    /// Lab → host: the command could not be started; errno and a message.
    NotStarted(i32, String),
    /// Lab → host: the machine could not be set up.
    Broken(String),
    /// Lab → host: the command ended and everything has been sent.
    Ended(Ended),
    /// Lab → host: the machine still makes progress; every [`BEAT`] from
    /// [`Frame::Hello`] on.
    Alive,
    /// Host → lab: bytes of standard input; no bytes mean its end.
    Stdin(Vec<u8>),
}

fn json<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(io::Error::other)
}

fn parse<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(io::Error::other)
}

fn text(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload).into_owned()
}

impl Frame {
    /// Writes the frame in one write where the channel allows it.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Frame::Hello(hello) => (1, json(hello)?),
            Frame::Stdout(data) => (2, data.clone()),
            Frame::Stderr(data) => (3, data.clone()),
            Frame::Entry(entry) => (4, json(entry)?),
            Frame::Data(data) => (5, data.clone()),
            Frame::OutputFailed(message) => (6, message.clone().into_bytes()),
            Frame::NotStarted(errno, message) => (7, json(&(errno, message))?),
            Frame::Broken(message) => (8, message.clone().into_bytes()),
            Frame::Ended(ended) => (9, json(ended)?),
            Frame::Alive => (10, Vec::new()),
            Frame::Stdin(data) => (16, data.clone()),
        };
        let len = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= MAX_PAYLOAD)
            .ok_or_else(|| io::Error::other("payload too long for a frame"))?;
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        frame.push(kind);
        frame.extend_from_slice(&len.to_le_bytes());
        frame.extend_from_slice(&payload);
        out.write_all(&frame)?;
        out.flush()
    }

    /// Reads one frame; `None` at the end of the channel.
    pub fn read(mut input: impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        if input.read(&mut header[..1])? == 0 {
            return Ok(None);
        }
        input.read_exact(&mut header[1..])?;
        let [kind, len @ ..] = header;
        let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
        if len > MAX_PAYLOAD {
            return Err(io::Error::other("frame longer than 1 MiB"));
        }
        let mut payload = vec![0; len];
        input.read_exact(&mut payload)?;
        Ok(Some(match kind {
            1 => Frame::Hello(parse(&payload)?),
            2 => Frame::Stdout(payload),
            3 => Frame::Stderr(payload),
            4 => Frame::Entry(parse(&payload)?),
            5 => Frame::Data(payload),
            6 => Frame::OutputFailed(text(&payload)),
            7 => {
                let (errno, message) = parse(&payload)?;
                Frame::NotStarted(errno, message)
            }
            8 => Frame::Broken(text(&payload)),
            9 => Frame::Ended(parse(&payload)?),
            10 => Frame::Alive,
            16 => Frame::Stdin(payload),
            other => return Err(io::Error::other(format!("frame of unknown kind {other}"))),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_sent() {
        let frames = [
            Frame::Stdout(b"\x00\r\n\xff".to_vec()),
            Frame::Stdin(Vec::new()),
            Frame::NotStarted(2, "no such file".into()),
            Frame::Alive,
            Frame::Ended(Ended::Signaled(9)),
            Frame::Entry(Entry {
                index: 1,
                path: "a/b".into(),
                mode: 0o644,
                is_dir: false,
            }),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut input = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut input).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut input).unwrap(), None);
    }

    #[test]
    fn bad_frames_are_errors() {
        assert!(Frame::read(&[2, 1, 0, 0, 0][..]).is_err(), "cut short");
        assert!(Frame::read(&[77, 0, 0, 0, 0][..]).is_err(), "unknown kind");
        assert!(
            Frame::read(&[2, 255, 255, 255, 255][..]).is_err(),
            "too long"
        );
        assert!(
            Frame::Data(vec![0; MAX_PAYLOAD + 1])
                .write(io::sink())
                .is_err()
        );
    }
}
