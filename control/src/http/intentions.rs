//! `/v1/connect/intentions`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::Body;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::Response;
use axum::routing::get;
use culvert_api::{ApiError, Intention as Wire, IntentionCheck, IntentionCreated};
use culvert_types::{Action, Intention, IntentionSubject, ServiceName};

use super::filter::INTENTION;
use super::query::{Query, ReadOptions, check_scope};
use super::reply::{Failure, Reply, decode, filtered, indexed, json, read, store_failed};
use super::{Api, Shared, view};
use crate::intentions::{Draft, IntentionError, Side, by_id, explain, matching};
use crate::state::State as MeshState;
use crate::state::blocking::jitter;
use crate::store::{Revision, Table};

/// Most names in one match.
const MAX_MATCH_NAMES: usize = 64;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/connect/intentions", get(list).post(create))
        .route("/v1/connect/intentions/exact", get(get_exact).put(put_exact).delete(delete_exact))
        .route("/v1/connect/intentions/match", get(match_names))
        .route("/v1/connect/intentions/check", get(check))
        .route("/v1/connect/intentions/{id}", get(get_by_id).put(put_by_id).delete(delete_by_id))
}

impl From<IntentionError> for Failure {
    fn from(err: IntentionError) -> Self {
        Self(match err {
            IntentionError::Update(err) => store_failed(&err),
            IntentionError::NotFound => ApiError::not_found(err),
            IntentionError::Duplicate(_) => ApiError::internal(err),
            err => ApiError::bad_request(err),
        })
    }
}

/// A name parameter: `web`, `default/web` or `default/default/web`.
fn required<'a>(query: &'a Query, name: &str) -> Result<&'a str, Failure> {
    let text = query.text(name);
    let text = text.ok_or_else(|| ApiError::bad_request(format!("required query parameter '{name}' not set")))?;
    local_name(name, text)
}

/// Drops the namespace and partition `default`; there is no other.
fn local_name<'a>(field: &str, text: &'a str) -> Result<&'a str, Failure> {
    let mut parts: Vec<&str> = text.split('/').collect();
    let name = parts.pop().unwrap_or_default();
    if parts.len() <= 2 && parts.iter().all(|part| *part == "default") {
        return Ok(name);
    }
    Err(ApiError::bad_request(format!("{field} {text:?}: there is no namespace but \"default\"")).into())
}

fn subject(field: &str, text: &str) -> Result<IntentionSubject, Failure> {
    let parsed: Result<IntentionSubject, _> = text.parse();
    parsed.map_err(|err| ApiError::bad_request(format!("{field}: {err}")).into())
}

/// What is only looked for may have a name that an earlier build took.
fn stored(field: &str, text: &str) -> Result<IntentionSubject, Failure> {
    IntentionSubject::from_stored(text).map_err(|err| ApiError::bad_request(format!("{field}: {err}")).into())
}

fn service(field: &str, text: &str) -> Result<ServiceName, Failure> {
    ServiceName::new(text).map_err(|err| ApiError::bad_request(format!("{field}: {err}")).into())
}

/// What the body says, for the pair that it or the query names.
pub(super) fn draft(body: Wire, source: &str, destination: &str) -> Result<Draft, Failure> {
    let bad = |what: String| Failure(ApiError::bad_request(what));
    let pairs = [("SourceName", &body.source_name, source), ("DestinationName", &body.destination_name, destination)];
    for (field, given, asked) in pairs {
        if !given.is_empty() && local_name(field, given)? != asked {
            return Err(bad(format!("{field} {given:?} of the body is not {asked:?} of the query")));
        }
    }
    for (field, text) in [("SourceNS", &body.source_ns), ("DestinationNS", &body.destination_ns)] {
        if !matches!(text.as_str(), "" | "default") {
            return Err(bad(format!("{field} {text:?}: Namespaces are a Consul Enterprise feature")));
        }
    }
    for (field, text) in
        [("SourcePartition", &body.source_partition), ("DestinationPartition", &body.destination_partition)]
    {
        if !matches!(text.as_str(), "" | "default") {
            return Err(bad(format!("{field} {text:?}: Partitions are a Consul Enterprise feature")));
        }
    }
    if !body.source_peer.is_empty() {
        return Err(bad("SourcePeer: cluster peering is not supported by culvert yet".to_owned()));
    }
    if !matches!(body.source_type.as_str(), "" | "consul") {
        return Err(bad(format!("SourceType must be set to 'consul', got {:?}", body.source_type)));
    }
    if !body.permissions.is_empty() {
        let what = "Permissions: L7 intentions are not supported by culvert yet; set Action to 'allow' or 'deny'";
        return Err(bad(what.to_owned()));
    }
    let action: Action = body.action.parse().map_err(|_| bad("Action must be set to 'allow' or 'deny'".to_owned()))?;
    let rule =
        Intention { source: subject("source", source)?, destination: subject("destination", destination)?, action };
    Ok(Draft { rule, description: body.description, meta: body.meta })
}

fn scope(state: &MeshState) -> Revision {
    state.index(Table::Intentions)
}

async fn list(State(api): Shared, query: Query) -> Reply {
    read(&api, &query, scope, |state, options| {
        filtered(options.filter.as_deref(), INTENTION, state.intentions().iter().map(|entry| view::intention(entry)))
    })
    .await
}

async fn get_exact(State(api): Shared, query: Query) -> Reply {
    let (source, destination) = (required(&query, "source")?, required(&query, "destination")?);
    read(&api, &query, scope, |state, _| {
        let entry = state.intention(source, destination).ok_or(IntentionError::NotFound)?;
        Ok(view::intention(entry))
    })
    .await
}

