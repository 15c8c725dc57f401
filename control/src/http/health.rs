//! `/v1/health`: instances with their checks, and checks by whom they are about.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::HeaderValue;
use axum::routing::get;
use culvert_api::{ApiError, ServiceEntry};
use culvert_types::HealthStatus;

use super::catalog::{has_meta, has_tags, instances};
use super::filter::{HEALTH_CHECK, SERVICE_ENTRY};
use super::query::{Query, ReadOptions, bool_from_go};
use super::reply::{Failure, QUERY_BACKEND, Reply, filtered, read};
use super::{Api, Shared, view};
use crate::state::rows::{Check, Service};
use crate::state::{State as MeshState, Stored};
use crate::store::Table;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/health/service/{*name}", get(service))
        .route("/v1/health/connect/{*name}", get(connect))
        .route("/v1/health/checks/{*name}", get(checks))
        .route("/v1/health/node/{*node}", get(node))
        .route("/v1/health/state/{state}", get(state))
}

/// `passing`: absent is false, bare is true.
fn passing(query: &Query) -> Result<bool, Failure> {
    match query.get("passing") {
        None => Ok(false),
        Some("") => Ok(true),
        Some(text) => bool_from_go(text).ok_or_else(|| ApiError::bad_request("Invalid value for ?passing").into()),
    }
}

/// The entries of `services`; with `passing`, only those all of whose checks pass.
fn entries<'a>(
    api: &Api,
    query: &Query,
    state: &'a MeshState,
    services: impl Iterator<Item = &'a Arc<Stored<Service>>>,
    options: &ReadOptions,
) -> Result<Vec<ServiceEntry>, Failure> {
    let only_passing = passing(query)?;
    let tagged = services.filter(|service| has_tags(service, query));
    let found = instances(state, tagged, options)
        .filter(|(_, service)| !only_passing || state.health(&service.node, &service.id) == HealthStatus::Passing)
        .map(|(node, service)| view::service_entry(state, node, service, &api.place));
    filtered(options.filter.as_deref(), SERVICE_ENTRY, found)
}

async fn service(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    let scope = |state: &MeshState| state.service_index(&name);
    let answer =
        read(&api, &query, scope, |state, options| entries(&api, &query, state, state.services_named(&name), options));
    Ok(blocking_backend(answer.await?))
}

async fn connect(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    let scope = |state: &MeshState| state.service_index(&name);
    let answer = read(&api, &query, scope, |state, options| {
        entries(&api, &query, state, state.connect_instances(&name), options)
    });
    Ok(blocking_backend(answer.await?))
}

fn blocking_backend<B>(mut response: axum::http::Response<B>) -> axum::http::Response<B> {
    response.headers_mut().insert(QUERY_BACKEND, HeaderValue::from_static("blocking-query"));
    response
}

/// Checks on nodes that are as asked for.
fn rendered<'a>(
    state: &'a MeshState,
    checks: impl Iterator<Item = &'a Arc<Stored<Check>>>,
    options: &ReadOptions,
) -> Result<Vec<culvert_api::HealthCheck>, Failure> {
    let on_node = |check: &&Arc<Stored<Check>>| state.node(&check.node).is_some_and(|node| has_meta(node, options));
    filtered(
        options.filter.as_deref(),
        HEALTH_CHECK,
        checks.filter(on_node).map(|check| view::health_check(check, None)),
    )
}

async fn checks(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    let scope = |state: &MeshState| state.service_index(&name);
    read(&api, &query, scope, |state, options| {
        let checks = state.services_named(&name).flat_map(|service| state.checks_of(&service.node, &service.id));
        rendered(state, checks, options)
    })
    .await
}

async fn node(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    let scope = |state: &MeshState| state.index(Table::Checks).max(state.index(Table::Nodes));
    read(&api, &query, scope, |state, options| rendered(state, state.checks_on(&name), options)).await
}

async fn state(State(api): Shared, Path(wanted): Path<String>, query: Query) -> Reply {
    let wanted: Option<HealthStatus> = match wanted.as_str() {
        "any" => None,
        text => Some(text.parse().map_err(|_| ApiError::bad_request(format!("Invalid check state {text:?}")))?),
    };
    let scope = |state: &MeshState| state.index(Table::Checks).max(state.index(Table::Nodes));
    read(&api, &query, scope, |state, options| {
        let checks = state.checks().filter(|check| wanted.is_none_or(|wanted| check.status == wanted));
        rendered(state, checks, options)
    })
    .await
}
