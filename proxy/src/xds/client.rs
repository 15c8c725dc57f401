//! One proxy's stream: requests, acknowledgements, reconnection.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::rpc::Status as RpcStatus;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};
use tracing::{Instrument, debug, error, info, info_span, warn};

use super::backoff::Backoff;
use super::channel::XdsChannel;
use super::node::{Node, Token};
use super::state::{ResourceKind, State};
use super::status::{Nack, Status, nack_message};
use crate::config::ProxyConfig;

/// Most requests that wait for a control plane that does not read. One more, and the stream is given up.
pub const OUTBOX: usize = 256;
/// A control plane that is there and refuses the proxy for this long has taken its policy away. Shorter refusals are those of
/// an agent that has just started and has not registered everything yet.
pub const DENIED_LIMIT: Duration = Duration::from_secs(30);
/// The header with the ACL token.
const TOKEN_HEADER: &str = "x-consul-token";

/// Keeps one proxy's configuration up to date. Dropping it ends the stream; receivers keep the last configuration.
#[derive(Debug)]
pub struct XdsClient {
    config: watch::Receiver<Arc<ProxyConfig>>,
    status: watch::Receiver<Status>,
    token: Arc<Mutex<Option<Token>>>,
    retry: Arc<Notify>,
    task: AbortHandle,
}

impl XdsClient {
    /// Starts to follow the control plane behind `channel` as `node`. Has to be called within a tokio runtime.
    #[must_use]
    pub fn start(channel: XdsChannel, node: Node, token: Option<Token>) -> Self {
        let (config, config_seen) = watch::channel(Arc::default());
        let (status, status_seen) = watch::channel(Status::default());
        let token = Arc::new(Mutex::new(token));
        let span = info_span!("xds", proxy = %node.id);
        let state = State::default();
        let retry = Arc::new(Notify::new());
        let (own_token, own_retry) = (Arc::clone(&token), Arc::clone(&retry));
        let run = Run { channel, node, token: own_token, retry: own_retry, state, config, status, denied: None };
        let task = tokio::spawn(run.forever().instrument(span)).abort_handle();
        Self { config: config_seen, status: status_seen, token, retry, task }
    }

    /// The configuration in force. Empty until the control plane has sent one; changes only when something changed.
    #[must_use]
    pub fn config(&self) -> watch::Receiver<Arc<ProxyConfig>> {
        self.config.clone()
    }

    /// How the conversation stands.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Uses this token from the next stream on.
    pub fn set_token(&self, token: Option<Token>) {
        *self.token.lock() = token;
    }

    /// Tries at once, if there is no stream: what refused this proxy may know it by now.
    pub fn retry_now(&self) {
        self.retry.notify_one();
    }
}

impl Drop for XdsClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("{}", describe(.0))]
    Rpc(tonic::Status),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the control plane does not read: {OUTBOX} requests are waiting")]
    Stuck,
}

