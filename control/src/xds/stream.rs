//! One delta stream: joins what the proxy says ([`Session`]) with what it is to have ([`Snapshot`]).
//!
//! It begins only for a proxy that is registered here, and ends with the client: a proxy that is deregistered may have
//! connections yet, and goes on to hear who may call it.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use culvert_types::ServiceName;

use super::peer::XdsPeer;
use super::render::{Kind, Resources, render};
use super::server::Shared;
use super::session::{Heard, Session};
use super::snapshot::{Context, Snapshot, SnapshotError, represented};
use super::status::Entry;
use crate::ca::{LeafError, LeafWatch};
use crate::config::Reloadable;
use crate::state::State;

/// Longest wait for the request that names the proxy.
const FIRST_REQUEST: Duration = Duration::from_secs(15);
/// Responses between this task and the connection. At most one per kind is unanswered, so this never fills.
pub(super) const RESPONSES: usize = Kind::ALL.len() + 1;

pub(super) type Sender = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// A stream whose proxy is known.
struct Stream {
    shared: Arc<Shared>,
    proxy: String,
    service: ServiceName,
    leaf: LeafWatch,
    state: watch::Receiver<Arc<State>>,
    roots: watch::Receiver<Arc<crate::ca::Roots>>,
    settings: watch::Receiver<Reloadable>,
    session: Session,
    snapshot: Option<Snapshot>,
    resources: Resources,
    entry: Entry,
    responses: Sender,
}

/// Serves one stream to its end and tells the client why it ended.
pub(super) async fn serve(
    shared: Arc<Shared>,
    peer: XdsPeer,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: Sender,
) {
    let end = match begin(&shared, &peer, &mut requests, &responses).await {
        Ok((mut stream, first)) => stream.run(first, &mut requests).await,
        Err(status) => Err(status),
    };
    if let Err(status) = end {
        shared.status.refused_stream();
        // The receiver is gone if the client is.
        let _gone = responses.send(Err(status)).await;
    }
}

/// Reads the first request and finds out whose stream this is.
async fn begin(
    shared: &Arc<Shared>,
    peer: &XdsPeer,
    requests: &mut Streaming<DeltaDiscoveryRequest>,
    responses: &Sender,
) -> Result<(Stream, DeltaDiscoveryRequest), Status> {
    let first = timeout(FIRST_REQUEST, requests.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no request came on the stream"))??
        .ok_or_else(|| Status::invalid_argument("the stream ended before its first request"))?;
    let proxy = first.node.as_ref().map(|node| node.id.clone()).unwrap_or_default();
    if proxy.is_empty() {
        return Err(Status::invalid_argument("node.id is missing: it must be the ID of a registered proxy"));
    }
    if !peer.may_be(&proxy) {
        warn!(proxy, "a workload asked for the configuration of a proxy that is not its own");
        return Err(Status::permission_denied(format!("this connection may not act as proxy {proxy:?}")));
    }
    let state = shared.ledger.watch();
    let service = represented(&shared.ledger.state(), &shared.node, &proxy).map_err(|error| denied(&error))?;
    let stream = Stream {
        leaf: watch_leaf(shared, &service)?,
        roots: shared.leaves.authority().watch_roots(),
        settings: shared.settings.clone(),
        entry: shared.status.enter(&proxy),
        shared: Arc::clone(shared),
        responses: responses.clone(),
        session: Session::default(),
        snapshot: None,
        resources: Resources::default(),
        state,
        service,
        proxy,
    };
    Ok((stream, first))
}

fn denied(error: &SnapshotError) -> Status {
    Status::permission_denied(error.to_string())
}

fn watch_leaf(shared: &Shared, service: &ServiceName) -> Result<LeafWatch, Status> {
    shared.leaves.watch(service).map_err(|error| Status::resource_exhausted(error.to_string()))
}

impl Stream {
    async fn run(
        &mut self,
        first: DeltaDiscoveryRequest,
        requests: &mut Streaming<DeltaDiscoveryRequest>,
    ) -> Result<(), Status> {
        info!(proxy = self.proxy, service = %self.service, "a proxy connected");
        self.hear(&first)?;
        let stop = self.shared.stop.clone();
        loop {
            self.refresh()?;
            self.push().await?;
            let wake = self.session.wake_at(Instant::now());
            tokio::select! {
                () = stop.cancelled() => return Err(Status::unavailable("the agent is shutting down")),
                request = requests.message() => match request? {
                    Some(request) => self.hear(&request)?,
                    None => return Ok(()),
                },
                changed = self.state.changed() => closed(changed.is_err())?,
                changed = self.roots.changed() => closed(changed.is_err())?,
                changed = self.settings.changed() => closed(changed.is_err())?,
                changed = self.leaf.changed() => closed(matches!(changed, Err(LeafError::Closed)))?,
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
        }
    }

    /// Takes a new snapshot, and renders it if it says something new.
    fn refresh(&mut self) -> Result<(), Status> {
        let state = Arc::clone(&self.state.borrow_and_update());
        match (represented(&state, &self.shared.node, &self.proxy), &self.snapshot) {
            (Ok(service), _) if service != self.service => {
                self.leaf = watch_leaf(&self.shared, &service)?;
                self.service = service;
            }
            (Ok(_), _) | (Err(SnapshotError::NotRegistered(_)), Some(_)) => {}
            (Err(error), _) => return Err(denied(&error)),
        }
        let default_action = self.settings.borrow_and_update().default_policy;
        let roots = Arc::clone(&self.roots.borrow_and_update());
        // Without a certificate there is nothing to serve: the stream waits, and the proxy goes on with what it has.
        let Some(leaf) = self.leaf.take_latest() else { return Ok(()) };
        let context = Context { node: &self.shared.node, default_action, roots: &roots, leaf: &leaf };
        let snapshot = match (Snapshot::take(&state, &self.proxy, &context), &self.snapshot) {
            (Ok(snapshot), _) => snapshot,
            (Err(SnapshotError::NotRegistered(_)), Some(last)) => last.after_registration(&state, &context),
            (Err(error), _) => return Err(denied(&error)),
        };
        if self.snapshot.as_ref() != Some(&snapshot) {
            self.resources = render(&snapshot);
            debug!(proxy = self.proxy, revision = %state.revision(), version = self.resources.version(), "new configuration");
            self.snapshot = Some(snapshot);
        }
        Ok(())
    }

    async fn push(&mut self) -> Result<(), Status> {
        if self.snapshot.is_none() {
            return Ok(());
        }
        while let Some(response) = self.session.next(&self.resources, Instant::now()) {
            if let Some(kind) = Kind::from_type_url(&response.type_url) {
                self.entry.sent(kind);
            }
            if self.responses.send(Ok(response)).await.is_err() {
                return Err(Status::cancelled("the client is gone"));
            }
        }
        if self.session.settled() {
            self.entry.runs(&self.resources.version());
        }
        Ok(())
    }

    fn hear(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        let heard = self.session.hear(request).map_err(|error| Status::resource_exhausted(error.to_string()))?;
        match heard {
            Heard::Nothing => {}
            Heard::Ack(kind) => self.entry.accepted(kind),
            Heard::Nack(refusal) => {
                let kind = refusal.kind.as_str();
                warn!(proxy = self.proxy, kind, resources = ?refusal.resources, reason = refusal.reason,
                    "the proxy refused a response; it keeps what it had");
                self.entry.refused(refusal);
            }
        }
        Ok(())
    }
}

fn closed(closed: bool) -> Result<(), Status> {
    if closed { Err(Status::unavailable("the agent is shutting down")) } else { Ok(()) }
}
