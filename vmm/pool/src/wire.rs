//! Frames with descriptors on a unix stream socket.
//!
//! The framing is that of `mshare_protocol::frame`; descriptors travel with
//! the first byte of the frame that they belong to.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use mshare_protocol::frame::{self, FrameError};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Descriptors that may come with one message.
pub const MAX_FDS: usize = 3;

/// Sends `message` with `fds` (at most [`MAX_FDS`]).
///
/// # Errors
/// [`FrameError`].
pub fn send_with_fds<T: Serialize>(
    stream: &UnixStream,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    let bytes = frame::encode(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(Errno::INVAL).into());
    }
    let sent = loop {
        let iov = [IoSlice::new(&bytes)];
        match rustix::net::sendmsg(stream, &iov, &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            other => break other.map_err(io::Error::from)?,
        }
    };
    let mut stream = stream;
    stream.write_all(&bytes[sent..])?;
    Ok(())
}

/// Reads a stream and keeps the descriptors that come along. Those beyond
/// [`MAX_FDS`] are closed.
#[derive(Debug)]
pub struct FdReader<'a> {
    stream: &'a UnixStream,
    fds: Vec<OwnedFd>,
}

impl<'a> FdReader<'a> {
    /// A reader of `stream`.
    #[must_use]
    pub fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            fds: Vec::new(),
        }
    }

    /// The descriptors received so far.
    #[must_use]
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.fds
    }
}

impl Read for FdReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            self.stream,
            &mut [IoSliceMut::new(buf)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    if self.fds.len() < MAX_FDS {
                        self.fds.push(fd);
                    }
                }
            }
        }
        Ok(received.bytes)
    }
}

/// Reads one frame of at most `max` bytes. Bytes left over after the message
/// are an error: both sides speak the same version.
///
/// # Errors
/// [`FrameError::Closed`] at end of file between frames, otherwise any other.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read, max: usize) -> Result<T, FrameError> {
    let mut header = [0; 4];
    let mut got = 0;
    while got < header.len() {
        match stream.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let len = u32::from_le_bytes(header) as usize;
    if len > max {
        return Err(FrameError::TooLong(len));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    match postcard::take_from_bytes(&body)? {
        (message, []) => Ok(message),
        _ => Err(postcard::Error::DeserializeBadEncoding.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, b"hello", 0).unwrap();
        send_with_fds(&a, &7u64, &[file.as_fd(), file.as_fd()]).unwrap();
        let mut reader = FdReader::new(&b);
        assert_eq!(receive::<u64>(&mut reader, 64).unwrap(), 7);
        let fds = reader.into_fds();
        assert_eq!(fds.len(), 2);
        let mut buf = [0; 5];
        rustix::io::pread(&fds[1], &mut buf, 0).unwrap();
        assert_eq!(&buf, b"hello");
    }

    #[test]
    fn trailing_bytes_and_wild_lengths_are_refused() {
        let mut frame = frame::encode(&7u8).unwrap();
        frame.push(0);
        frame[0] += 1;
        assert!(matches!(
            receive::<u8>(&mut frame.as_slice(), 64),
            Err(FrameError::Codec(_))
        ));
        let big = frame::encode(&vec![0u8; 100]).unwrap();
        assert!(matches!(
            receive::<Vec<u8>>(&mut big.as_slice(), 64),
            Err(FrameError::TooLong(_))
        ));
    }
}
