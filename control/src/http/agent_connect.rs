//! `/v1/agent/connect`: leaves of services of this node, the roots to verify others with, and the verdict on a peer.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderName, HeaderValue};
use axum::routing::{get, post};
use axum::{Extension, Router};
use culvert_api::{ApiError, AuthorizeRequest, AuthorizeResponse};
use culvert_types::{ServiceIdentity, ServiceName, SpiffeId};

use super::query::{Query, ReadOptions};
use super::reply::{Failure, Reply, decode, indexed, json, read_state};
use super::server::Client;
use super::{Api, Shared, connect, view};
use crate::ca::{LeafError, SignError, check_registered};
use crate::intentions::explain;
use crate::state::blocking::jitter;
use crate::store::{Revision, Table};

const CACHE: HeaderName = HeaderName::from_static("x-cache");

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/agent/connect/ca/roots", get(roots))
        .route("/v1/agent/connect/ca/leaf/{*service}", get(leaf))
        // Consul takes POST only; py-consul sends PUT.
        .route("/v1/agent/connect/authorize", post(authorize).put(authorize))
}

async fn roots(State(api): Shared, query: Query) -> Reply {
    let options = ReadOptions::parse(&query, &api)?;
    let state = read_state(&api, &options, |state| state.index(Table::Authority)).await;
    let roots = api.leaves.authority().roots()?;
    let mut response = connect::render(&api, &query, &roots)?;
    indexed(response.headers_mut(), state.index(Table::Authority), &options);
    response.headers_mut().insert(CACHE, HeaderValue::from_static("MISS"));
    Ok(response)
}

impl From<LeafError> for Failure {
    fn from(err: LeafError) -> Self {
        let LeafError::Sign(sign) = &err else { return Self(ApiError::internal(err)) };
        Self(match &**sign {
            SignError::RateLimit => ApiError::new(429, sign),
            SignError::NotRegistered { .. } => ApiError::forbidden(sign),
            sign => ApiError::internal(sign),
        })
    }
}

/// Private keys stay on this host while nothing proves who asks.
fn keys_stay_here(client: Client) -> Result<(), Failure> {
    if client.is_local {
        return Ok(());
    }
    let text =
        "Permission denied: private keys are given to clients on this host only: there are no ACLs and no TLS yet";
    Err(ApiError::forbidden(text).into())
}

/// A leaf for a service that is registered on this node; with `index`, waits for its renewal.
async fn leaf(
    State(api): Shared,
    Extension(client): Extension<Client>,
    Path(service): Path<String>,
    query: Query,
) -> Reply {
    keys_stay_here(client)?;
    let options = ReadOptions::parse(&query, &api)?;
    let service = ServiceName::new(&service).map_err(|err| Failure(ApiError::bad_request(err)))?;
    // The authority checks it again when it signs; here it keeps strangers from starting work, and cached leaves from them.
    check_registered(&api.ledger.state(), &api.place.node, &service)
        .map_err(|err| Failure(ApiError::forbidden(err)))?;
    let mut watch = api.requested.watch(&api.leaves, &service)?;
    let mut leaf = watch.ready().await?;
    let deadline = tokio::time::Instant::now() + options.wait + jitter(options.wait / 16);
    // An index from the future is one of an earlier authority: its reader starts anew.
    while options.index > 0 && view::leaf_index(&leaf) == options.index {
        let _blocked = api.metrics.blocked();
        let renewed = tokio::time::timeout_at(deadline, watch.changed());
        match api.drain.run_until_cancelled(renewed).await {
            Some(Ok(changed)) => changed?,
            Some(Err(_)) | None => break,
        }
        leaf = watch.ready().await?;
    }
    let mut response = json(&api, &query, &view::leaf(&leaf))?;
    indexed(response.headers_mut(), Revision(view::leaf_index(&leaf)), &options);
    response.headers_mut().insert(CACHE, HeaderValue::from_static("MISS"));
    Ok(response)
}

/// Would the identity in a peer's certificate be let in? Looks at its service name only: the trust domain was checked in the
/// handshake, by whoever asks.
async fn authorize(State(api): Shared, query: Query, body: Bytes) -> Reply {
    let bad = |what: &str| Failure(ApiError::bad_request(what));
    let AuthorizeRequest { target, client_cert_uri, namespace, .. } = decode(&body)?;
    if !matches!(namespace.as_str(), "" | "default") {
        return Err(bad(&format!("Namespace {namespace:?}: Namespaces are a Consul Enterprise feature")));
    }
    if target.is_empty() {
        return Err(bad("Target service must be specified"));
    }
    let target = ServiceName::new(&target).map_err(|err| Failure(ApiError::bad_request(err)))?;
    let uri = SpiffeId::parse(&client_cert_uri).map_err(|_| bad("ClientCertURI not a valid Connect identifier"))?;
    let source = ServiceIdentity::try_from(uri).map_err(|_| bad("ClientCertURI not a valid Service identifier"))?;
    let (authorized, reason) = explain(&api.ledger.state(), &source.service, &target, api.default_policy());
    json(&api, &query, &AuthorizeResponse { authorized, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_given_to_this_host_only() {
        assert!(keys_stay_here(Client { is_local: true }).is_ok());
        let refused = keys_stay_here(Client { is_local: false }).expect_err("another host");
        assert_eq!(refused.0.status, 403);
    }
}
