//! The HTTP API on port 8500: Consul's endpoints in Consul's exact form.
//!
//! One file per family of endpoints; [`reply`] and [`query`] hold the conventions that all share (headers, blocking,
//! filters, errors as bare text), [`server`] the connections. Handlers translate and nothing more: the rules are in
//! `catalog`, `intentions`, `checks`, `ca`. Source: Consul's HTTP API documentation and recorded traffic.

mod agent;
mod agent_check;
mod agent_connect;
mod body;
mod catalog;
mod config;
mod connect;
mod filter;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod health;
mod identity;
mod intentions;
mod query;
mod reply;
mod server;
mod status;
mod view;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{ALLOW, HOST, HeaderValue, ORIGIN, VARY};
use axum::http::{Method, Response, StatusCode, Uri};
use axum::middleware::{self, Next};
use culvert_types::Action;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::ca::Leaves;
use crate::catalog::{Catalog, Place};
use crate::checks::Checks;
use crate::config::{HttpLimits, Reloadable};
use crate::intentions::Intentions;
use crate::mesh::RequestedLeaves;
use crate::metrics::Metrics;
use crate::state::Ledger;

pub use self::server::BindError;
use self::server::Client;
pub(crate) use self::server::HttpServer;

/// What handlers need.
pub(crate) struct Api {
    pub(crate) place: Arc<Place>,
    pub(crate) node_id: String,
    pub(crate) version: &'static str,
    pub(crate) limits: HttpLimits,
    pub(crate) grpc_port: Option<u16>,
    pub(crate) ledger: Ledger,
    pub(crate) settings: watch::Receiver<Reloadable>,
    /// How often the default policy changed in this run; written while `settings` is.
    pub(crate) policy_changes: Arc<AtomicU64>,
    pub(crate) catalog: Catalog,
    pub(crate) checks: Checks,
    pub(crate) intentions: Intentions,
    pub(crate) leaves: Leaves,
    pub(crate) requested: Arc<RequestedLeaves>,
    pub(crate) metrics: Metrics,
    /// Cancelled at shutdown: blocked reads answer then.
    pub(crate) drain: CancellationToken,
}

impl Api {
    /// What holds between services that no intention speaks about.
    fn default_policy(&self) -> Action {
        self.settings.borrow().default_policy
    }
}

type Shared = State<Arc<Api>>;

/// The whole API; `routes` are the agent's own, and may not repeat what is here.
pub(crate) fn router(api: Arc<Api>, routes: Router) -> Router {
    let limit = DefaultBodyLimit::max(api.limits.max_body);
    let endpoints = Router::new()
        .merge(status::routes())
        .merge(agent::routes())
        .merge(agent_check::routes())
        .merge(agent_connect::routes())
        .merge(catalog::routes())
        .merge(config::routes())
        .merge(connect::routes())
        .merge(health::routes())
        .merge(intentions::routes())
        .with_state(Arc::clone(&api))
        .merge(routes)
        .fallback(unknown_path)
        .layer(limit);
    // A router around the router: `Allow` is added outside of the inner one's layers.
    Router::new().fallback_service(endpoints).layer(middleware::from_fn_with_state(api, conventions))
}

async fn unknown_path(uri: Uri) -> Response<Body> {
    let path = uri.path();
    if path == "/" {
        let text =
            "Consul Agent: UI disabled. To enable, set ui_config.enabled=true in the agent configuration and restart.";
        return reply::text(StatusCode::OK, text);
    }
    let message = if path.starts_with("/v1/") {
        "Invalid URL path: not a recognized HTTP API endpoint"
    } else {
        "Invalid URL path: if attempting to use the HTTP API, ensure the path starts with '/v1/'"
    };
    reply::text(StatusCode::NOT_FOUND, message)
}

/// What holds of every answer: common headers, Consul's form of 405, `OPTIONS`, a deadline for bodies.
async fn conventions(State(api): Shared, request: Request, next: Next) -> Response<Body> {
    let method = request.method().clone();
    // RFC 9112 §3.2: which one counts, others may see otherwise.
    if request.headers().get_all(HOST).iter().count() > 1 {
        return reply::text(StatusCode::BAD_REQUEST, "more than one Host header");
    }
    if let Some(host) = foreign_host(&request, &api.place.node) {
        let text = format!(
            "requests to the host name {host:?} are not accepted; use an address, localhost or the node's name"
        );
        return reply::text(StatusCode::FORBIDDEN, text);
    }
    if let Some(origin) = foreign_origin(&request) {
        return reply::text(StatusCode::FORBIDDEN, format!("requests from the web page {origin} are not accepted"));
    }
    let request = request.map(|body| body::with_deadline(body, api.limits.body_timeout));
    let mut response = next.run(request).await;
    if response.status() == StatusCode::METHOD_NOT_ALLOWED {
        response = method_not_allowed(&method, &response);
    }
    if response.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let limit = api.limits.max_body;
        let text = format!("Request body too large, max size: {limit} bytes");
        response = reply::text(StatusCode::PAYLOAD_TOO_LARGE, text);
    }
    api.metrics.request(metric_method(&method), response.status().as_u16());
    let policy = HeaderValue::from_static(api.default_policy().as_str());
    response.headers_mut().insert(reply::DEFAULT_POLICY, policy);
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    response
}

/// The name by which a client on this host asked for us, if it is none of ours. A web page can have its own name point to a
/// loopback address after it was loaded (DNS rebinding): to the browser we are then the page's own site, `Origin` and all.
fn foreign_host(request: &Request, node: &str) -> Option<String> {
    if !request.extensions().get::<Client>().is_some_and(|client| client.is_local) {
        return None;
    }
    let host = request.headers().get(HOST)?.to_str().unwrap_or("?").to_ascii_lowercase();
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) if port.is_empty() || port.starts_with(':') => address,
        Some(_) => "?",
        None => host.rsplit_once(':').map_or(host.as_str(), |(name, _port)| name),
    };
    let ours = name.is_empty()
        || name == "localhost"
        || name.ends_with(".localhost") // RFC 6761 §6.3: never anything but loopback
        || name.eq_ignore_ascii_case(node)
        || name.parse::<IpAddr>().is_ok();
    (!ours).then_some(host)
}

/// The origin of a request that a web page of another site made, if it could change something. Browsers send some of them
/// without asking first, and an agent on loopback trusts whoever reaches it.
fn foreign_origin(request: &Request) -> Option<String> {
    if matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS) {
        return None;
    }
    let text = |name| request.headers().get(name).map(|value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()));
    let (origin, host) = (text(ORIGIN)?, text(HOST).unwrap_or_default());
    let own = origin.split_once("://").is_some_and(|(_, authority)| authority.eq_ignore_ascii_case(&host));
    (!own).then(|| origin.into_owned())
}

/// `OPTIONS` says what else there is; anything else is told what it should have been.
fn method_not_allowed(method: &Method, refused: &Response<Body>) -> Response<Body> {
    let allowed = refused.headers().get(ALLOW).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let allowed: Vec<&str> = allowed.split(',').filter(|method| !matches!(*method, "" | "HEAD")).collect();
    let allowed = allowed.join(",");
    let (mut response, value) = if method == Method::OPTIONS {
        (reply::empty(), format!("OPTIONS,{allowed}"))
    } else {
        (reply::text(StatusCode::METHOD_NOT_ALLOWED, format!("method {method} not allowed")), allowed)
    };
    if let Ok(value) = HeaderValue::from_str(&value) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

/// A closed set of labels, whatever a client sends.
fn metric_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}
