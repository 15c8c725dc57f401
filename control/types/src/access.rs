//! What is recorded of a connection: the record behind `culvert observe`, the metrics and the access log.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use crate::spiffe::SpiffeId;

/// Which way the bytes of a connection took. Every connection is counted in exactly one.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Path {
    /// Two applications on one TCP connection, steered by eBPF.
    Direct,
    /// Through the worker, mutual TLS.
    Proxied,
}

impl Path {
    /// The word used in metrics and events.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxied => "proxied",
        }
    }
}

/// What became of a connection attempt.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Verdict {
    /// It was let through.
    Allow,
    /// It was refused, or ended by a change of policy.
    Deny,
}

impl Verdict {
    /// The word used in metrics and events.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// Why a connection was refused or ended early. A closed set: it becomes a metric label.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum RefusalReason {
    /// An intention, or the default, denies the pair.
    Intention,
    /// The intention turned to deny while the connection was open.
    Revoked,
    /// No client certificate, or one that the trust domain did not issue, or not exactly one SPIFFE URI.
    ClientCertificate,
    /// The server's certificate is not the destination's.
    ServerCertificate,
    /// Anything else that broke the TLS handshake.
    Handshake,
    /// No passing instance.
    NoHealthyInstance,
    /// Every attempt to connect failed.
    Connect,
    /// A limit of connections was reached.
    Limit,
    /// A packet to an application's port without authorisation, dropped in the kernel.
    Unauthorised,
    /// A packet whose source address is not the workload's own.
    Spoofed,
}

impl RefusalReason {
    /// The word used in metrics and events.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Intention => "intention",
            Self::Revoked => "revoked",
            Self::ClientCertificate => "client_certificate",
            Self::ServerCertificate => "server_certificate",
            Self::Handshake => "handshake",
            Self::NoHealthyInstance => "no_healthy_instance",
            Self::Connect => "connect",
            Self::Limit => "limit",
            Self::Unauthorised => "unauthorised",
            Self::Spoofed => "spoofed",
        }
    }
}

/// Which moment of a connection an event tells about.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ConnectionKind {
    /// Let through and established.
    Open,
    /// Ended; bytes and duration are final.
    Close,
    /// Never let through.
    Refuse,
}

/// One event of one connection, as seen by one side of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConnectionEvent {
    /// When it happened.
    pub at: SystemTime,
    /// Which moment.
    pub kind: ConnectionKind,
    /// Which way the bytes take.
    pub path: Path,
    /// Allow or deny.
    pub verdict: Verdict,
    /// Who calls, where known.
    pub source: Option<SpiffeId>,
    /// Who is called, where known.
    pub destination: Option<SpiffeId>,
    /// Catalog ID of the proxy that reports, or of the workload's sidecar on the direct path.
    pub reporter: String,
    /// Is the reporter the called side?
    pub inbound: bool,
    /// The rule that decided, as `Intention` prints it, or `default`.
    pub rule: Option<String>,
    /// Why it was refused or ended; `None` for an ordinary close.
    pub reason: Option<RefusalReason>,
    /// Detail for people: the error text. Never a key, never payload.
    pub detail: Option<String>,
    /// The peer's address.
    pub peer: Option<SocketAddr>,
    /// Payload bytes from the source to the destination.
    pub bytes_to_destination: u64,
    /// Payload bytes from the destination to the source.
    pub bytes_to_source: u64,
    /// Time since the connection was accepted.
    pub duration: Duration,
}