/// The status with its causes, each said once: what the connector said stands at the end of the chain.
fn describe(status: &tonic::Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

struct Run {
    channel: XdsChannel,
    node: Node,
    token: Arc<Mutex<Option<Token>>>,
    retry: Arc<Notify>,
    state: State,
    config: watch::Sender<Arc<ProxyConfig>>,
    status: watch::Sender<Status>,
    /// Since when every attempt was refused.
    denied: Option<Instant>,
}

impl Run {
    async fn forever(mut self) {
        let mut backoff = Backoff::new();
        let mut wake = self.channel.wake();
        loop {
            wake.mark_unchanged(); // what happens from here on ends the next wait, also during the attempt
            let end = self.stream(&mut backoff).await;
            let wait = backoff.fail();
            self.disconnected(&end, wait);
            self.note_denial(&end);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                Ok(()) = wake.changed() => backoff.reset(),
                () = self.retry.notified() => backoff.reset(),
            }
        }
    }

    /// Opens a stream and follows it to its end.
    async fn stream(&mut self, backoff: &mut Backoff) -> StreamEnd {
        let (sender, receiver) = mpsc::channel(OUTBOX);
        let mut outbox = Outbox { sender, node: Some(self.node.to_pb()), endpoints: BTreeSet::new() };
        let mut request = Request::new(ReceiverStream::new(receiver));
        if let Some(value) = self.token.lock().as_ref().and_then(Token::header) {
            request.metadata_mut().insert(TOKEN_HEADER, value);
        }
        if let Err(end) = self.introduce(&mut outbox) {
            return end;
        }
        let mut client = self.channel.client();
        let mut responses = match client.delta_aggregated_resources(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return StreamEnd::Rpc(status),
        };
        loop {
            let response = match responses.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return StreamEnd::Closed,
                Err(status) => return StreamEnd::Rpc(status),
            };
            backoff.reset(); // a control plane that answers is a good one
            self.denied = None;
            if let Err(end) = self.respond(response, &mut outbox) {
                return end;
            }
        }
    }

    /// The first requests of a stream: everything by wildcard but endpoints, with the versions that we have.
    fn introduce(&self, outbox: &mut Outbox) -> Result<(), StreamEnd> {
        for kind in [ResourceKind::Cluster, ResourceKind::Listener] {
            // No names in the first request of a type is the wildcard that every version of Consul understands.
            outbox.send(kind.type_url(), |request| request.initial_resource_versions = self.state.versions(kind))?;
        }
        outbox.follow_endpoints(&self.state)
    }

    fn respond(&mut self, response: DeltaDiscoveryResponse, outbox: &mut Outbox) -> Result<(), StreamEnd> {
        let (type_url, nonce) = (response.type_url.clone(), response.nonce.clone());
        let version = response.system_version_info.clone();
        let nacks: Vec<Nack> = match self.state.apply(response) {
            Ok(rejections) => rejections.iter().map(Nack::from).collect(),
            Err(error) => vec![Nack { resource: String::new(), reason: error.to_string() }],
        };
        self.publish(&version, &nonce, &nacks);
        outbox.send(type_url, |request| {
            request.response_nonce = nonce;
            request.error_detail = (!nacks.is_empty()).then(|| refusal(&nacks));
        })?;
        outbox.follow_endpoints(&self.state)
    }

    fn publish(&self, version: &str, nonce: &str, nacks: &[Nack]) {
        for nack in nacks {
            warn!(resource = nack.resource, reason = nack.reason, "refused a resource; its last good version stays");
        }
        let changed = self.put_in_force();
        let config = self.state.config();
        debug!(
            version,
            nonce,
            changed,
            listeners = config.listeners.len(),
            clusters = config.clusters.len(),
            "applied"
        );
        let next = Status {
            connected: true,
            version: if version.is_empty() { nonce } else { version }.to_owned(),
            nonce: nonce.to_owned(),
            last_nack: nacks.last().cloned().or_else(|| self.state.outstanding()),
            ready: self.state.ready(),
            disconnected_because: None,
        };
        self.set_status(next);
    }

    /// `true` if that changes anything.
    fn put_in_force(&self) -> bool {
        let config = self.state.config();
        self.config.send_if_modified(|current| {
            let changed = **current != **config;
            *current = Arc::clone(config);
            changed
        })
    }

    fn disconnected(&self, end: &StreamEnd, wait: Duration) {
        let was_connected = self.status.borrow().connected;
        if was_connected {
            info!(reason = %end, "lost the control plane; the last configuration stays in force");
        } else {
            debug!(reason = %end, retry_in = ?wait, "no control plane");
        }
        let last = self.status.borrow().clone(); // not inside the call: it would hold the lock that the call takes
        self.set_status(Status { connected: false, disconnected_because: Some(end.to_string()), ..last });
    }

    fn note_denial(&mut self, end: &StreamEnd) {
        if !matches!(end, StreamEnd::Rpc(status) if status.code() == Code::PermissionDenied) {
            self.denied = None; // not there: the last word holds
            return;
        }
        let since = *self.denied.get_or_insert_with(Instant::now);
        if since.elapsed() >= DENIED_LIMIT {
            self.state.lose_policy();
            if self.put_in_force() {
                error!(reason = %end, "the control plane does not know this proxy any more: it denies what comes in");
            }
        }
    }

    fn set_status(&self, next: Status) {
        self.status.send_if_modified(|current| {
            let changed = *current != next;
            *current = next;
            changed
        });
    }
}

/// What goes to the control plane on one stream.
struct Outbox {
    sender: mpsc::Sender<DeltaDiscoveryRequest>,
    /// Goes with the first request only.
    node: Option<envoy_types::pb::envoy::config::core::v3::Node>,
    /// Endpoint resources subscribed to on this stream.
    endpoints: BTreeSet<String>,
}

impl Outbox {
    fn send(&mut self, type_url: String, fill: impl FnOnce(&mut DeltaDiscoveryRequest)) -> Result<(), StreamEnd> {
        let mut request = DeltaDiscoveryRequest { node: self.node.take(), type_url, ..Default::default() };
        fill(&mut request);
        // Never wait: the control plane may be waiting for us to read.
        self.sender.try_send(request).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => StreamEnd::Stuck,
            mpsc::error::TrySendError::Closed(_) => StreamEnd::Closed,
        })
    }

    /// Subscribes to the endpoints that clusters need now, and ends the subscriptions that none needs.
    fn follow_endpoints(&mut self, state: &State) -> Result<(), StreamEnd> {
        let needed = state.endpoints_needed();
        let subscribe: Vec<String> = needed.difference(&self.endpoints).cloned().collect();
        let unsubscribe: Vec<String> = self.endpoints.difference(&needed).cloned().collect();
        if subscribe.is_empty() && unsubscribe.is_empty() {
            return Ok(()); // nor a first request without names, which would be a wildcard
        }
        let first = self.endpoints.is_empty();
        self.endpoints = needed;
        self.send(ResourceKind::Endpoints.type_url(), |request| {
            if first {
                request.initial_resource_versions = known(state, &subscribe);
            }
            request.resource_names_subscribe = subscribe;
            request.resource_names_unsubscribe = unsubscribe;
        })
    }
}

/// The versions of those `names` that we have.
fn known(state: &State, names: &[String]) -> HashMap<String, String> {
    let mut versions = state.versions(ResourceKind::Endpoints);
    names.iter().filter_map(|name| versions.remove_entry(name)).collect()
}

fn refusal(nacks: &[Nack]) -> RpcStatus {
    RpcStatus { code: Code::InvalidArgument as i32, message: nack_message(nacks), ..RpcStatus::default() }
}
