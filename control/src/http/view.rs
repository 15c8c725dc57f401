//! Rows as the API prints them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use culvert_api as api;
use culvert_types::format_go_duration;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::ca::{Configuration, Leaf, Roots};
use crate::catalog::Place;
use crate::state::rows::{Check, IntentionEntry, Node, Probe, Proxy, Service, ServiceKind, TaggedAddress, Upstream};
use crate::state::{State, Stored};

/// A service as catalog and health endpoints print it.
pub(super) fn agent_service(service: &Stored<Service>, place: &Place) -> api::AgentService {
    api::AgentService {
        create_index: service.created.0,
        modify_index: service.modified.0,
        ..local_service(service, place)
    }
}

/// A service as the agent's own endpoints print it: without indexes, which a re-registration may move.
pub(super) fn local_service(service: &Service, place: &Place) -> api::AgentService {
    let proxy = service.proxy.as_ref().map(proxy);
    api::AgentService {
        kind: kind(service).to_owned(),
        id: service.id.clone(),
        service: service.name.clone(),
        tags: service.tags.clone(),
        meta: service.meta.clone(),
        port: service.port,
        address: service.address.clone(),
        tagged_addresses: tagged_addresses(service),
        weights: weights(service),
        enable_tag_override: service.enable_tag_override,
        proxy,
        connect: service.connect_native.then(native),
        datacenter: place.datacenter.to_string(),
        ..api::AgentService::default()
    }
}

/// A service of the agent with the hash of everything in it.
pub(super) fn hashed_service(service: &Service, place: &Place) -> (api::AgentService, String) {
    let body = local_service(service, place);
    let hash = hash(&body);
    (api::AgentService { content_hash: hash.clone(), ..body }, hash)
}

/// 16 hex digits that differ when what is printed differs.
fn hash<T: serde::Serialize>(body: &T) -> String {
    // These bodies have text keys only; an empty text would hash too.
    let json = serde_json::to_vec(body).unwrap_or_default();
    let digest = Sha256::digest(&json);
    digest[..8].iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn kind(service: &Service) -> &'static str {
    match service.kind {
        ServiceKind::Typical => "",
        ServiceKind::ConnectProxy => "connect-proxy",
    }
}

fn native() -> api::Connect {
    api::Connect { native: true, sidecar_service: None }
}

fn weights(service: &Service) -> api::Weights {
    api::Weights { passing: service.weights.passing.into(), warning: service.weights.warning.into() }
}

/// What was registered, and by Consul's rule the service's own IP address as the node's and the world's.
fn tagged_addresses(service: &Service) -> BTreeMap<String, api::ServiceAddress> {
    let wire = |at: &TaggedAddress| api::ServiceAddress { address: at.address.clone(), port: at.port };
    let mut addresses: BTreeMap<_, _> =
        service.tagged_addresses.iter().map(|(tag, at)| (tag.clone(), wire(at))).collect();
    let tags = match service.address.parse() {
        Ok(IpAddr::V4(_)) => ["lan_ipv4", "wan_ipv4"],
        Ok(IpAddr::V6(_)) => ["lan_ipv6", "wan_ipv6"],
        Err(_) => return addresses,
    };
    for tag in tags {
        let own = || api::ServiceAddress { address: service.address.clone(), port: service.port };
        addresses.entry(tag.to_owned()).or_insert_with(own);
    }
    addresses
}

fn proxy(proxy: &Proxy) -> api::Proxy {
    api::Proxy {
        destination_service_name: proxy.destination_service_name.clone(),
        destination_service_id: proxy.destination_service_id.clone(),
        local_service_address: proxy.local_service_address.clone(),
        local_service_port: proxy.local_service_port,
        mode: proxy.mode.clone(),
        config: proxy.config.clone(),
        upstreams: proxy.upstreams.iter().map(upstream).collect(),
        mesh_gateway: api::MeshGateway { mode: proxy.mesh_gateway.clone() },
        mutual_tls_mode: proxy.mutual_tls_mode.clone(),
        ..api::Proxy::default()
    }
}

/// As it was sent: clients compare every field.
fn upstream(upstream: &Upstream) -> api::Upstream {
    api::Upstream {
        destination_type: upstream.destination_type.clone(),
        destination_namespace: upstream.destination_namespace.clone(),
        destination_partition: upstream.destination_partition.clone(),
        destination_name: upstream.destination_name.clone(),
        datacenter: upstream.datacenter.clone(),
        local_bind_address: upstream.local_bind_address.clone(),
        local_bind_port: upstream.local_bind_port,
        config: upstream.config.clone(),
        mesh_gateway: api::MeshGateway { mode: upstream.mesh_gateway.clone() },
        ..api::Upstream::default()
    }
}

