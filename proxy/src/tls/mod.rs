//! Mutual TLS between proxies: who the peer is, how keys and roots change, and the records themselves.
//!
//! * [`verify_peer`]: the rule by which a peer is accepted, pure.
//! * [`ServerContext`], [`ClientContext`]: everything a handshake needs, immutable. Rotation is a new context; connections
//!   that are open keep theirs, and the identity of their peer.
//! * `handshake`: rustls over a socket. `record`: what follows it, on keys that rustls hands over, decrypted in place and
//!   with no buffer of its own.
//!
//! No session is ever resumed: neither tickets nor session identifiers are issued or kept, so every connection is a
//! full handshake, verified against the roots, the clock and the names of that moment. (The same chain before the same roots
//! stays good until it ends, and its signatures are not computed again.) A resumed one would carry a verdict of the past.
//! No 0-RTT for the same reason, and because it can be replayed.

mod context;
mod handshake;
mod leaf;
mod record;
mod verify;

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

pub(crate) use context::own_identity;
pub use context::{ClientContext, ContextError, ServerContext};
pub(crate) use handshake::{Established, HandshakeError, accept, connect};
pub use leaf::{Leaf, LeafError};
pub(crate) use record::{MAX_PLAINTEXT, MAX_RECORD, RecordError, Session};
pub use verify::{MAX_CHAIN, PeerIdentity, PeerRefusal, PeerRole, Roots, RootsError, now, verify_peer};

/// aws-lc-rs with AES-128-GCM in front: the fastest on machines with AES instructions, and as strong as P-256 around it.
fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites = vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            aws_lc_rs::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
            aws_lc_rs::cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        ];
        Arc::new(provider)
    });
    &PROVIDER
}
