//! Framing of messages on a stream socket.
//!
//! A message is a little-endian `u32` length followed by that many bytes of
//! [postcard](https://docs.rs/postcard) data. A length over [`MAX_FRAME`] ends
//! the connection: it is not the start of a message.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message in bytes.
pub const MAX_FRAME: usize = 4 << 20;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer has closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The socket failed.
    #[error("cannot transfer a message")]
    Io(#[from] io::Error),
    /// The message is longer than [`MAX_FRAME`].
    #[error("a message of {0} bytes exceeds the limit of {MAX_FRAME}")]
    TooLong(usize),
    /// The bytes are not a message of the expected type.
    #[error("malformed message")]
    Codec(#[from] postcard::Error),
}

/// Encodes `message` with its length in front.
///
/// # Errors
/// [`FrameError::TooLong`] or [`FrameError::Codec`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, vec![0; 4])?;
    let body = bytes.len() - 4;
    match u32::try_from(body) {
        Ok(len) if body <= MAX_FRAME => bytes[..4].copy_from_slice(&len.to_le_bytes()),
        _ => return Err(FrameError::TooLong(body)),
    }
    Ok(bytes)
}

/// Writes `message` as one frame.
///
/// # Errors
/// As [`encode`], and [`FrameError::Io`].
pub fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), FrameError> {
    stream.write_all(&encode(message)?)?;
    stream.flush()?;
    Ok(())
}

/// Reads one frame.
///
/// # Errors
/// [`FrameError::Closed`] at end of file between frames, otherwise any other.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T, FrameError> {
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
    if len > MAX_FRAME {
        return Err(FrameError::TooLong(len));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(postcard::from_bytes(&body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_round_trips() {
        let bytes = encode(&("name", 7u64)).unwrap();
        let back: (String, u64) = receive(&mut bytes.as_slice()).unwrap();
        assert_eq!(back, ("name".to_owned(), 7));
    }

    #[test]
    fn empty_stream_is_closed_and_half_a_frame_is_an_error() {
        assert!(matches!(
            receive::<u64>(&mut [].as_slice()),
            Err(FrameError::Closed)
        ));
        assert!(matches!(
            receive::<u64>(&mut [8, 0].as_slice()),
            Err(FrameError::Io(_))
        ));
    }

    #[test]
    fn wild_length_is_refused_before_memory_is_allocated() {
        assert!(matches!(
            receive::<u64>(&mut [0xff; 8].as_slice()),
            Err(FrameError::TooLong(0xffff_ffff))
        ));
    }
}