/// A node.
pub(super) fn node(node: &Stored<Node>, place: &Place) -> api::Node {
    api::Node {
        id: node.id.clone(),
        node: node.name.clone(),
        address: node.address.to_string(),
        datacenter: place.datacenter.to_string(),
        tagged_addresses: node_addresses(node),
        meta: node.meta.clone(),
        create_index: node.created.0,
        modify_index: node.modified.0,
    }
}

fn node_addresses(node: &Node) -> BTreeMap<String, String> {
    let tags = match node.address {
        IpAddr::V4(_) => ["lan", "lan_ipv4", "wan", "wan_ipv4"],
        IpAddr::V6(_) => ["lan", "lan_ipv6", "wan", "wan_ipv6"],
    };
    tags.into_iter().map(|tag| (tag.to_owned(), node.address.to_string())).collect()
}

/// A service with its node, flat.
pub(super) fn catalog_service(node: &Stored<Node>, service: &Stored<Service>, place: &Place) -> api::CatalogService {
    api::CatalogService {
        id: node.id.clone(),
        node: node.name.clone(),
        address: node.address.to_string(),
        datacenter: place.datacenter.to_string(),
        tagged_addresses: node_addresses(node),
        node_meta: node.meta.clone(),
        service_kind: kind(service).to_owned(),
        service_id: service.id.clone(),
        service_name: service.name.clone(),
        service_tags: service.tags.clone(),
        service_address: service.address.clone(),
        service_tagged_addresses: tagged_addresses(service),
        service_weights: weights(service),
        service_meta: service.meta.clone(),
        service_port: service.port,
        service_socket_path: String::new(),
        service_enable_tag_override: service.enable_tag_override,
        service_proxy: service.proxy.as_ref().map(proxy).unwrap_or_default(),
        service_connect: if service.connect_native { native() } else { api::Connect::default() },
        create_index: service.created.0,
        modify_index: service.modified.0,
    }
}

/// A service with its node and all checks that speak about it.
pub(super) fn service_entry(
    state: &State,
    at: &Stored<Node>,
    service: &Stored<Service>,
    place: &Place,
) -> api::ServiceEntry {
    let checks = state.checks_of(&service.node, "").chain(state.checks_of(&service.node, &service.id));
    api::ServiceEntry {
        node: node(at, place),
        service: agent_service(service, place),
        checks: checks.map(|check| health_check(check, None)).collect(),
    }
}

/// A check; `output` is newer than the row's.
pub(super) fn health_check(check: &Stored<Check>, output: Option<String>) -> api::HealthCheck {
    let definition = &check.definition;
    let duration =
        |duration: std::time::Duration| if duration.is_zero() { String::new() } else { format_go_duration(duration) };
    let polled = matches!(definition.probe, Probe::Tcp { .. } | Probe::Http { .. });
    let timeout = if polled { definition.timeout } else { std::time::Duration::ZERO };
    let mut wire = api::HealthCheckDefinition {
        interval: definition.interval.into(),
        timeout: timeout.into(),
        deregister_critical_service_after: definition.deregister_critical_service_after.into(),
        ..api::HealthCheckDefinition::default()
    };
    match &definition.probe {
        Probe::Tcp { address } => wire.tcp.clone_from(address),
        // Without the header: it may hold a secret.
        Probe::Http { url, method, .. } => (wire.http, wire.method) = (url.clone(), method.clone()),
        Probe::Fixed | Probe::Ttl(_) | Probe::Alias { .. } => {}
    }
    api::HealthCheck {
        node: check.node.clone(),
        check_id: check.id.clone(),
        name: check.name.clone(),
        status: check.status.to_string(),
        notes: check.notes.clone(),
        output: output.unwrap_or_else(|| check.output.clone()),
        service_id: check.service_id.clone(),
        service_name: check.service_name.clone(),
        service_tags: check.service_tags.clone(),
        check_type: definition.probe.kind().to_owned(),
        interval: duration(definition.interval),
        timeout: duration(timeout),
        exposed_port: 0,
        definition: wire,
        create_index: check.created.0,
        modify_index: check.modified.0,
    }
}

/// An intention.
pub(super) fn intention(entry: &Stored<IntentionEntry>) -> api::Intention {
    let body = api::Intention {
        id: entry.id.clone().unwrap_or_default(),
        description: entry.description.clone(),
        source_ns: "default".to_owned(),
        source_name: entry.rule.source.to_string(),
        destination_ns: "default".to_owned(),
        destination_name: entry.rule.destination.to_string(),
        source_type: "consul".to_owned(),
        action: entry.rule.action.to_string(),
        meta: entry.meta.clone(),
        precedence: entry.rule.precedence().0,
        created_at: entry.created_at.into(),
        updated_at: entry.updated_at.into(),
        ..api::Intention::default()
    };
    let hash = Sha256::digest(serde_json::to_vec(&body).unwrap_or_default());
    let hash = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, hash);
    api::Intention { hash, create_index: entry.created.0, modify_index: entry.modified.0, ..body }
}

