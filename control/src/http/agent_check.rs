//! `/v1/agent/check…`: checks of this node, and clients that report for them.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::routing::{get, put};
use culvert_api::{ApiError, CheckDefinition, CheckUpdate, HealthCheck};
use culvert_types::HealthStatus;

use super::filter::HEALTH_CHECK;
use super::query::{Query, check_scope};
use super::reply::{Failure, Reply, decode, empty, filtered, json, store_failed};
use super::{Api, Shared, view};
use crate::catalog::{CheckError, UnknownCheck};
use crate::checks::UpdateTtlError;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/agent/checks", get(list))
        .route("/v1/agent/check/register", put(register))
        .route("/v1/agent/check/deregister/{*id}", put(deregister))
        .route("/v1/agent/check/update/{*id}", put(update))
        .route("/v1/agent/check/pass/{*id}", put(pass))
        .route("/v1/agent/check/warn/{*id}", put(warn))
        .route("/v1/agent/check/fail/{*id}", put(fail))
}

impl From<CheckError> for Failure {
    fn from(err: CheckError) -> Self {
        Self(match err {
            CheckError::Update(err) => store_failed(&err),
            CheckError::UnknownService(_) => ApiError::not_found(err),
            err => ApiError::bad_request(err),
        })
    }
}

impl From<UnknownCheck> for Failure {
    fn from(err: UnknownCheck) -> Self {
        Self(match err {
            UnknownCheck::Unknown(_) => ApiError::not_found(err),
            UnknownCheck::Update(err) => store_failed(&err),
        })
    }
}

impl From<UpdateTtlError> for Failure {
    fn from(err: UpdateTtlError) -> Self {
        Self(match err {
            UpdateTtlError::Unknown(_) => ApiError::not_found(err),
            UpdateTtlError::NotTtl(_) => ApiError::internal(err),
            UpdateTtlError::Update(err) => store_failed(&err),
        })
    }
}

async fn list(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let state = api.ledger.state();
    // Node-level checks of the agent itself are the catalog's, not the agent's: Consul does not list serfHealth here.
    let own = state.checks_on(&api.place.node).filter(|check| check.id != "serfHealth");
    let items = own.map(|check| view::health_check(check, api.checks.output(&check.id)));
    let kept: Vec<HealthCheck> = filtered(query.text("filter"), HEALTH_CHECK, items)?;
    let by_id: serde_json::Map<_, _> = kept
        .into_iter()
        .map(|check| Ok((check.check_id.clone(), serde_json::to_value(check)?)))
        .collect::<Result<_, serde_json::Error>>()
        .map_err(ApiError::internal)?;
    json(&api, &query, &by_id)
}

async fn register(State(api): Shared, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    api.catalog.register_check(decode::<CheckDefinition>(&body)?).await?;
    Ok(empty())
}

async fn deregister(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    check_scope(&query, &api)?;
    api.catalog.deregister_check(&id).await?;
    Ok(empty())
}

async fn update(State(api): Shared, Path(id): Path<String>, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    let (status, output) = update_of(&body)?;
    api.checks.update_ttl(&id, status, output).await?;
    Ok(empty())
}

/// What the body of an update says: the status and the output.
pub(super) fn update_of(body: &[u8]) -> Result<(HealthStatus, String), Failure> {
    let CheckUpdate { status, output } = decode(body)?;
    let status = status.parse().map_err(|_| ApiError::bad_request(format!("Invalid check status: '{status}'")))?;
    Ok((status, output))
}

async fn report(api: &Api, id: &str, query: &Query, status: HealthStatus) -> Reply {
    check_scope(query, api)?;
    api.checks.update_ttl(id, status, query.get("note").unwrap_or_default().to_owned()).await?;
    Ok(empty())
}

async fn pass(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    report(&api, &id, &query, HealthStatus::Passing).await
}

async fn warn(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    report(&api, &id, &query, HealthStatus::Warning).await
}

async fn fail(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    report(&api, &id, &query, HealthStatus::Critical).await
}
