//! `/v1/agent`: this node, its services, their health.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::{ACCEPT, HeaderMap};
use axum::http::{HeaderValue, Response, StatusCode};
use axum::routing::{get, put};
use culvert_api::{AgentHealth, AgentService, ApiError, ServiceRegistration};
use culvert_types::{HealthStatus, parse_go_duration};

use super::filter::AGENT_SERVICE;
use super::query::{Query, bool_from_go, check_scope};
use super::reply::{CONTENT_HASH, Failure, REASON, Reply, empty, filtered, json, store_failed, text};
use super::{Api, Shared, identity, view};
use crate::catalog::{RegisterError, UnknownService};
use crate::state::blocking::{DEFAULT_WAIT, MAX_WAIT};
use crate::state::rows::Service;
use crate::state::{State as MeshState, Stored};

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/agent/self", get(agent_self))
        .route("/v1/agent/version", get(version))
        .route("/v1/agent/members", get(members))
        .route("/v1/agent/maintenance", put(node_maintenance))
        .route("/v1/agent/services", get(services))
        .route("/v1/agent/service/{*id}", get(service))
        .route("/v1/agent/service/register", put(register))
        .route("/v1/agent/service/deregister/{*id}", put(deregister))
        .route("/v1/agent/service/maintenance/{*id}", put(maintenance))
        .route("/v1/agent/health/service/id/{*id}", get(health_by_id))
        .route("/v1/agent/health/service/name/{*name}", get(health_by_name))
}

impl From<RegisterError> for Failure {
    fn from(err: RegisterError) -> Self {
        Self(match err {
            RegisterError::Update(err) => store_failed(&err),
            RegisterError::NoPortAssignment | RegisterError::NoPortLeft(..) => ApiError::internal(err),
            err => ApiError::bad_request(err),
        })
    }
}

impl From<UnknownService> for Failure {
    fn from(err: UnknownService) -> Self {
        Self(match err {
            UnknownService::Unknown(_) => ApiError::not_found(err),
            UnknownService::Update(err) => store_failed(&err),
        })
    }
}

async fn agent_self(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    json(&api, &query, &identity::agent_self(&api))
}

async fn version(State(api): Shared, query: Query) -> Reply {
    json(&api, &query, &identity::version(&api))
}

async fn members(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    if query.text("filter").is_some() {
        return Err(ApiError::internal("filter is not supported by culvert on this endpoint").into());
    }
    if query.has("wan") {
        // One datacenter: the servers of the wide area are those of this one.
        let member = culvert_api::Member {
            name: format!("{}.{}", api.place.node, api.place.datacenter),
            ..identity::member(&api)
        };
        return json(&api, &query, &[member]);
    }
    json(&api, &query, &[identity::member(&api)])
}

async fn services(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let state = api.ledger.state();
    let items = state.services_of(&api.place.node).map(|service| view::local_service(service, &api.place));
    let kept: Vec<AgentService> = filtered(query.text("filter"), AGENT_SERVICE, items)?;
    let by_id: serde_json::Map<_, _> = kept
        .into_iter()
        .map(|service| Ok((service.id.clone(), serde_json::to_value(service)?)))
        .collect::<Result<_, serde_json::Error>>()
        .map_err(ApiError::internal)?;
    json(&api, &query, &by_id)
}

/// One service with its hash; with `hash`, waits until it is another one.
async fn service(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let wait = query.text("wait").map_or(Ok(DEFAULT_WAIT), parse_go_duration);
    let wait = wait.map_err(|_| ApiError::bad_request("Invalid wait time"))?;
    let known = query.text("hash").unwrap_or_default().to_owned();
    let render = |state: &MeshState| {
        let service = state.service(&api.place.node, &id)?;
        Some(view::hashed_service(service, &api.place))
    };
    let mut states = api.ledger.watch();
    let changed = |state: &Arc<MeshState>| render(state).is_none_or(|(_, hash)| hash != known);
    if !known.is_empty() {
        let _blocked = api.metrics.blocked();
        let wait = if wait.is_zero() { DEFAULT_WAIT } else { wait.min(MAX_WAIT) };
        // The end of the wait is no error: the answer then has the hash that the client knows.
        let other = tokio::time::timeout(wait, states.wait_for(changed));
        if let Some(Ok(Err(err))) = api.drain.run_until_cancelled(other).await {
            tracing::debug!(%err, "stopped while a client waited");
        }
    }
    let (service, hash) =
        render(&api.ledger.state()).ok_or_else(|| ApiError::not_found(format!("unknown service ID: {id}")))?;
    let mut response = json(&api, &query, &service)?;
    let hash = HeaderValue::from_str(&hash).map_err(ApiError::internal)?;
    response.headers_mut().insert(CONTENT_HASH, hash);
    Ok(response)
}

