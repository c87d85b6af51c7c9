//! Encoding of messages: bincode with a size limit, so that no claimed length can make the reader allocate
//! more than the limit.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

/// Longest message of the peer channel, bytes: a connection record with full queues and some room.
pub const MAX_PEER_MESSAGE: usize = 16 << 20;
/// Longest message between library and daemon, bytes.
pub const MAX_LOCAL_MESSAGE: usize = 4096;

/// Why a message could not be read or written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The message is longer than the limit.
    #[error("message of {0} bytes exceeds the limit of {1}")]
    TooLong(usize, usize),
    /// The bytes are not a message of this version.
    #[error("malformed message: {0}")]
    Malformed(String),
}

fn config<const N: usize>() -> Configuration<LittleEndian, Fixint, Limit<N>> {
    bincode::config::standard().with_fixed_int_encoding().with_limit::<N>()
}

/// Encodes a message for the Unix socket between library and daemon into `buf`; returns its length.
///
/// # Errors
/// `TooLong` when it does not fit.
pub fn encode_local<M: Encode>(message: &M, buf: &mut [u8]) -> Result<usize, FrameError> {
    bincode::encode_into_slice(message, buf, config::<MAX_LOCAL_MESSAGE>())
        .map_err(|_| FrameError::TooLong(buf.len(), MAX_LOCAL_MESSAGE))
}

/// Decodes one datagram of the Unix socket.
///
/// # Errors
/// `Malformed` when the bytes are not exactly one message.
pub fn decode_local<M: Decode<()>>(bytes: &[u8]) -> Result<M, FrameError> {
    exact(bincode::decode_from_slice(bytes, config::<MAX_LOCAL_MESSAGE>()), bytes.len())
}

/// Appends a length-prefixed message of the peer channel to `out`.
///
/// # Errors
/// `TooLong` when it exceeds [`MAX_PEER_MESSAGE`]; `out` is then as before.
pub fn encode_peer<M: Encode>(message: &M, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    let result = bincode::encode_into_std_write(message, out, config::<MAX_PEER_MESSAGE>());
    let len = out.len() - start - 4;
    match (result, u32::try_from(len)) {
        (Ok(_), Ok(prefix)) if len <= MAX_PEER_MESSAGE => {
            out[start..start + 4].copy_from_slice(&prefix.to_le_bytes());
            Ok(())
        }
        _ => {
            out.truncate(start);
            Err(FrameError::TooLong(len, MAX_PEER_MESSAGE))
        }
    }
}

/// Takes the first complete message from `bytes`: the message and how many bytes it took, or `None` when
/// more are needed.
///
/// # Errors
/// `TooLong` for a claimed length over the limit, `Malformed` for anything that is not a message; the
/// channel cannot be used further after either.
pub fn decode_peer<M: Decode<()>>(bytes: &[u8]) -> Result<Option<(M, usize)>, FrameError> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*prefix) as usize;
    if len > MAX_PEER_MESSAGE {
        return Err(FrameError::TooLong(len, MAX_PEER_MESSAGE));
    }
    let Some(body) = rest.get(..len) else { return Ok(None) };
    exact(bincode::decode_from_slice(body, config::<MAX_PEER_MESSAGE>()), len).map(|m| Some((m, len + 4)))
}

fn exact<M>(decoded: Result<(M, usize), bincode::error::DecodeError>, len: usize) -> Result<M, FrameError> {
    match decoded {
        Ok((m, used)) if used == len => Ok(m),
        Ok((_, used)) => Err(FrameError::Malformed(format!("{} bytes left over", len - used))),
        Err(e) => Err(FrameError::Malformed(e.to_string())),
    }
}
