//! TLS records after the handshake, on keys that rustls hands over.
//!
//! rustls' own connections copy every payload through buffers that stay allocated. A proxy wants neither: records are
//! decrypted in place in a buffer shared by all connections of a thread, and an idle connection owns keys only. The
//! cryptography is rustls' still: its `MessageEncrypter`/`MessageDecrypter` know keys, nonces and additional data, its
//! `KernelConnection` derives the keys of an update. Here is what is left: finding records, sequence numbers, alerts, and the
//! two messages that may follow a handshake. Source: RFC 8446 §4.6, §5, §6; RFC 5246 §6, §7.2.

use std::ops::Range;

use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ExtractedSecrets, HandshakeType, ProtocolVersion,
    SupportedCipherSuite,
};

/// Header of a record: type, version, length.
const HEADER: usize = 5;
/// Most plaintext in one record (RFC 8446 §5.1).
pub(crate) const MAX_PLAINTEXT: usize = 16 * 1024;
/// Most bytes of a whole record: TLS 1.2 allows 2048 more than the plaintext (RFC 5246 §6.2.3), TLS 1.3 256.
pub(crate) const MAX_RECORD: usize = HEADER + MAX_PLAINTEXT + 2048;
/// Longest message that may follow a handshake and is looked at (a session ticket; they are a few hundred bytes).
const MAX_LATE_HANDSHAKE: usize = 16 * 1024;
/// Most key updates by the peer without payload between them: more is an attempt to keep us busy.
const MAX_IDLE_KEY_UPDATES: u32 = 32;
/// AES blocks in a record of full length. Limits on a key are about blocks (RFC 8446 §5.5), suites state them in full records.
const BLOCKS_PER_FULL_RECORD: u64 = MAX_PLAINTEXT as u64 / 16;

/// What went wrong with a record. All of them end the connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// Not a record, not one that may come now, or longer than allowed.
    #[error("peer sent {0}")]
    Unexpected(&'static str),
    /// Encryption, decryption or key derivation failed; a record was tampered with.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The peer ended the connection with an error of its own.
    #[error("peer sent alert {0:?}")]
    Alert(AlertDescription),
    /// TLS 1.2 has no key update, and the key is used up.
    #[error("key is used up and TLS 1.2 cannot renew it")]
    KeyUsedUp,
}

impl RecordError {
    /// The peer's policy denies us.
    pub(crate) fn is_denial(&self) -> bool {
        matches!(self, Self::Alert(AlertDescription::AccessDenied))
    }
}

/// rustls' state for the derivation of further keys.
pub(super) enum Kernel {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Kernel {
    fn update_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }

    fn update_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        }
    }
}

/// One established TLS connection: keys and counters, no bytes.
pub(crate) struct Session {
    decrypter: Box<dyn MessageDecrypter>,
    decrypted: u64,
    encrypter: Box<dyn MessageEncrypter>,
    encrypted: u64,
    /// AES blocks left before the sending key must be renewed.
    blocks_left: u64,
    kernel: Box<Kernel>,
    /// Part of a message that follows the handshake; empty but for a moment.
    late: Vec<u8>,
    idle_key_updates: u32,
    /// The peer asked for new keys; the next record we send is preceded by our key update.
    key_update_due: bool,
    peer_closed: bool,
}

/// What [`Session::open`] found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Opened {
    /// Bytes of whole records, from the start of the buffer. The rest is part of a record.
    pub(crate) consumed: usize,
    /// The peer said that no more payload follows.
    pub(crate) closed: bool,
}

impl Session {
    pub(super) fn new(secrets: ExtractedSecrets, kernel: Kernel) -> Result<Self, RecordError> {
        let suite = kernel.suite();
        let ((encrypted, tx), (decrypted, rx)) = (secrets.tx, secrets.rx);
        let mut encrypter = encrypter(suite, tx)?;
        if encrypted > 0 {
            // The AEAD insists that numbers start at 0 and takes the first one it sees for 0; the handshake used up some
            // (TLS 1.2). What is sealed here is never sent, so no nonce is used for two records.
            encrypter.encrypt(plain(ContentType::Alert, &[]), 0)?;
        }
        let decrypter = decrypter(suite, rx)?;
        Ok(Self {
            decrypter,
            decrypted,
            encrypter,
            encrypted,
            blocks_left: block_limit(suite),
            kernel: Box::new(kernel),
            late: Vec::new(),
            idle_key_updates: 0,
            key_update_due: false,
            peer_closed: false,
        })
    }

