//! Events of the kernel programs, told in the words of all connection events.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_control::MeshView;
use culvert_types::{
    ConnectionEvent, ConnectionKind, Path, RefusalReason, ServiceIdentity, ServiceName, SpiffeId, Verdict,
};
use tokio::sync::{mpsc, watch};

use super::{Pair, PolicyEngine};
use crate::datapath::{DirectConnection, DroppedPacket, FlowEnds, KernelEvent};
use crate::events::EventHub;

/// How often lost events are counted.
const LOOK_FOR_LOST: Duration = Duration::from_secs(5);

/// Tells `hub` everything the kernel reports, until the kernel's side ends.
pub async fn relay(
    mut events: mpsc::Receiver<KernelEvent>,
    policy: Arc<PolicyEngine>,
    mesh: watch::Receiver<Arc<MeshView>>,
    hub: Arc<EventHub>,
) {
    let mut told_lost = 0;
    let mut look = tokio::time::interval(LOOK_FOR_LOST);
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _ = look.tick() => {
                let lost = policy.lost_events().await;
                hub.lost(lost.saturating_sub(told_lost));
                told_lost = lost;
                continue;
            }
        };
        let Some(event) = event else { return };
        let view = mesh.borrow().clone();
        let relay = Relay { policy: &policy, view: &view, hub: &hub };
        match event {
            KernelEvent::Open(connection) => {
                relay.connection(&connection, ConnectionKind::Open, Ended::default()).await
            }
            KernelEvent::Close { connection, bytes_to_destination, bytes_to_source, duration } => {
                let ended = Ended { bytes_to_destination, bytes_to_source, duration };
                relay.connection(&connection, ConnectionKind::Close, ended).await;
            }
            KernelEvent::Fail(connection) => relay.fail(&connection).await,
            KernelEvent::Refused(packet) => relay.dropped(&packet, RefusalReason::Unauthorised).await,
            KernelEvent::Spoofed(packet) => relay.dropped(&packet, RefusalReason::Spoofed).await,
            KernelEvent::NoListener(packet) => relay.dropped(&packet, RefusalReason::Connect).await,
        }
    }
}

/// What is final only at the end of a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Ended {
    bytes_to_destination: u64,
    bytes_to_source: u64,
    duration: Duration,
}

struct Relay<'a> {
    policy: &'a PolicyEngine,
    view: &'a MeshView,
    hub: &'a EventHub,
}

