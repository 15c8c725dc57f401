//! `/v1/config`: the intentions as config entries, to read. Nothing else can be configured here yet, so every other kind is
//! known and empty.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::IntoResponse as _;
use axum::routing::get;
use culvert_api::{ApiError, ServiceIntentions};

use super::query::Query;
use super::reply::{Failure, Reply, read};
use super::{Api, Shared, view};
use crate::state::State as MeshState;
use crate::state::Stored;
use crate::state::rows::IntentionEntry;
use crate::store::{Revision, Table};

/// The kind that is not empty.
const INTENTIONS: &str = "service-intentions";
/// Kinds that exist in Consul; asking for one is not an error.
const KINDS: [&str; 17] = [
    INTENTIONS,
    "service-defaults",
    "proxy-defaults",
    "service-router",
    "service-splitter",
    "service-resolver",
    "mesh",
    "exported-services",
    "ingress-gateway",
    "terminating-gateway",
    "api-gateway",
    "http-route",
    "tcp-route",
    "inline-certificate",
    "file-system-certificate",
    "jwt-provider",
    "control-plane-request-limit",
];

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new().route("/v1/config/{kind}", get(list)).route("/v1/config/{kind}/{name}", get(one))
}

fn check_kind(kind: &str) -> Result<(), Failure> {
    if KINDS.contains(&kind) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!("invalid config entry kind: {kind}")).into())
}

fn scope(state: &MeshState) -> Revision {
    state.index(Table::Intentions)
}

async fn list(State(api): Shared, Path(kind): Path<String>, query: Query) -> Reply {
    check_kind(&kind)?;
    if kind != INTENTIONS {
        return read(&api, &query, MeshState::revision, |_, _| Ok::<[(); 0], _>([])).await;
    }
    read(&api, &query, scope, |state, _| {
        let mut destinations: BTreeMap<&str, Vec<&Arc<Stored<IntentionEntry>>>> = BTreeMap::new();
        for entry in state.intentions().iter() {
            destinations.entry(entry.rule.destination.as_str()).or_default().push(entry);
        }
        let entries = destinations.iter().map(|(name, entries)| view::service_intentions(INTENTIONS, name, entries));
        Ok(entries.collect::<Vec<ServiceIntentions>>())
    })
    .await
}

/// `consul connect envoy` reads `proxy-defaults/global` and expects this 404.
async fn one(State(api): Shared, Path((kind, name)): Path<(String, String)>, query: Query) -> Reply {
    check_kind(&kind)?;
    let absent = || ApiError::not_found(format!("Config entry not found for {kind:?} / {name:?}"));
    if kind != INTENTIONS {
        return Ok(Failure(absent()).into_response());
    }
    read(&api, &query, scope, |state, _| {
        let of = |entry: &&Arc<Stored<IntentionEntry>>| entry.rule.destination.as_str() == name;
        let entries: Vec<_> = state.intentions().iter().filter(of).collect();
        if entries.is_empty() {
            Err(absent().into())
        } else {
            Ok(view::service_intentions(INTENTIONS, &name, &entries))
        }
    })
    .await
}