    /// Decrypts, in place, all whole records at the start of `buffer`; adds where their payload lies to `payload`.
    pub(crate) fn open(&mut self, buffer: &mut [u8], payload: &mut Vec<Range<usize>>) -> Result<Opened, RecordError> {
        let base = buffer.as_ptr().addr();
        let mut at = 0;
        while !self.peer_closed {
            let Some(&[kind, major, _, high, low]) = buffer[at..].first_chunk::<HEADER>() else { break };
            let length = usize::from(u16::from_be_bytes([high, low]));
            if major != 3 || HEADER + length > MAX_RECORD {
                return Err(RecordError::Unexpected("something that is not a TLS record"));
            }
            let Some(body) = buffer[at + HEADER..].get_mut(..length) else { break };
            at += HEADER + length;
            if self.version() == ProtocolVersion::TLSv1_3 && ContentType::from(kind) != ContentType::ApplicationData {
                return Err(RecordError::Unexpected("a record in plaintext"));
            }
            let sealed = InboundOpaqueMessage::new(ContentType::from(kind), ProtocolVersion::TLSv1_2, body);
            let record = self.decrypter.decrypt(sealed, self.decrypted)?;
            self.decrypted += 1;
            if !self.late.is_empty() && record.typ != ContentType::Handshake {
                return Err(RecordError::Unexpected("half a handshake message"));
            }
            match record.typ {
                ContentType::ApplicationData => {
                    self.idle_key_updates = 0;
                    let start = record.payload.as_ptr().addr() - base;
                    payload.push(start..start + record.payload.len());
                }
                ContentType::Alert => self.peer_closed = is_close(record.payload)?,
                ContentType::Handshake => {
                    let message = record.payload.to_vec();
                    self.late_handshake(&message)?;
                }
                _ => return Err(RecordError::Unexpected("a record of an unexpected type")),
            }
        }
        Ok(Opened { consumed: at, closed: self.peer_closed })
    }

    /// Encrypts `payload` and adds the records to `out`, after a key update where one is due.
    pub(crate) fn seal(&mut self, payload: &[u8], out: &mut Vec<Vec<u8>>) -> Result<(), RecordError> {
        for part in payload.chunks(MAX_PLAINTEXT) {
            let blocks = (part.len() as u64).div_ceil(16) + 2;
            if self.key_update_due || self.blocks_left < blocks {
                self.update_own_key(out)?;
            }
            self.blocks_left -= blocks;
            out.push(self.seal_one(ContentType::ApplicationData, part)?);
        }
        Ok(())
    }

    /// The record that says that no more payload follows (RFC 8446 §6.1).
    pub(crate) fn seal_close(&mut self) -> Result<Vec<u8>, RecordError> {
        self.seal_one(ContentType::Alert, &[1, u8::from(AlertDescription::CloseNotify)])
    }

    /// The record that says that the peer is who it says and still not let in (RFC 8446 §6.2); nothing may follow it.
    pub(crate) fn seal_denial(&mut self) -> Result<Vec<u8>, RecordError> {
        self.seal_one(ContentType::Alert, &[2, u8::from(AlertDescription::AccessDenied)])
    }

    fn seal_one(&mut self, kind: ContentType, payload: &[u8]) -> Result<Vec<u8>, RecordError> {
        let record = self.encrypter.encrypt(plain(kind, payload), self.encrypted)?;
        self.encrypted += 1;
        Ok(record.encode())
    }

    /// Announces our next key and takes it into use (RFC 8446 §4.6.3).
    #[cold]
    fn update_own_key(&mut self, out: &mut Vec<Vec<u8>>) -> Result<(), RecordError> {
        if self.version() != ProtocolVersion::TLSv1_3 {
            return Err(RecordError::KeyUsedUp);
        }
        let message = [u8::from(HandshakeType::KeyUpdate), 0, 0, 1, 0]; // update_not_requested
        out.push(self.seal_one(ContentType::Handshake, &message)?);
        let (number, secrets) = self.kernel.update_tx()?;
        self.encrypter = encrypter(self.kernel.suite(), secrets)?;
        self.encrypted = number;
        self.blocks_left = block_limit(self.kernel.suite());
        self.key_update_due = false;
        Ok(())
    }

