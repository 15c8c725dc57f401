//! `/v1/catalog`: what is known of all nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::get;
use culvert_api::ApiError;
use serde_json::{Value, json};

use super::filter::{AGENT_SERVICE, CATALOG_SERVICE, NODE};
use super::query::{Query, ReadOptions};
use super::reply::{Failure, Reply, filtered, json as reply_json, read};
use super::{Api, Shared, view};
use crate::state::rows::{Node, Service};
use crate::state::{State as MeshState, Stored};
use crate::store::{Revision, Table};

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/catalog/datacenters", get(datacenters))
        .route("/v1/catalog/nodes", get(nodes))
        .route("/v1/catalog/services", get(services))
        .route("/v1/catalog/service/{*name}", get(service))
        .route("/v1/catalog/connect/{*name}", get(connect))
        .route("/v1/catalog/node/{*node}", get(node))
        .route("/v1/catalog/node-services/{*node}", get(node_services))
}

async fn datacenters(State(api): Shared, query: Query) -> Reply {
    reply_json(&api, &query, &[api.place.datacenter.as_str()])
}

/// Does the node have all pairs of `node-meta`?
pub(super) fn has_meta(node: &Node, options: &ReadOptions) -> bool {
    options.node_meta.iter().all(|(key, value)| node.meta.get(key) == Some(value))
}

/// Does the service carry every `tag`? Tags are compared without case, as Consul does.
pub(super) fn has_tags(service: &Service, query: &Query) -> bool {
    let carries = |tag: &str| service.tags.iter().any(|own| own.eq_ignore_ascii_case(tag));
    query.all("tag").filter(|tag| !tag.is_empty()).all(carries)
}

async fn nodes(State(api): Shared, query: Query) -> Reply {
    let scope = |state: &MeshState| state.index(Table::Nodes);
    read(&api, &query, scope, |state, options| {
        let nodes = state.nodes().filter(|node| has_meta(node, options));
        filtered(options.filter.as_deref(), NODE, nodes.map(|node| view::node(node, &api.place)))
    })
    .await
}

async fn services(State(api): Shared, query: Query) -> Reply {
    let scope = |state: &MeshState| state.index(Table::Services).max(state.index(Table::Nodes));
    read(&api, &query, scope, |state, options| {
        let mut tags: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let known = instances(state, state.services(), options);
        let kept = known.map(|(node, service)| view::catalog_service(node, service, &api.place));
        for service in filtered(options.filter.as_deref(), CATALOG_SERVICE, kept)? {
            tags.entry(service.service_name).or_default().extend(service.service_tags);
        }
        Ok(tags)
    })
    .await
}

/// Services together with their nodes, where the node is as asked for.
pub(super) fn instances<'a>(
    state: &'a MeshState,
    services: impl Iterator<Item = &'a Arc<Stored<Service>>>,
    options: &ReadOptions,
) -> impl Iterator<Item = (&'a Stored<Node>, &'a Stored<Service>)> {
    services.filter_map(move |service| {
        let node = state.node(&service.node).filter(|node| has_meta(node, options))?;
        Some((&**node, &**service))
    })
}

async fn service(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    let scope = |state: &MeshState| state.service_index(&name);
    read(&api, &query, scope, |state, options| {
        let found = state.services_named(&name).filter(|service| has_tags(service, &query));
        let found = instances(state, found, options);
        let items = found.map(|(node, service)| view::catalog_service(node, service, &api.place));
        filtered(options.filter.as_deref(), CATALOG_SERVICE, items)
    })
    .await
}

async fn connect(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    let scope = |state: &MeshState| state.service_index(&name);
    read(&api, &query, scope, |state, options| {
        let found = state.connect_instances(&name).filter(|service| has_tags(service, &query));
        let found = instances(state, found, options);
        let items = found.map(|(node, service)| view::catalog_service(node, service, &api.place));
        filtered(options.filter.as_deref(), CATALOG_SERVICE, items)
    })
    .await
}

fn node_scope(state: &MeshState) -> Revision {
    state.index(Table::Nodes).max(state.index(Table::Services))
}

async fn node(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    read(&api, &query, node_scope, |state, options| {
        let Some(node) = state.node(&name) else { return Ok(Value::Null) };
        let services = state.services_of(&name).map(|service| view::agent_service(service, &api.place));
        let services = filtered(options.filter.as_deref(), AGENT_SERVICE, services)?;
        let by_id: Result<BTreeMap<_, _>, _> = services
            .into_iter()
            .map(|service| Ok::<_, serde_json::Error>((service.id.clone(), serde_json::to_value(service)?)))
            .collect();
        let by_id = by_id.map_err(|err| Failure(ApiError::internal(err)))?;
        Ok(json!({"Node": view::node(node, &api.place), "Services": by_id}))
    })
    .await
}

async fn node_services(State(api): Shared, Path(name): Path<String>, query: Query) -> Reply {
    read(&api, &query, node_scope, |state, options| {
        let services = state.services_of(&name).map(|service| view::agent_service(service, &api.place));
        let services = filtered(options.filter.as_deref(), AGENT_SERVICE, services)?;
        let node = state.node(&name).map(|node| view::node(node, &api.place));
        Ok(json!({"Node": node, "Services": services}))
    })
    .await
}
