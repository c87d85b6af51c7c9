//! Lines of the keylog callback (the format that NSS has brought up, draft-ietf-tls-keylogfile).

use zeroize::Zeroize;

use super::{MAX_SECRET, RANDOM};

/// Which secret a line tells, of those that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// TLS 1.2: the master secret.
    Master,
    /// TLS 1.3: the client's first application traffic secret.
    Client,
    /// TLS 1.3: the server's.
    Server,
    /// TLS 1.3: the client's next one, after a KeyUpdate.
    ClientNext,
    /// TLS 1.3: the server's.
    ServerNext,
    /// TLS 1.3: the client has sent early data, or might.
    Early,
}

/// A secret.
pub struct Secret {
    bytes: [u8; MAX_SECRET],
    length: usize,
}

impl Secret {
    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// A master secret's length is always the same.
    #[must_use]
    pub fn master(&self) -> Option<&[u8; MAX_SECRET]> {
        (self.length == MAX_SECRET).then_some(&self.bytes)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

/// Never printed.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({} bytes)", self.length)
    }
}

/// A line.
#[derive(Debug)]
pub struct KeylogLine {
    /// Which secret.
    pub label: Label,
    /// The client's random value, which names the connection.
    pub client_random: [u8; RANDOM],
    /// The secret.
    pub secret: Secret,
}

impl KeylogLine {
    /// Reads a line; `None` for one of no concern (exporter and handshake secrets, comments), and for what is no such line.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<KeylogLine> {
        let mut fields = line.trim_ascii_end().split(|b| *b == b' ');
        let label = match fields.next()? {
            b"CLIENT_RANDOM" => Label::Master,
            b"CLIENT_TRAFFIC_SECRET_0" => Label::Client,
            b"SERVER_TRAFFIC_SECRET_0" => Label::Server,
            b"CLIENT_TRAFFIC_SECRET_N" => Label::ClientNext,
            b"SERVER_TRAFFIC_SECRET_N" => Label::ServerNext,
            b"CLIENT_EARLY_TRAFFIC_SECRET" => Label::Early,
            _ => return None,
        };
        let mut client_random = [0; RANDOM];
        let mut secret = Secret { bytes: [0; MAX_SECRET], length: 0 };
        let random = unhex(fields.next()?, &mut client_random)?;
        secret.length = unhex(fields.next()?, &mut secret.bytes)?;
        let whole = random == RANDOM && secret.length > 0 && fields.next().is_none();
        whole.then_some(KeylogLine { label, client_random, secret })
    }
}

/// Decodes into `out`; how many bytes.
fn unhex(text: &[u8], out: &mut [u8]) -> Option<usize> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let bytes = out.get_mut(..text.len() / 2)?;
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(text.len() / 2)
}