impl Relay<'_> {
    /// Both ends are here: each side is told once, as on the proxied path.
    async fn connection(&self, connection: &DirectConnection, kind: ConnectionKind, ended: Ended) {
        let Some(pair) = self.policy.pair(connection.service).await else { return };
        let revoked = if kind == ConnectionKind::Close { self.revoked(connection).await } else { None };
        for (inbound, workload, peer) in [
            (false, connection.source, connection.flow.destination),
            (true, connection.destination, connection.flow.source),
        ] {
            let service = if inbound { &pair.destination } else { &pair.source };
            let event = ConnectionEvent {
                bytes_to_destination: ended.bytes_to_destination,
                bytes_to_source: ended.bytes_to_source,
                duration: ended.duration,
                rule: Some(pair.rule.clone()),
                reporter: self.reporter(workload, service).await,
                ..self.event(connection.at, kind, Some(&pair), inbound, peer)
            };
            self.hub.publish_direct(service.as_str(), told(event, revoked.as_ref()), connection.cookie);
        }
    }

    /// The application did not accept: told by the calling side alone.
    async fn fail(&self, connection: &DirectConnection) {
        let Some(pair) = self.policy.pair(connection.service).await else { return };
        let event = ConnectionEvent {
            reason: Some(RefusalReason::Connect),
            rule: Some(pair.rule.clone()),
            reporter: self.reporter(connection.source, &pair.source).await,
            ..self.event(connection.at, ConnectionKind::Refuse, Some(&pair), false, connection.flow.destination)
        };
        self.hub.publish(pair.source.as_str(), told(event, self.revoked(connection).await.as_ref()));
    }

    /// The rule that ended a connection, if policy did.
    async fn revoked(&self, connection: &DirectConnection) -> Option<String> {
        let port = connection.flow.destination.port();
        let ends = FlowEnds { source: connection.source, destination: connection.destination, port };
        self.policy.revoked(&ends, connection.at).await
    }

    /// A packet without leave: who sent it is known only by its workload, if at all.
    async fn dropped(&self, packet: &DroppedPacket, reason: RefusalReason) {
        let source = self.service_of(packet.source).await;
        let destination = self.service_of(packet.destination).await;
        let inbound = reason != RefusalReason::Spoofed;
        let (workload, service) = if inbound { (packet.destination, &destination) } else { (packet.source, &source) };
        // A workload may be outside the mesh, and its packets are dropped all the same.
        let (service, reporter) = match service {
            Some(service) => (service.as_str(), self.reporter(workload.unwrap_or_default(), service).await),
            None => ("", String::new()),
        };
        let more =
            if packet.suppressed > 0 { format!(" ({} more not told)", packet.suppressed) } else { String::new() };
        let event = ConnectionEvent {
            verdict: Verdict::Deny,
            reason: Some(reason),
            detail: Some(format!("packet {} -> {} dropped{more}", packet.flow.source, packet.flow.destination)),
            source: source.as_ref().map(|service| self.identity(service)),
            destination: destination.as_ref().map(|service| self.identity(service)),
            reporter,
            ..self.event(packet.at, ConnectionKind::Refuse, None, inbound, packet.flow.source)
        };
        self.hub.publish(service, event);
    }

    fn event(
        &self,
        at: SystemTime,
        kind: ConnectionKind,
        pair: Option<&Pair>,
        inbound: bool,
        peer: SocketAddr,
    ) -> ConnectionEvent {
        ConnectionEvent {
            at,
            kind,
            path: Path::Direct,
            verdict: Verdict::Allow,
            source: pair.map(|pair| self.identity(&pair.source)),
            destination: pair.map(|pair| self.identity(&pair.destination)),
            reporter: String::new(),
            inbound,
            rule: None,
            reason: None,
            detail: None,
            peer: Some(peer),
            bytes_to_destination: 0,
            bytes_to_source: 0,
            duration: Duration::ZERO,
        }
    }

    fn identity(&self, service: &ServiceName) -> SpiffeId {
        let (trust_domain, datacenter) = (self.view.trust_domain.clone(), self.view.datacenter.clone());
        ServiceIdentity { trust_domain, datacenter, service: service.clone() }.id()
    }

    /// The sidecar of `service` in a workload.
    async fn reporter(&self, workload: u32, service: &ServiceName) -> String {
        let sidecars = self.policy.sidecars(workload).await;
        let of_service = |sidecar: &&String| {
            self.view.instances.iter().any(|instance| instance.sidecar_id == **sidecar && instance.service == *service)
        };
        sidecars.iter().find(of_service).or_else(|| sidecars.first()).cloned().unwrap_or_default()
    }

    /// The first service of a workload.
    async fn service_of(&self, workload: Option<u32>) -> Option<ServiceName> {
        let sidecars = self.policy.sidecars(workload?).await;
        let instance = self.view.instances.iter().find(|instance| sidecars.contains(&instance.sidecar_id))?;
        Some(instance.service.clone())
    }
}

/// `event`, as it is told when a rule has ended its connection.
fn told(event: ConnectionEvent, revoked: Option<&String>) -> ConnectionEvent {
    let Some(rule) = revoked.cloned() else { return event };
    let (reason, detail) = (Some(RefusalReason::Revoked), Some(rule.clone()));
    ConnectionEvent { verdict: Verdict::Deny, reason, rule: Some(rule), detail, ..event }
}
