//! Keys from secrets.

use ring::{hkdf, hmac};
use zeroize::{Zeroize, Zeroizing};

use super::{Direction, MAX_SECRET, NONCE, RANDOM, Suite, TlsError, Version};

/// Output length for ring's HKDF.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label without context (RFC 8446, 7.1). Every length here is far below HKDF's limit of 255 hashes.
fn expand_label(suite: Suite, secret: &[u8], label: &str, out: &mut [u8]) -> Result<(), TlsError> {
    const PREFIX: &[u8] = b"tls13 ";
    let length = u16::try_from(out.len()).map_err(|_| TlsError::Secret)?.to_be_bytes();
    let label_length = u8::try_from(PREFIX.len() + label.len()).map_err(|_| TlsError::Secret)?;
    let info: [&[u8]; 5] = [&length, &[label_length], PREFIX, label.as_bytes(), &[0]];
    let secret = hkdf::Prk::new_less_safe(suite.hkdf(), secret);
    let okm = secret.expand(&info, Length(out.len())).map_err(|_| TlsError::Secret)?;
    okm.fill(out).map_err(|_| TlsError::Secret)
}

impl Direction {
    /// TLS 1.3: with this application traffic secret, before its first record (RFC 8446, 7.3).
    ///
    /// # Errors
    /// `Suite` for one of TLS 1.2, `Secret` when the secret is not as long as the suite's hash.
    pub fn from_secret(suite: Suite, secret: &[u8]) -> Result<Direction, TlsError> {
        if suite.version() != Version::Tls13 {
            return Err(TlsError::Suite);
        }
        if secret.len() != suite.hash_len() {
            return Err(TlsError::Secret);
        }
        let mut direction = Direction::EMPTY;
        direction.secret[..secret.len()].copy_from_slice(secret);
        expand_label(suite, secret, "key", &mut direction.key[..suite.key_len()])?;
        expand_label(suite, secret, "iv", &mut direction.iv)?;
        Ok(direction)
    }

    /// TLS 1.3: after a KeyUpdate (RFC 8446, 7.2).
    ///
    /// # Errors
    /// `Suite` for one of TLS 1.2.
    pub fn next(&self, suite: Suite) -> Result<Direction, TlsError> {
        let length = suite.hash_len();
        let mut next = Zeroizing::new([0; MAX_SECRET]);
        expand_label(suite, &self.secret[..length], "traffic upd", &mut next[..length])?;
        Direction::from_secret(suite, &next[..length])
    }

    /// TLS 1.2: both directions, before their first records (RFC 5246, 6.3): the client's, the server's.
    ///
    /// # Errors
    /// `Suite` for one of TLS 1.3.
    pub fn from_master(
        suite: Suite,
        master: &[u8; MAX_SECRET],
        client_random: &[u8; RANDOM],
        server_random: &[u8; RANDOM],
    ) -> Result<[Direction; 2], TlsError> {
        if suite.version() != Version::Tls12 {
            return Err(TlsError::Suite);
        }
        let key = suite.key_len();
        let iv = if suite.has_explicit_nonce() { 4 } else { NONCE };
        let mut block = Zeroizing::new([0; 2 * (32 + NONCE)]);
        let block = &mut block[..2 * (key + iv)];
        prf(suite, master, b"key expansion", [server_random, client_random], block);
        let (keys, ivs) = block.split_at(2 * key);
        let direction = |number: usize| {
            let mut direction = Direction::EMPTY;
            direction.key[..key].copy_from_slice(&keys[number * key..][..key]);
            direction.iv[..iv].copy_from_slice(&ivs[number * iv..][..iv]);
            direction
        };
        Ok([direction(0), direction(1)])
    }
}

/// The pseudorandom function of TLS 1.2 (RFC 5246, 5).
fn prf(suite: Suite, secret: &[u8], label: &[u8], seed: [&[u8; RANDOM]; 2], out: &mut [u8]) {
    let key = hmac::Key::new(suite.hmac(), secret);
    let mac = |a: Option<&hmac::Tag>, seeded: bool| {
        let mut context = hmac::Context::with_key(&key);
        if let Some(a) = a {
            context.update(a.as_ref());
        }
        if seeded {
            [label, seed[0], seed[1]].into_iter().for_each(|part| context.update(part));
        }
        context.sign()
    };
    let mut a = mac(None, true);
    for part in out.chunks_mut(suite.hash_len()) {
        let mut hash = [0; MAX_SECRET];
        let tag = mac(Some(&a), true);
        hash[..tag.as_ref().len()].copy_from_slice(tag.as_ref());
        part.copy_from_slice(&hash[..part.len()]);
        hash.zeroize();
        a = mac(Some(&a), false);
    }
}
