//! `/v1/status`, and the families that are closed here: ACLs are off, there are no config entries yet.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{Response, StatusCode};
use axum::routing::{any, get};
use culvert_api::ApiError;

use super::query::{Query, check_scope};
use super::reply::{Failure, Reply, json, text};
use super::{Api, Shared};

/// Consul's server port, which `/v1/status` names. Nothing listens there: there is one server, and it is this process.
const SERVER_PORT: u16 = 8300;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/status/leader", get(leader))
        .route("/v1/status/peers", get(peers))
        .route("/v1/acl/{*rest}", any(acl_disabled))
        .route("/v1/agent/token/{which}", any(acl_disabled))
        .route("/v1/config/{kind}", get(config_list))
        .route("/v1/config/{kind}/{name}", get(config_get))
}

fn server(api: &Api) -> String {
    std::net::SocketAddr::new(api.place.advertise, SERVER_PORT).to_string()
}

async fn leader(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    json(&api, &query, &server(&api))
}

async fn peers(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    json(&api, &query, &[server(&api)])
}

async fn acl_disabled() -> Response<Body> {
    text(StatusCode::UNAUTHORIZED, "ACL support disabled")
}

/// Kinds that exist in Consul; asking for one is not an error.
const KINDS: [&str; 9] = [
    "service-defaults",
    "proxy-defaults",
    "service-router",
    "service-splitter",
    "service-resolver",
    "mesh",
    "exported-services",
    "ingress-gateway",
    "terminating-gateway",
];

fn check_kind(kind: &str) -> Result<(), Failure> {
    if KINDS.contains(&kind) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!("invalid config entry kind: {kind}")).into())
}

async fn config_list(State(api): Shared, Path(kind): Path<String>, query: Query) -> Reply {
    check_kind(&kind)?;
    super::reply::read(&api, &query, crate::state::State::revision, |_, _| Ok::<[(); 0], _>([])).await
}

/// `consul connect envoy` reads `proxy-defaults/global` and expects this 404.
async fn config_get(Path((kind, name)): Path<(String, String)>) -> Reply {
    check_kind(&kind)?;
    Err(ApiError::not_found(format!("Config entry not found for {kind:?} / {name:?}")).into())
}
