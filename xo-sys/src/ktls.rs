//! TLS records in the kernel (kTLS, Documentation/networking/tls.rst, net/tls): keys in, keys and sequence numbers out,
//! records of other types than data.
//!
//! What must be right before a direction's keys are installed, or read back to be installed elsewhere:
//!
//! - A socket must be ESTABLISHED; the layer stays for its life, and [`crate::tcp_repair::dump`] refuses such a socket:
//!   use [`crate::tcp_repair::dump_drained`].
//! - The receiving sequence number counts records as they are *decrypted*, also by MSG_PEEK: read it after the socket has
//!   been read empty. What has been decrypted and not read is in no queue that anybody can see; a record of which a part
//!   has come is in the TCP queue and cannot be read out.
//! - A write with MSG_MORE leaves a record open whose bytes nobody else sees.
//! - Both directions must have the same version and suite.

use std::fmt;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, compiler_fence};

use crate::raw::{self, sys};

const TCP_ULP: i32 = 31;
/// linux/tls.h.
const TLS_TX: i32 = 1;
const TLS_RX: i32 = 2;
const TLS_SET_RECORD_TYPE: i32 = 1;
const TLS_GET_RECORD_TYPE: i32 = 2;
/// The longest `struct tls12_crypto_info_*` of those below.
const LONGEST: usize = 56;

/// Content types of records (RFC 8446, 5.1).
pub mod kind {
    /// An alert: two bytes, level and description.
    pub const ALERT: u8 = 21;
    /// A handshake message; after the handshake KeyUpdate (24) or NewSessionTicket (4) in its first byte.
    pub const HANDSHAKE: u8 = 22;
    /// What the application writes.
    pub const DATA: u8 = 23;
}

/// The alert that ends a connection properly: warning, close_notify (RFC 8446, 6.1).
pub const CLOSE_NOTIFY: [u8; 2] = [1, 0];

/// Protocol version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RFC 5246, with AEAD suites only.
    Tls12,
    /// RFC 8446.
    Tls13,
}

impl Version {
    /// All.
    pub const ALL: [Version; 2] = [Version::Tls12, Version::Tls13];

    fn number(self) -> u16 {
        match self {
            Version::Tls12 => 0x0303,
            Version::Tls13 => 0x0304,
        }
    }
}

/// How records are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// AES-128 in GCM.
    Aes128Gcm,
    /// AES-256 in GCM.
    Aes256Gcm,
    /// RFC 7905 and 8446.
    ChaCha20Poly1305,
}

impl Suite {
    /// All.
    pub const ALL: [Suite; 3] = [Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::ChaCha20Poly1305];

    /// Length of its keys, bytes.
    #[must_use]
    pub fn key_len(self) -> usize {
        match self {
            Suite::Aes128Gcm => 16,
            Suite::Aes256Gcm | Suite::ChaCha20Poly1305 => 32,
        }
    }

    /// How much of an IV the kernel calls its salt, bytes: what is no part of a TLS 1.2 record.
    fn salt_len(self) -> usize {
        match self {
            Suite::Aes128Gcm | Suite::Aes256Gcm => 4,
            Suite::ChaCha20Poly1305 => 0,
        }
    }

    /// TLS_CIPHER_*.
    fn number(self) -> u16 {
        match self {
            Suite::Aes128Gcm => 51,
            Suite::Aes256Gcm => 52,
            Suite::ChaCha20Poly1305 => 54,
        }
    }
}

/// A direction of a connection, seen from the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the socket sends.
    Send,
    /// What it receives.
    Receive,
}

impl Direction {
    fn option(self) -> i32 {
        match self {
            Direction::Send => TLS_TX,
            Direction::Receive => TLS_RX,
        }
    }
}

/// State of one direction. Wiped when dropped; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    /// Protocol version.
    pub version: Version,
    /// Protection.
    pub suite: Suite,
    key: [u8; 32],
    /// The 12 bytes from which nonces are made. TLS 1.3, and ChaCha20-Poly1305: the write IV. AES-GCM in TLS 1.2: 4 bytes of
    /// write IV, then 8 bytes that go into the next record in the clear (RFC 5288, 3); the kernel counts them up by one
    /// with each record. **They must be such that no value comes that was used with this key before.** Those of what
    /// is received do not matter.
    pub iv: [u8; 12],
    /// Sequence number of the next record.
    pub seq: u64,
}

impl Keys {
    /// Puts a direction together; `None` if the key has not the suite's length.
    #[must_use]
    pub fn new(version: Version, suite: Suite, key: &[u8], iv: [u8; 12], seq: u64) -> Option<Keys> {
        let mut whole = [0; 32];
        if key.len() != suite.key_len() {
            return None;
        }
        whole.get_mut(..key.len())?.copy_from_slice(key);
        Some(Keys { version, suite, key: whole, iv, seq })
    }

