//! `/v1/status`, and the family that is closed here: ACLs are off.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use axum::routing::{any, get};

use super::query::{Query, check_scope};
use super::reply::{Reply, json, text};
use super::{Api, Shared};

/// Consul's server port, which `/v1/status` names. Nothing listens there: there is one server, and it is this process.
const SERVER_PORT: u16 = 8300;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/status/leader", get(leader))
        .route("/v1/status/peers", get(peers))
        .route("/v1/acl/{*rest}", any(acl_disabled))
        .route("/v1/agent/token/{which}", any(acl_disabled))
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
