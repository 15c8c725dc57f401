//! A pair of Envoys, configured as Consul configures them for the same job: mutual TLS with SPIFFE identities, network RBAC on
//! the called side, TCP proxy. The configuration is a file, so that no control plane is measured with them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use culvert_tests::{eventually, get};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};

use super::plain::{CLIENT, SERVER, inside};
use super::{APPLICATION, Running, UPSTREAM};

/// Where the called side's Envoy accepts mutual TLS.
const INBOUND_PORT: u16 = 21000;
/// Where each Envoy tells about itself, inside its namespace.
const ADMIN: &str = "127.0.0.1:19000";
const CALLER: &str = "spiffe://bench.consul/ns/default/dc/dc1/svc/caller";
const CALLED: &str = "spiffe://bench.consul/ns/default/dc/dc1/svc/called";

/// Starts both and waits until they accept.
pub(super) fn start(binary: &Path, folder: &Path, concurrency: usize) -> anyhow::Result<[Running; 2]> {
    let authority = authority()?;
    fs::write(folder.join("roots.pem"), authority.pem())?;
    let caller = Identity::issue(&authority, folder, "caller", CALLER)?;
    let called = Identity::issue(&authority, folder, "called", CALLED)?;
    let upstream = cluster("called", (SERVER.1, INBOUND_PORT).into(), Some(upstream_tls(&caller, folder)));
    let application = cluster("application", APPLICATION, None);
    let outbound = bootstrap(&listener("outbound", UPSTREAM, None, &[tcp_proxy("called")]), &upstream);
    let public: SocketAddr = ([0, 0, 0, 0], INBOUND_PORT).into();
    let filters = [rbac(CALLER), tcp_proxy("application")];
    let inbound =
        bootstrap(&listener("inbound", public, Some(downstream_tls(&called, folder)), &filters), &application);
    let one = |netns: &str, name: &str, configuration: &Value| -> anyhow::Result<Running> {
        let path = folder.join(format!("{name}.json"));
        fs::write(&path, configuration.to_string())?;
        let log = fs::File::create(folder.join(format!("{name}.log")))?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns]).arg(binary).arg("-c").arg(&path);
        command.args(["--use-dynamic-base-id", "--log-level", "warn", "--concurrency", &concurrency.to_string()]);
        Running::start(command.stdout(log.try_clone()?).stderr(log))
    };
    let pair = [one(SERVER.0, "called", &inbound)?, one(CLIENT.0, "caller", &outbound)?];
    for name in [SERVER.0, CLIENT.0] {
        eventually("an Envoy is ready", || visit(name, "/ready").is_ok_and(|text| text.contains("LIVE")));
    }
    Ok(pair)
}

/// Handshakes that the called side has finished: what went through this pair was encrypted.
pub(super) fn handshakes() -> anyhow::Result<u64> {
    let text = visit(SERVER.0, "/stats?filter=^listener.*ssl.handshake$")?;
    let counts = text.lines().filter_map(|line| line.rsplit(": ").next()?.trim().parse::<u64>().ok());
    Ok(counts.sum())
}

/// GET of an Envoy's admin interface, from inside its namespace.
fn visit(netns: &str, path: &str) -> anyhow::Result<String> {
    std::thread::scope(|scope| {
        let visit = scope.spawn(|| inside(netns).enter().and_then(|()| get(ADMIN, path)));
        visit.join().map_err(|_| anyhow::anyhow!("a visit to {netns} panicked"))?
    })
}

fn authority() -> anyhow::Result<CertifiedIssuer<'static, KeyPair>> {
    let mut root = CertificateParams::default();
    // Issuer and subject must differ, or a leaf looks as if it had signed itself.
    root.distinguished_name.push(DnType::CommonName, "bench root");
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok(CertifiedIssuer::self_signed(root, KeyPair::generate()?)?)
}

/// Files of a certificate and its key.
struct Identity {
    chain: PathBuf,
    key: PathBuf,
}

impl Identity {
    fn issue(
        authority: &CertifiedIssuer<'static, KeyPair>,
        folder: &Path,
        name: &str,
        spiffe: &str,
    ) -> anyhow::Result<Self> {
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name.push(DnType::CommonName, name);
        leaf.subject_alt_names = vec![SanType::URI(spiffe.try_into().context("a URI")?)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let files = Self { chain: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
        fs::write(&files.chain, leaf.signed_by(&key, authority)?.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}

fn common_tls(own: &Identity, folder: &Path, peer: &str) -> Value {
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": own.chain}, "private_key": {"filename": own.key}}],
        "validation_context": {
            "trusted_ca": {"filename": folder.join("roots.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    })
}

fn upstream_tls(own: &Identity, folder: &Path) -> Value {
    json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": common_tls(own, folder, CALLED),
    }})
}

fn downstream_tls(own: &Identity, folder: &Path) -> Value {
    json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true,
        "common_tls_context": common_tls(own, folder, CALLER),
    }})
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn cluster(name: &str, address: SocketAddr, tls: Option<Value>) -> Value {
    let endpoint = json!({"lb_endpoints": [{"endpoint": {"address": socket_address(address)}}]});
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [endpoint]},
        // What is measured must not be cut short by the default of 1024.
        "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]},
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    cluster
}

fn listener(name: &str, address: SocketAddr, tls: Option<Value>, filters: &[Value]) -> Value {
    let mut chain = json!({"filters": filters});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": name, "address": socket_address(address), "filter_chains": [chain]})
}

fn rbac(caller: &str) -> Value {
    json!({"name": "rbac", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
        "stat_prefix": "connect_authz",
        "rules": {"action": "ALLOW", "policies": {"caller": {
            "permissions": [{"any": true}],
            "principals": [{"authenticated": {"principal_name": {"exact": caller}}}],
        }}},
    }})
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster, "cluster": cluster, "idle_timeout": "0s",
    }})
}

fn bootstrap(listener: &Value, cluster: &Value) -> Value {
    let admin: SocketAddr = ADMIN.parse().expect("an address");
    json!({
        "admin": {"address": socket_address(admin)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    })
}