    /// The key, of the suite's length.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        self.key.get(..self.suite.key_len()).unwrap_or_default()
    }

    /// `struct tls12_crypto_info_*`: version and suite, rest of the IV, key, salt, sequence number.
    fn info(&self) -> CryptoInfo {
        let mut info = CryptoInfo { bytes: [0; LONGEST], len: 0 };
        let (salt, rest) = self.iv.split_at(self.suite.salt_len());
        info.push(&self.version.number().to_ne_bytes());
        info.push(&self.suite.number().to_ne_bytes());
        info.push(rest);
        info.push(self.key());
        info.push(salt);
        info.push(&self.seq.to_be_bytes());
        info
    }

    fn from_info(version: Version, suite: Suite, info: &CryptoInfo) -> Option<Keys> {
        let (_, rest) = info.bytes.get(..info.len)?.split_at_checked(4)?;
        let (iv_rest, rest) = rest.split_at_checked(12 - suite.salt_len())?;
        let (key, rest) = rest.split_at_checked(suite.key_len())?;
        let (salt, seq) = rest.split_at_checked(suite.salt_len())?;
        let mut iv = [0; 12];
        for (to, from) in iv.iter_mut().zip(salt.iter().chain(iv_rest)) {
            *to = *from;
        }
        Keys::new(version, suite, key, iv, u64::from_be_bytes(seq.try_into().ok()?))
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("version", &self.version)
            .field("suite", &self.suite)
            .field("seq", &self.seq)
            .finish_non_exhaustive()
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        wipe(&mut self.key);
        wipe(&mut self.iv);
    }
}

/// What the kernel reads and writes; wiped when dropped.
#[repr(C, align(8))]
struct CryptoInfo {
    bytes: [u8; LONGEST],
    len: usize,
}

impl CryptoInfo {
    /// Everything fits: the longest has [`LONGEST`] bytes.
    fn push(&mut self, piece: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.len..self.len + piece.len()) {
            to.copy_from_slice(piece);
            self.len += piece.len();
        }
    }
}

impl Drop for CryptoInfo {
    fn drop(&mut self) {
        wipe(&mut self.bytes);
    }
}

/// Overwrites secrets in a way that is not optimised out.
fn wipe(bytes: &mut [u8]) {
    for byte in bytes {
        // SAFETY: a valid reference.
        unsafe { std::ptr::write_volatile(byte, 0) };
    }
    compiler_fence(Ordering::SeqCst);
}

/// What the kernel said.
#[derive(Debug, thiserror::Error)]
pub enum KtlsError {
    /// There is no kernel TLS here.
    #[error("this kernel has no TLS (CONFIG_TLS, module tls), or may not load it")]
    Absent,
    /// The socket is not connected, or not any more.
    #[error("kernel TLS needs an established connection")]
    NotEstablished,
    /// The socket has an upper-layer protocol already.
    #[error("the socket has an upper-layer protocol already")]
    Taken,
    /// A step before is missing.
    #[error("the socket has no kernel TLS, or no keys in this direction")]
    NotInstalled,
    /// The direction has keys, and this kernel cannot change them (TLS 1.2, or Linux before 6.14).
    #[error("there are keys in this direction already, and this kernel cannot change them")]
    NoRekey,
    /// The kernel does not know this version with this suite, or the other direction has others.
    #[error("the kernel takes no {1:?} with {0:?} here")]
    Unsupported(Version, Suite),
    /// The kernel has keys of a kind that is unknown here.
    #[error("the kernel has keys of version {0:#06x} and suite {1}, which are unknown here")]
    Unknown(u16, u16),
    /// Something else.
    #[error("{0}: {1}")]
    Other(&'static str, #[source] io::Error),
}

/// Puts the TLS layer on a connected socket, in both directions without keys as yet: data pass as they are. It stays for
/// the socket's life. Loads the module when the caller has CAP_NET_ADMIN.
///
/// # Errors
/// `Absent`, `NotEstablished`, `Taken`; `Other` of setsockopt(2).
pub fn attach(fd: RawFd) -> Result<(), KtlsError> {
    raw::setsockopt(fd, libc::IPPROTO_TCP, TCP_ULP, b"tls").map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOPROTOOPT) => KtlsError::Absent,
        Some(libc::ENOTCONN) => KtlsError::NotEstablished,
        Some(libc::EEXIST) => KtlsError::Taken,
        _ => KtlsError::Other("TCP_ULP", e),
    })
}