    /// Messages that may follow a TLS 1.3 handshake: tickets, which are dropped, and key updates.
    #[cold]
    fn late_handshake(&mut self, part: &[u8]) -> Result<(), RecordError> {
        if self.version() != ProtocolVersion::TLSv1_3 {
            return Err(RecordError::Unexpected("a renegotiation"));
        }
        if part.is_empty() {
            return Err(RecordError::Unexpected("an empty handshake record"));
        }
        self.late.extend_from_slice(part);
        while let Some(&[kind, high, middle, low]) = self.late.first_chunk::<4>() {
            let end = 4 + u32::from_be_bytes([0, high, middle, low]) as usize;
            if end > MAX_LATE_HANDSHAKE {
                return Err(RecordError::Unexpected("a handshake message that is too long"));
            }
            let Some(body) = self.late.get(4..end) else { return Ok(()) };
            match HandshakeType::from(kind) {
                HandshakeType::NewSessionTicket if matches!(*self.kernel, Kernel::Client(_)) => {}
                HandshakeType::KeyUpdate if self.late.len() == end => {
                    let requested = match body {
                        [0] => false,
                        [1] => true,
                        _ => return Err(RecordError::Unexpected("a malformed key update")),
                    };
                    self.update_peer_key(requested)?;
                }
                _ => return Err(RecordError::Unexpected("a handshake message that may not come now")),
            }
            self.late.drain(..end);
        }
        if self.late.is_empty() {
            self.late = Vec::new();
        }
        Ok(())
    }

    fn update_peer_key(&mut self, requested: bool) -> Result<(), RecordError> {
        self.idle_key_updates += 1;
        if self.idle_key_updates > MAX_IDLE_KEY_UPDATES {
            return Err(RecordError::Unexpected("too many key updates"));
        }
        let (number, secrets) = self.kernel.update_rx()?;
        self.decrypter = decrypter(self.kernel.suite(), secrets)?;
        self.decrypted = number;
        self.key_update_due |= requested;
        Ok(())
    }

    fn version(&self) -> ProtocolVersion {
        self.kernel.suite().version().version
    }
}

fn is_close(alert: &[u8]) -> Result<bool, RecordError> {
    let &[_level, description] = alert else { return Err(RecordError::Unexpected("a malformed alert")) };
    match AlertDescription::from(description) {
        AlertDescription::CloseNotify => Ok(true),
        AlertDescription::UserCanceled => Ok(false), // RFC 8446 §6.1: followed by close_notify
        other => Err(RecordError::Alert(other)),
    }
}

fn plain(typ: ContentType, payload: &[u8]) -> OutboundPlainMessage<'_> {
    OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload: OutboundChunks::Single(payload) }
}

fn block_limit(suite: SupportedCipherSuite) -> u64 {
    let common = match suite {
        SupportedCipherSuite::Tls13(suite) => &suite.common,
        SupportedCipherSuite::Tls12(suite) => &suite.common,
    };
    common.confidentiality_limit.saturating_mul(BLOCKS_PER_FULL_RECORD)
}

fn encrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageEncrypter>, rustls::Error> {
    let (key, iv) = key_and_iv(secrets)?;
    Ok(match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.encrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let (fixed, explicit) = iv.as_ref().split_at(suite.aead_alg.key_block_shape().fixed_iv_len);
            suite.aead_alg.encrypter(key, fixed, explicit)
        }
    })
}

fn decrypter(
    suite: SupportedCipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, rustls::Error> {
    let (key, iv) = key_and_iv(secrets)?;
    Ok(match suite {
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.decrypter(key, iv),
        SupportedCipherSuite::Tls12(suite) => {
            let fixed = suite.aead_alg.key_block_shape().fixed_iv_len;
            suite.aead_alg.decrypter(key, &iv.as_ref()[..fixed])
        }
    })
}

fn key_and_iv(
    secrets: ConnectionTrafficSecrets,
) -> Result<(rustls::crypto::cipher::AeadKey, rustls::crypto::cipher::Iv), rustls::Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(rustls::Error::General("cipher suite without extractable keys".to_owned())),
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
