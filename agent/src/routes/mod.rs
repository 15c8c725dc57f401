//! The agent's own HTTP routes below `/v1`: jobs, logs, events, status, metrics, reload and leave.
//!
//! Handlers translate between HTTP and the runner; they know no kernel and no namespaces.

mod jobs;
mod logs;
mod node;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use tokio::sync::{OnceCell, mpsc};

use crate::events::EventHub;
use crate::policy::PolicyEngine;
use crate::runner::Runner;
use crate::worker::WorkerHandle;

/// What an operator may ask of the agent itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ask {
    /// Read the configuration again.
    Reload,
    /// Stop everything, remove everything, end.
    Leave,
}

/// What the handlers reach. The HTTP server starts before the rest of the node, so the rest is filled in later.
pub(crate) struct RouteState {
    /// Connection events.
    pub(crate) hub: Arc<EventHub>,
    /// To the agent's main loop.
    pub(crate) asks: mpsc::Sender<(Ask, tokio::sync::oneshot::Sender<Result<(), String>>)>,
    /// Allocation directories are below.
    pub(crate) data_dir: PathBuf,
    /// Why there is no eBPF, if there is none.
    pub(crate) ebpf: OnceCell<Option<String>>,
    /// The node, once it is up.
    pub(crate) node: OnceCell<NodeState>,
}

/// The parts that come up after the HTTP server.
pub(crate) struct NodeState {
    /// Jobs and allocations.
    pub(crate) runner: Arc<Runner>,
    /// Kernel tables.
    pub(crate) policy: Arc<PolicyEngine>,
    /// The worker.
    pub(crate) worker: WorkerHandle,
    /// The mesh.
    pub(crate) mesh: tokio::sync::watch::Receiver<Arc<culvert_control::MeshView>>,
}

/// All routes.
pub(crate) fn router(state: Arc<RouteState>) -> Router {
    Router::new()
        .route("/v1/culvert/jobs", get(jobs::list).put(jobs::submit))
        .route("/v1/culvert/jobs/plan", post(jobs::plan).put(jobs::plan))
        .route("/v1/culvert/job/{id}", get(jobs::status).delete(jobs::stop))
        .route("/v1/culvert/allocation/{id}/logs/{task}", get(logs::logs))
        .route("/v1/culvert/observe", get(node::observe))
        .route("/v1/culvert/status", get(node::status))
        .route("/v1/culvert/metrics", get(node::metrics))
        .route("/v1/agent/reload", put(node::reload))
        .route("/v1/agent/leave", put(node::leave))
        .with_state(state)
}

/// An error as Consul answers it: plain text.
struct Failure(StatusCode, String);

#[cfg(any(test, feature = "fuzz"))]
/// Reads a submission and judges its job, as far as that needs no node.
pub(crate) fn judge(body: &[u8], node: &culvert_jobspec::NodeContext) -> Result<(), (StatusCode, String)> {
    jobs::judge(body, node).map_err(|Failure(status, text)| (status, text))
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], self.1).into_response()
    }
}

impl RouteState {
    fn node(&self) -> Result<&NodeState, Failure> {
        self.node.get().ok_or_else(|| Failure(StatusCode::SERVICE_UNAVAILABLE, "the agent is starting".into()))
    }
}
