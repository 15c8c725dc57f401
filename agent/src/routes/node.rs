//! Events, status, metrics, reload, leave.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use culvert_api::{AgentStatus, EbpfStatus, EventRecord, NackStatus, ProxyStatus, WorkerStatus};
use culvert_types::{ConnectionEvent, Verdict};
use futures::StreamExt as _;
use tokio::sync::oneshot;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use super::{Ask, Failure, RouteState};

/// `GET /v1/culvert/observe?denied=`: one JSON object per line, from now on.
pub(super) async fn observe(
    State(state): State<Arc<RouteState>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Response, Failure> {
    let only_denied = match query.get("denied").map(String::as_str) {
        None | Some("false") => false,
        Some("" | "true") => true,
        Some(other) => return Err(Failure(StatusCode::BAD_REQUEST, format!("Invalid value for denied: {other:?}"))),
    };
    let wanted = move |event: &ConnectionEvent| !only_denied || event.verdict == Verdict::Deny;
    let lines = BroadcastStream::new(state.hub.observe()).filter_map(move |received| {
        let record = match received {
            Ok(event) => wanted(&event).then(|| EventRecord::from(&*event)),
            Err(BroadcastStreamRecvError::Lagged(count)) => Some(EventRecord::lost(count)),
        };
        async move { record.and_then(|record| line(&record)) }
    });
    let lines = lines.map(Ok::<_, std::io::Error>);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

fn line(record: &EventRecord) -> Option<Bytes> {
    let mut text = serde_json::to_vec(record).ok()?;
    text.push(b'\n');
    Some(text.into())
}

/// `GET /v1/culvert/status`
pub(super) async fn status(State(state): State<Arc<RouteState>>) -> Result<Json<AgentStatus>, Failure> {
    let node = state.node()?;
    let view = node.mesh.borrow().clone();
    let worker = node.worker.view().borrow().clone();
    let failures = worker.proxy_failures;
    let proxies = worker.proxies.into_values().map(|proxy| ProxyStatus {
        failures: failures.get(&proxy.proxy).copied().unwrap_or_default(),
        id: proxy.proxy,
        ready: proxy.ready,
        xds_version: proxy.xds_version,
        nack: proxy.nack.map(|nack| NackStatus { resource: nack.resource, reason: nack.reason }),
        certificate_not_after: proxy
            .certificate_not_after
            .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
            .map(Into::into),
    });
    Ok(Json(AgentStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: view.node.clone(),
        datacenter: view.datacenter.to_string(),
        trust_domain: view.trust_domain.to_string(),
        encryption: view.encryption.to_string(),
        default_policy: view.default_action.to_string(),
        ebpf: EbpfStatus {
            active: node.policy.active().await,
            reason: state.ebpf.get().cloned().flatten(),
            routes: node.policy.routes().await,
        },
        worker: WorkerStatus { pid: worker.pid, restarts: worker.restarts, proxies: proxies.collect() },
        jobs: node.runner.jobs().len(),
        allocations: node.runner.views().len(),
    }))
}

/// `GET /v1/culvert/metrics`: OpenMetrics text.
pub(super) async fn metrics(State(state): State<Arc<RouteState>>) -> Result<Response, Failure> {
    let text = state.hub.exposition();
    let text = text.map_err(|error| Failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// `PUT /v1/agent/reload`
pub(super) async fn reload(State(state): State<Arc<RouteState>>) -> Result<(), Failure> {
    ask(&state, Ask::Reload).await
}

/// `PUT /v1/agent/leave`
pub(super) async fn leave(State(state): State<Arc<RouteState>>) -> Result<(), Failure> {
    ask(&state, Ask::Leave).await
}

async fn ask(state: &RouteState, ask: Ask) -> Result<(), Failure> {
    let failed = |reason: String| Failure(StatusCode::INTERNAL_SERVER_ERROR, reason);
    let (done, answer) = oneshot::channel();
    state.asks.send((ask, done)).await.map_err(|_| failed("the agent is ending".into()))?;
    answer.await.map_err(|_| failed("the agent is ending".into()))?.map_err(failed)
}