async fn put_exact(State(api): Shared, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    let (source, destination) = (required(&query, "source")?, required(&query, "destination")?);
    api.intentions.upsert(&draft(decode(&body)?, source, destination)?).await?;
    json(&api, &query, &true)
}

async fn delete_exact(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let source = stored("source", required(&query, "source")?)?;
    let destination = stored("destination", required(&query, "destination")?)?;
    api.intentions.delete(&source, &destination).await?;
    json(&api, &query, &true)
}

async fn match_names(State(api): Shared, query: Query) -> Reply {
    let bad = |what: &str| Failure(ApiError::bad_request(what));
    let side = match query.text("by") {
        None => return Err(bad("required query parameter 'by' not set")),
        Some("source") => Side::Source,
        Some("destination") => Side::Destination,
        Some(_) => return Err(bad("'by' parameter must be one of 'source' or 'destination'")),
    };
    let mut names = Vec::new();
    for text in query.all("name").filter(|text| !text.is_empty()) {
        names.push((text, stored("name", local_name("name", text)?)?));
    }
    if names.is_empty() {
        return Err(bad("required query parameter 'name' not set"));
    }
    if names.len() > MAX_MATCH_NAMES {
        return Err(bad(&format!("more than {MAX_MATCH_NAMES} names")));
    }
    read(&api, &query, scope, |state, _| {
        let list = |name: &IntentionSubject| -> Vec<Wire> {
            matching(state, side, name).map(|entry| view::intention(entry)).collect()
        };
        // By the names as they were asked, for clients that look for theirs.
        Ok(names.iter().map(|(asked, name)| (*asked, list(name))).collect::<BTreeMap<_, _>>())
    })
    .await
}

async fn check(State(api): Shared, query: Query) -> Reply {
    let source = service("source", required(&query, "source")?)?;
    let destination = service("destination", required(&query, "destination")?)?;
    if query.text("source-type").is_some_and(|kind| kind != "consul") {
        return Err(ApiError::bad_request("'source-type' parameter must be 'consul'").into());
    }
    let options = ReadOptions::parse(&query, &api)?;
    let _blocked = (options.index > 0).then(|| api.metrics.blocked());
    tokio::select! {
        () = verdict_after(&api, options.index) => {}
        // Time is up, or the agent is stopping: answer with what there is.
        () = tokio::time::sleep(options.wait + jitter(options.wait / 16)) => {}
        () = api.drain.cancelled() => {}
    }
    let (state, default, index) = verdict_inputs(&api);
    let (allowed, _) = explain(&state, &source, &destination, default);
    let mut response = json(&api, &query, &IntentionCheck { allowed })?;
    indexed(response.headers_mut(), index, &options);
    Ok(response)
}

/// Waits until a verdict may differ from that of `index`: another intention, or another default. Also for an index from the
/// future, whose reader starts anew.
async fn verdict_after(api: &Api, index: u64) {
    let (mut state, mut settings) = (api.ledger.watch(), api.settings.clone());
    while index > 0 && verdict_inputs(api).2.0 == index {
        // Ends with the agent, and then the drain answers.
        let alive = tokio::select! {
            changed = state.changed() => changed.is_ok(),
            changed = settings.changed() => changed.is_ok(),
        };
        if !alive {
            return;
        }
    }
}

/// What a verdict depends on, and its index. The default is no row of the state: its changes are counted on top of the
/// revision, so that the index grows with either.
fn verdict_inputs(api: &Api) -> (Arc<MeshState>, Action, Revision) {
    let (default, changes) = {
        let settings = api.settings.borrow();
        (settings.default_policy, api.policy_changes.load(Ordering::Relaxed))
    };
    let state = api.ledger.state();
    // Never 0, or the first change would go from what is sent for 0 to 1.
    let index = Revision(scope(&state).0.max(1) + changes);
    (state, default, index)
}

/// The deprecated way in, which `consul intention create` still takes. What is wrong with the body is 500 here, as Consul's.
async fn create(State(api): Shared, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    let created = create_from(&api, &body).await;
    json(&api, &query, &created.map_err(|Failure(err)| ApiError::internal(err.message))?)
}

async fn create_from(api: &Api, body: &[u8]) -> Result<IntentionCreated, Failure> {
    let body: Wire =
        culvert_api::decode(body).map_err(|err| ApiError::internal(format!("Failed to decode request body: {err}")))?;
    if !body.id.is_empty() {
        return Err(ApiError::internal("ID must be empty when creating a new intention").into());
    }
    let (source, destination) = (body.source_name.clone(), body.destination_name.clone());
    let (source, destination) = (local_name("SourceName", &source)?, local_name("DestinationName", &destination)?);
    Ok(IntentionCreated { id: api.intentions.create(&draft(body, source, destination)?).await? })
}

async fn get_by_id(State(api): Shared, Path(id): Path<String>, query: Query) -> Reply {
    read(&api, &query, scope, |state, _| {
        let entry = by_id(state, &id).ok_or(IntentionError::NotFound)?;
        Ok(view::intention(entry))
    })
    .await
}

async fn put_by_id(State(api): Shared, Path(id): Path<String>, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    let body: Wire = decode(&body)?;
    if !body.id.is_empty() && body.id != id {
        return Err(ApiError::bad_request("ID of the body is not that of the path").into());
    }
    let (source, destination) = (body.source_name.clone(), body.destination_name.clone());
    let (source, destination) = (local_name("SourceName", &source)?, local_name("DestinationName", &destination)?);
    api.intentions.update(&id, &draft(body, source, destination)?).await?;
    json(&api, &query, &IntentionCreated { id })
}

async fn delete_by_id(State(api): Shared, Path(id): Path<String>, query: Query) -> Result<Response<Body>, Failure> {
    check_scope(&query, &api)?;
    api.intentions.delete_by_id(&id).await?;
    json(&api, &query, &true)
}
