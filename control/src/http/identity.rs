//! What this agent says about itself: `/v1/agent/{self,members,version}`.
//!
//! Nomad's fingerprint reads much of it; the fields and their forms are those it needs, with the values that are true here.

use std::collections::BTreeMap;

use culvert_api::{AgentConfig, AgentSelf, Member, VersionInfo, XdsPorts, XdsSelf};
use serde_json::{Map, Value, json};

use super::Api;

/// Envoy releases that accept what the xDS server sends, newest first. Nomad pulls an image by the first one.
pub(crate) const ENVOY_VERSIONS: [&str; 5] = ["1.34.1", "1.33.2", "1.32.5", "1.31.8", "1.30.11"];
/// Consul's gossip port, which members show. Nothing listens there.
const SERF_PORT: u16 = 8301;
/// Alive, in the numbers of gossip.
const ALIVE: u8 = 1;

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The node's own description.
pub(super) fn agent_self(api: &Api) -> AgentSelf {
    let (place, settings) = (&api.place, *api.settings.borrow());
    let grpc = api.grpc_port.map_or(-1, i32::from);
    let (low, high) = place.sidecar_ports.as_ref().map_or((0, 0), |range| (*range.start(), *range.end()));
    let state = api.ledger.state();
    AgentSelf {
        config: AgentConfig {
            datacenter: place.datacenter.to_string(),
            primary_datacenter: place.datacenter.to_string(),
            node_name: place.node.clone(),
            node_id: api.node_id.clone(),
            revision: REVISION.to_owned(),
            server: true,
            version: api.version.to_owned(),
            build_date: String::new(),
        },
        debug_config: object(json!({
            "ACLsEnabled": false,
            "ACLDefaultPolicy": settings.default_policy.as_str(),
            "AdvertiseAddrLAN": place.advertise.to_string(),
            "ConnectEnabled": true,
            "ConnectSidecarMinPort": low,
            "ConnectSidecarMaxPort": high,
            "Datacenter": place.datacenter.as_str(),
            "DefaultIntentionPolicy": settings.default_policy.as_str(),
            "DevMode": place.dev,
            "DNSAddrs": [],
            "DNSPort": -1,
            "GRPCPort": grpc,
            "GRPCTLSPort": -1,
            "NodeID": api.node_id,
            "NodeName": place.node,
            "ServerMode": true,
            "Version": api.version,
        })),
        coord: None,
        member: member(api),
        stats: object(json!({
            "agent": {
                "checks": state.checks_on(&place.node).count().to_string(),
                "services": state.services_of(&place.node).count().to_string(),
            },
            "build": {"revision": REVISION, "version": api.version, "prerelease": "", "version_metadata": ""},
            "consul": {"bootstrap": "true", "known_datacenters": "1", "leader": "true", "server": "true", "acl": "disabled"},
            "runtime": {"arch": std::env::consts::ARCH, "os": std::env::consts::OS},
        })),
        meta: object(json!(state.node(&place.node).map(|node| &node.meta))),
        xds: api.grpc_port.map(|port| XdsSelf {
            supported_proxies: BTreeMap::from([("envoy".to_owned(), ENVOY_VERSIONS.map(str::to_owned).to_vec())]),
            port: port.into(),
            ports: XdsPorts { plaintext: port.into(), tls: -1 },
        }),
    }
}

/// What takes the place of a build's commit: clients only show it.
const REVISION: &str = "culvert";

/// This node as a member of the cluster.
pub(super) fn member(api: &Api) -> Member {
    let tags = json!({
        "acls": "0",
        "ap": "default",
        // Nomad takes a build without a colon for one that is too old.
        "build": format!("{}:{REVISION}", api.version),
        "dc": api.place.datacenter.as_str(),
        "id": api.node_id,
        "port": "8300",
        "raft_vsn": "3",
        "role": "consul",
        "segment": "",
        "vsn": "2",
        "vsn_max": "3",
        "vsn_min": "2",
    });
    Member {
        name: api.place.node.clone(),
        addr: api.place.advertise.to_string(),
        port: SERF_PORT,
        tags: object(tags),
        status: ALIVE,
        protocol_min: 1,
        protocol_max: 5,
        protocol_cur: 2,
        delegate_min: 2,
        delegate_max: 5,
        delegate_cur: 4,
    }
}

/// `/v1/agent/version`.
pub(super) fn version(api: &Api) -> VersionInfo {
    VersionInfo {
        sha: REVISION.to_owned(),
        build_date: String::new(),
        human_version: api.version.to_owned(),
        fips: String::new(),
    }
}