/// The intentions towards one destination, at least one, in the order in which they are tried.
pub(super) fn service_intentions(
    kind: &str,
    destination: &str,
    entries: &[&Arc<Stored<IntentionEntry>>],
) -> api::ServiceIntentions {
    let source = |entry: &&Arc<Stored<IntentionEntry>>| {
        let legacy = entry.id.is_some();
        api::SourceIntention {
            name: entry.rule.source.to_string(),
            action: entry.rule.action.to_string(),
            precedence: entry.rule.precedence().0,
            r#type: "consul".to_owned(),
            description: entry.description.clone(),
            legacy_id: entry.id.clone().unwrap_or_default(),
            legacy_meta: entry.meta.clone(),
            legacy_create_time: legacy.then(|| entry.created_at.into()),
            legacy_update_time: legacy.then(|| entry.updated_at.into()),
        }
    };
    api::ServiceIntentions {
        kind: kind.to_owned(),
        name: destination.to_owned(),
        sources: entries.iter().map(source).collect(),
        create_index: entries.iter().map(|entry| entry.created.0).min().unwrap_or_default(),
        modify_index: entries.iter().map(|entry| entry.modified.0).max().unwrap_or_default(),
    }
}

/// All trusted roots.
pub(super) fn roots(roots: &Roots) -> api::CaRoots {
    let root = |root: &crate::ca::Root| api::CaRoot {
        id: root.id.clone(),
        name: root.name.clone(),
        serial_number: root.serial,
        signing_key_id: root.signing_key_id.clone(),
        external_trust_domain: roots.trust_domain.as_str().trim_end_matches(".consul").to_owned(),
        not_before: root.not_before.into(),
        not_after: root.not_after.into(),
        root_cert: root.certificate.clone(),
        intermediate_certs: (!root.intermediates.is_empty()).then(|| root.intermediates.clone()),
        active: root.active,
        private_key_type: "ec".to_owned(),
        private_key_bits: 256,
        create_index: root.created.0,
        modify_index: root.modified.0,
    };
    api::CaRoots {
        active_root_id: roots.active_id.clone(),
        trust_domain: roots.trust_domain.to_string(),
        roots: roots.roots.iter().map(root).collect(),
    }
}

/// The settings of the authority.
pub(super) fn ca_configuration(configuration: &Configuration) -> api::CaConfiguration {
    let settings = &configuration.settings;
    let mut config = Map::new();
    config.insert("LeafCertTTL".to_owned(), format_go_duration(settings.leaf_ttl).into());
    config.insert("IntermediateCertTTL".to_owned(), format_go_duration(settings.intermediate_ttl).into());
    config.insert("RootCertTTL".to_owned(), format_go_duration(settings.root_ttl).into());
    config.insert("CSRMaxPerSecond".to_owned(), settings.csr_max_per_second.into());
    config.insert("PrivateKeyType".to_owned(), "ec".into());
    config.insert("PrivateKeyBits".to_owned(), json!(256));
    if let Some(period) = &configuration.rotation_period {
        config.insert("RotationPeriod".to_owned(), Value::String(period.clone()));
    }
    api::CaConfiguration {
        provider: "consul".to_owned(),
        config,
        state: None,
        force_without_cross_signing: false,
        create_index: configuration.created.0,
        modify_index: configuration.modified.0,
    }
}

/// A leaf with its key, for the application that it belongs to.
pub(super) fn leaf(leaf: &Leaf) -> api::LeafCert {
    let certificate = &leaf.certificate;
    let index = leaf_index(leaf);
    api::LeafCert {
        serial_number: certificate.serial.clone(),
        cert_pem: certificate.chain.clone(),
        private_key_pem: api::Secret::new(leaf.key_pem().to_owned()),
        service: certificate.identity.service.to_string(),
        service_uri: certificate.identity.to_string(),
        valid_after: certificate.valid_after.into(),
        valid_before: certificate.valid_before.into(),
        create_index: index,
        modify_index: index,
    }
}

/// Grows with each renewal: serial numbers are given out in order.
pub(super) fn leaf_index(leaf: &Leaf) -> u64 {
    let digits: String = leaf.certificate.serial.chars().filter(|c| *c != ':').collect();
    u64::from_str_radix(&digits, 16).unwrap_or(1).max(1)
}