/// Gives a direction its keys; from Linux 6.14 on also new ones after a KeyUpdate (TLS 1.3). Needs [`attach`] before.
///
/// # Errors
/// `NotInstalled` without [`attach`], `NoRekey`, `Unsupported`; `Other` of setsockopt(2).
pub fn install(fd: RawFd, direction: Direction, keys: &Keys) -> Result<(), KtlsError> {
    let info = keys.info();
    // SAFETY: pointer and length describe initialised bytes that live through the call.
    sys!(libc::SYS_setsockopt, fd, libc::SOL_TLS, direction.option(), info.bytes.as_ptr(), info.len)
        .map(drop)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENOPROTOOPT) => KtlsError::NotInstalled,
            Some(libc::EBUSY) => KtlsError::NoRekey,
            Some(libc::EINVAL | libc::ENOENT) => KtlsError::Unsupported(keys.version, keys.suite),
            _ => KtlsError::Other("keys", e),
        })
}

/// The state of a direction, as [`install`] takes it on another socket.
///
/// # Errors
/// `NotInstalled`, `Unknown`; `Other` of getsockopt(2).
pub fn read(fd: RawFd, direction: Direction) -> Result<Keys, KtlsError> {
    // Four bytes tell version and suite; then the length must be the suite's.
    let mut info = CryptoInfo { bytes: [0; LONGEST], len: 4 };
    get(fd, direction, &mut info)?;
    let [a, b, c, d, ..] = info.bytes;
    let (version, suite) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
    let known = Version::ALL.into_iter().find(|v| v.number() == version);
    let known = known.zip(Suite::ALL.into_iter().find(|s| s.number() == suite));
    let (known_version, known_suite) = known.ok_or(KtlsError::Unknown(version, suite))?;
    info.len = 4 + 12 + known_suite.key_len() + 8;
    get(fd, direction, &mut info)?;
    Keys::from_info(known_version, known_suite, &info).ok_or(KtlsError::Unknown(version, suite))
}

fn get(fd: RawFd, direction: Direction, info: &mut CryptoInfo) -> Result<(), KtlsError> {
    let mut len = info.len as u32;
    let to = info.bytes.as_mut_ptr();
    // SAFETY: `len` bytes at `to` may be written: every length asked for is at most LONGEST.
    sys!(libc::SYS_getsockopt, fd, libc::SOL_TLS, direction.option(), to, &raw mut len).map(drop).map_err(
        |e| match e.raw_os_error() {
            // Without the layer, and with the layer but without keys.
            Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EBUSY) => KtlsError::NotInstalled,
            _ => KtlsError::Other("keys", e),
        },
    )
}

/// Room for one control message with a record's type.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    kind: u8,
    _padding: [u8; 7],
}

const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + 1;

fn message(iov: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: all zeroes is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message.msg_control = std::ptr::from_mut(control).cast();
    message.msg_controllen = size_of::<Control>();
    message
}

/// Sends one record of any type ([`kind`]), 16 KiB at most. `flags` as for sendmsg(2); MSG_NOSIGNAL is added.
///
/// # Errors
/// Of sendmsg(2).
pub fn send_record(fd: RawFd, kind: u8, bytes: &[u8], flags: i32) -> io::Result<usize> {
    let header =
        libc::cmsghdr { cmsg_len: CONTROL_LEN, cmsg_level: libc::SOL_TLS, cmsg_type: TLS_SET_RECORD_TYPE };
    let mut control = Control { header, kind, _padding: [0; 7] };
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let message = message(&mut iov, &mut control);
    // SAFETY: the message and all it points to live through the call; the kernel only reads.
    sys!(libc::SYS_sendmsg, fd, &raw const message, flags | libc::MSG_NOSIGNAL)
}

/// Receives decrypted bytes and the type of the record that they come from; bytes of two types never come together.
/// The end of the stream is 0 bytes of [`kind::DATA`]. An ordinary recv(2) gives EIO where a record of another type is next.
///
/// # Errors
/// Of recvmsg(2); EBADMSG for a record that does not decrypt, EKEYEXPIRED (Linux 6.14) after a KeyUpdate until the
/// direction has new keys.
pub fn receive_record(fd: RawFd, buffer: &mut [u8], flags: i32) -> io::Result<(u8, usize)> {
    let header = libc::cmsghdr { cmsg_len: 0, cmsg_level: 0, cmsg_type: 0 };
    let mut control = Control { header, kind: kind::DATA, _padding: [0; 7] };
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut message = message(&mut iov, &mut control);
    // SAFETY: the message and all it points to live through the call and may be written.
    let n = sys!(libc::SYS_recvmsg, fd, &raw mut message, flags)?;
    let told = message.msg_controllen >= CONTROL_LEN
        && control.header.cmsg_level == libc::SOL_TLS
        && control.header.cmsg_type == TLS_GET_RECORD_TYPE;
    Ok((if told { control.kind } else { kind::DATA }, n))
}