async fn register(State(api): Shared, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    let replace = query.flag("replace-existing-checks")?;
    let body = ServiceRegistration::decode(&body).map_err(|err| Failure(err.into()))?;
    api.catalog.register_service(body, replace).await?;
    Ok(empty())
}

async fn deregister(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    check_scope(&query, &api)?;
    api.catalog.deregister_service(&id).await?;
    Ok(empty())
}

fn enable(query: &Query) -> Result<bool, Failure> {
    let text = query.text("enable").ok_or_else(|| ApiError::bad_request("Missing value for enable"))?;
    let enable = bool_from_go(text);
    Ok(enable.ok_or_else(|| ApiError::bad_request(format!("Invalid value for enable: {text:?}")))?)
}

async fn maintenance(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let reason = query.get("reason").unwrap_or_default();
    api.catalog.service_maintenance(&id, enable(&query)?, reason).await?;
    Ok(empty())
}

async fn node_maintenance(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let reason = query.get("reason").unwrap_or_default();
    api.catalog.node_maintenance(enable(&query)?, reason).await.map_err(|err| Failure(store_failed(&err)))?;
    Ok(empty())
}

/// Consul's word and code for a status; maintenance is a kind of critical.
fn verdict(state: &MeshState, service: &Service) -> (&'static str, StatusCode) {
    let own = state.checks_of(&service.node, &service.id).chain(state.checks_of(&service.node, ""));
    if own.into_iter().any(|check| check.id.starts_with("_service_maintenance:") || check.id == "_node_maintenance") {
        return ("maintenance", StatusCode::SERVICE_UNAVAILABLE);
    }
    match state.health(&service.node, &service.id) {
        HealthStatus::Passing => ("passing", StatusCode::OK),
        HealthStatus::Warning => ("warning", StatusCode::TOO_MANY_REQUESTS),
        HealthStatus::Critical => ("critical", StatusCode::SERVICE_UNAVAILABLE),
    }
}

fn agent_health(api: &Api, state: &MeshState, service: &Stored<Service>, status: &str) -> AgentHealth {
    let checks = state.checks_of(&service.node, &service.id).chain(state.checks_of(&service.node, ""));
    AgentHealth {
        aggregated_status: status.to_owned(),
        service: view::local_service(service, &api.place),
        checks: checks.map(|check| view::health_check(check, api.checks.output(&check.id))).collect(),
    }
}

fn wants_text(query: &Query, headers: &HeaderMap) -> bool {
    let accepts = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    query.text("format") == Some("text") || accepts == "text/plain"
}

async fn health_by_id(State(api): Shared, Path(id): Path<String>, query: Query, headers: HeaderMap) -> Reply {
    check_scope(&query, &api)?;
    let state = api.ledger.state();
    let Some(service) = state.service(&api.place.node, &id) else {
        let reason = format!("ServiceId {id} not found");
        return Ok(with_reason(text(StatusCode::NOT_FOUND, reason.clone()), &reason));
    };
    let (status, code) = verdict(&state, service);
    let mut response = if wants_text(&query, &headers) {
        text(code, status)
    } else {
        json(&api, &query, &agent_health(&api, &state, service, status))?
    };
    *response.status_mut() = code;
    Ok(with_reason(response, status))
}

async fn health_by_name(State(api): Shared, Path(name): Path<String>, query: Query, headers: HeaderMap) -> Reply {
    check_scope(&query, &api)?;
    let state = api.ledger.state();
    let own = state.services_named(&name).filter(|service| service.node == api.place.node);
    let healths: Vec<_> = own.map(|service| (service, verdict(&state, service))).collect();
    let order = BTreeMap::from([("passing", 0), ("warning", 1), ("critical", 2), ("maintenance", 3)]);
    let Some((_, (status, code))) = healths.iter().max_by_key(|(_, (status, _))| order[status]) else {
        let reason = format!("ServiceName {name} Not Found");
        let mut response = if wants_text(&query, &headers) {
            text(StatusCode::NOT_FOUND, reason.clone())
        } else {
            json(&api, &query, &[(); 0])?
        };
        *response.status_mut() = StatusCode::NOT_FOUND;
        return Ok(with_reason(response, &reason));
    };
    let mut response = if wants_text(&query, &headers) {
        text(*code, *status)
    } else {
        let all: Vec<_> =
            healths.iter().map(|(service, (status, _))| agent_health(&api, &state, service, status)).collect();
        json(&api, &query, &all)?
    };
    *response.status_mut() = *code;
    Ok(with_reason(response, status))
}

fn with_reason(mut response: Response<Body>, reason: &str) -> Response<Body> {
    if let Ok(value) = HeaderValue::from_str(reason) {
        response.headers_mut().insert(REASON, value);
    }
    response
}
