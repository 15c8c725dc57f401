//! One accepted connection: what is known of it, who may end it, and the events about it.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Instant, SystemTime};

use culvert_types::{ConnectionEvent, ConnectionKind, Path, RefusalReason, SpiffeId, Verdict};
use tokio::task::AbortHandle;

use super::copy::Traffic;
use crate::events::Events;
use crate::tls::PeerIdentity;

/// What the task of a connection and those who may end it share.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) peer: SocketAddr,
    /// Where it connected to.
    pub(crate) local: SocketAddr,
    /// Who the TLS client is, on inbound connections, once the handshake is done. Set under the registry's lock.
    pub(crate) identity: OnceLock<PeerIdentity>,
    pub(crate) traffic: Traffic,
    /// It was let through.
    pub(crate) open: AtomicBool,
    pub(crate) task: OnceLock<AbortHandle>,
    /// Why it was ended from outside, and the rule behind it.
    ended: OnceLock<(Option<RefusalReason>, String)>,
    accepted: Instant,
}

impl Live {
    pub(crate) fn new(peer: SocketAddr, local: SocketAddr) -> Self {
        Self {
            peer,
            local,
            identity: OnceLock::new(),
            traffic: Traffic::default(),
            open: AtomicBool::new(false),
            task: OnceLock::new(),
            ended: OnceLock::new(),
            accepted: Instant::now(),
        }
    }

    /// Ends the connection at once: both sides are reset.
    pub(crate) fn end(&self, reason: Option<RefusalReason>, because: String) {
        let _first_reason_counts = self.ended.set((reason, because));
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }

    /// It was ended because policy changed.
    pub(crate) fn is_revoked(&self) -> bool {
        self.ended.get().is_some_and(|(reason, _)| *reason == Some(RefusalReason::Revoked))
    }
}

/// Why a connection is not let through.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) reason: RefusalReason,
    pub(crate) detail: String,
}

impl Refusal {
    pub(crate) fn new(reason: RefusalReason, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string() }
    }
}

/// Tells the events of one connection, each at most once, whatever ends its task: even an abort or a panic.
pub(crate) struct Story<'a> {
    pub(crate) live: &'a Live,
    events: &'a Events,
    reporter: &'a str,
    inbound: bool,
    pub(crate) source: Option<SpiffeId>,
    pub(crate) destination: Option<SpiffeId>,
    pub(crate) rule: Option<String>,
    opened: bool,
    told: bool,
}

impl<'a> Story<'a> {
    pub(crate) fn new(live: &'a Live, events: &'a Events, reporter: &'a str, inbound: bool) -> Self {
        let (source, destination, rule) = (None, None, None);
        Self { live, events, reporter, inbound, source, destination, rule, opened: false, told: false }
    }

    /// Let through and established.
    pub(crate) fn open(&mut self) {
        self.opened = true;
        self.live.open.store(true, Relaxed);
        self.emit(ConnectionKind::Open, Verdict::Allow, None, None);
    }

    /// Never let through.
    pub(crate) fn refuse(mut self, refusal: Refusal) {
        self.told = true;
        self.emit(ConnectionKind::Refuse, Verdict::Deny, Some(refusal.reason), Some(refusal.detail));
    }

    /// Nothing happened that is worth telling.
    pub(crate) fn forget(mut self) {
        self.told = true;
    }

    /// Over by itself; `detail` says what broke, if something did.
    pub(crate) fn close(mut self, detail: Option<String>) {
        self.told = true;
        self.emit(ConnectionKind::Close, Verdict::Allow, None, detail);
    }

    /// Ended by the policy of the other side, before anything came from there or later.
    pub(crate) fn denied(mut self, detail: String) {
        self.told = true;
        let heard = self.live.traffic.to_app.load(Relaxed) > 0;
        let reason = if heard { RefusalReason::Revoked } else { RefusalReason::Intention };
        self.emit(ConnectionKind::Close, Verdict::Deny, Some(reason), Some(detail));
    }

    fn emit(&self, kind: ConnectionKind, verdict: Verdict, reason: Option<RefusalReason>, detail: Option<String>) {
        let (up, down) = (self.live.traffic.to_tunnel.load(Relaxed), self.live.traffic.to_app.load(Relaxed));
        let (bytes_to_destination, bytes_to_source) = if self.inbound { (down, up) } else { (up, down) };
        self.events.emit(ConnectionEvent {
            at: SystemTime::now(),
            kind,
            path: Path::Proxied,
            verdict,
            source: self.source.clone(),
            destination: self.destination.clone(),
            reporter: self.reporter.to_owned(),
            inbound: self.inbound,
            rule: self.rule.clone(),
            reason,
            detail,
            peer: Some(self.live.peer),
            bytes_to_destination,
            bytes_to_source,
            duration: self.live.accepted.elapsed(),
        });
    }
}

impl Drop for Story<'_> {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        let (reason, because) = match self.live.ended.get() {
            Some((reason, because)) => (*reason, because.clone()),
            None => (None, "the connection's task failed".to_owned()),
        };
        if reason == Some(RefusalReason::Revoked) {
            self.rule = Some(because.clone());
        }
        let verdict = if reason.is_some() { Verdict::Deny } else { Verdict::Allow };
        if self.opened {
            self.emit(ConnectionKind::Close, verdict, reason, Some(because));
        } else {
            let reason = reason.or(Some(RefusalReason::Handshake));
            self.emit(ConnectionKind::Refuse, Verdict::Deny, reason, Some(because));
        }
    }
}
