//! Versions and cipher suites: those that can move.

use bincode::{Decode, Encode};
use ring::{aead, hkdf, hmac};

/// Version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Version {
    /// RFC 5246.
    Tls12,
    /// RFC 8446.
    Tls13,
}

impl Version {
    /// By its number on the wire; `None` for those that cannot move.
    #[must_use]
    pub fn of(number: u16) -> Option<Version> {
        match number {
            0x0303 => Some(Version::Tls12),
            0x0304 => Some(Version::Tls13),
            _ => None,
        }
    }
}

/// How records are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// AES-128 in GCM.
    Aes128Gcm,
    /// AES-256 in GCM.
    Aes256Gcm,
    /// RFC 8439.
    Chacha20Poly1305,
}

/// A cipher suite, as far as records are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suite {
    version: Version,
    cipher: Cipher,
}

impl Suite {
    /// By its number (IANA "TLS Cipher Suites"); `None` for those that cannot move: other versions', and those that are no
    /// AEAD.
    #[must_use]
    pub fn of(version: Version, number: u16) -> Option<Suite> {
        let cipher = match (version, number) {
            // RFC 8446, B.4.
            (Version::Tls13, 0x1301) => Cipher::Aes128Gcm,
            (Version::Tls13, 0x1302) => Cipher::Aes256Gcm,
            (Version::Tls13, 0x1303) => Cipher::Chacha20Poly1305,
            // RFC 5288, 3; RFC 5289, 3.2: RSA, DHE_RSA, ECDHE_ECDSA, ECDHE_RSA.
            (Version::Tls12, 0x009c | 0x009e | 0xc02b | 0xc02f) => Cipher::Aes128Gcm,
            (Version::Tls12, 0x009d | 0x009f | 0xc02c | 0xc030) => Cipher::Aes256Gcm,
            // RFC 7905, 2: ECDHE_RSA, ECDHE_ECDSA, DHE_RSA.
            (Version::Tls12, 0xcca8..=0xccaa) => Cipher::Chacha20Poly1305,
            _ => return None,
        };
        Some(Suite { version, cipher })
    }

    /// The version that it is of.
    #[must_use]
    pub fn version(self) -> Version {
        self.version
    }

    /// Its cipher.
    #[must_use]
    pub fn cipher(self) -> Cipher {
        self.cipher
    }

    /// Length of the key, bytes.
    #[must_use]
    pub fn key_len(self) -> usize {
        self.algorithm().key_len()
    }

    /// Length of the hash, and so of the secrets of TLS 1.3, bytes.
    #[must_use]
    pub fn hash_len(self) -> usize {
        if self.cipher == Cipher::Aes256Gcm { 48 } else { 32 }
    }

    /// Is a part of the nonce in each record (RFC 5288, 3)?
    #[must_use]
    pub fn has_explicit_nonce(self) -> bool {
        self.version == Version::Tls12 && self.cipher != Cipher::Chacha20Poly1305
    }

    pub(super) fn algorithm(self) -> &'static aead::Algorithm {
        match self.cipher {
            Cipher::Aes128Gcm => &aead::AES_128_GCM,
            Cipher::Aes256Gcm => &aead::AES_256_GCM,
            Cipher::Chacha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }

    pub(super) fn hkdf(self) -> hkdf::Algorithm {
        if self.cipher == Cipher::Aes256Gcm { hkdf::HKDF_SHA384 } else { hkdf::HKDF_SHA256 }
    }

    pub(super) fn hmac(self) -> hmac::Algorithm {
        if self.cipher == Cipher::Aes256Gcm { hmac::HMAC_SHA384 } else { hmac::HMAC_SHA256 }
    }
}