/// What this kernel's TLS can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Support {
    suites: [[bool; Suite::ALL.len()]; Version::ALL.len()],
    /// Keys of TLS 1.3 can be changed (KeyUpdate; Linux 6.14). Without it a connection ends with the peer's KeyUpdate.
    pub rekey: bool,
}

impl Support {
    /// Can it do this?
    #[must_use]
    pub fn has(&self, version: Version, suite: Suite) -> bool {
        self.suites.get(version as usize).and_then(|of| of.get(suite as usize)).copied().unwrap_or_default()
    }
}

/// Tries everything on connections to itself. For a daemon's start: makes six connections over loopback (which must be
/// up) in the caller's network namespace, through libc. May load modules.
///
/// # Errors
/// `Absent`; `Other` when there is no loopback.
pub fn probe() -> Result<Support, KtlsError> {
    let mut support = Support::default();
    for version in Version::ALL {
        for suite in Suite::ALL {
            let (socket, _peer) = pair().map_err(|e| KtlsError::Other("loopback", e))?;
            let fd = socket.as_raw_fd();
            attach(fd)?;
            let Some(keys) = Keys::new(version, suite, &[1; 32][..suite.key_len()], [2; 12], 0) else {
                continue;
            };
            let both = [Direction::Send, Direction::Receive];
            let taken = both.into_iter().try_for_each(|direction| install(fd, direction, &keys));
            match taken {
                Ok(()) => support.suites[version as usize][suite as usize] = true,
                Err(KtlsError::Unsupported(..)) => continue,
                Err(e) => return Err(e),
            }
            // An unused key is as good as a new one.
            support.rekey |= version == Version::Tls13 && install(fd, Direction::Receive, &keys).is_ok();
        }
    }
    Ok(support)
}

fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    Ok((listener.accept()?.0, client))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(version: Version, suite: Suite) -> Keys {
        let key: Vec<u8> = (100..).take(suite.key_len()).collect();
        Keys::new(version, suite, &key, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 0x0102)
            .expect("the right length")
    }

    #[test]
    fn the_kernels_layout_holds_everything_and_gives_it_back() {
        for version in Version::ALL {
            for suite in Suite::ALL {
                let keys = keys(version, suite);
                let info = keys.info();
                assert_eq!(Keys::from_info(version, suite, &info), Some(keys), "{version:?} {suite:?}");
                assert_eq!(Keys::new(version, suite, &[0; 15], [0; 12], 0), None);
            }
        }
        // sizeof(struct tls12_crypto_info_aes_gcm_128), ..._256, ..._chacha20_poly1305.
        let lengths = Suite::ALL.map(|suite| keys(Version::Tls12, suite).info().len);
        assert_eq!(lengths, [40, 56, 56]);
        let info = keys(Version::Tls13, Suite::Aes128Gcm).info();
        assert_eq!(info.bytes[4..12], [4, 5, 6, 7, 8, 9, 10, 11], "iv");
        assert_eq!(info.bytes[12..28], std::array::from_fn::<u8, 16, _>(|i| 100 + i as u8), "key");
        assert_eq!(info.bytes[28..32], [0, 1, 2, 3], "salt");
        assert_eq!(info.bytes[32..40], [0, 0, 0, 0, 0, 0, 1, 2], "rec_seq");
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(
            format!("{:?}", keys(Version::Tls13, Suite::Aes256Gcm)),
            "Keys { version: Tls13, suite: Aes256Gcm, seq: 258, .. }"
        );
    }

    #[test]
    fn a_probe_says_what_a_socket_says() {
        let (socket, _peer) = pair().expect("loopback");
        let fd = socket.as_raw_fd();
        assert!(matches!(read(fd, Direction::Send), Err(KtlsError::NotInstalled)));
        let some = keys(Version::Tls13, Suite::Aes128Gcm);
        assert!(matches!(install(fd, Direction::Send, &some), Err(KtlsError::NotInstalled)));
        let attached = attach(fd);
        match probe() {
            Ok(support) => {
                assert!(support.has(Version::Tls12, Suite::Aes128Gcm), "{support:?}");
                attached.expect("the layer");
                assert!(matches!(attach(fd), Err(KtlsError::Taken)));
                assert!(matches!(read(fd, Direction::Send), Err(KtlsError::NotInstalled)));
            }
            Err(KtlsError::Absent) => assert!(matches!(attached, Err(KtlsError::Absent)), "{attached:?}"),
            Err(e) => panic!("{e}"),
        }
    }
}
