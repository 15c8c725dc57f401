//! The certificate authority from outside: its settings, the rotation of its root, and readers that wait for both.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use culvert_control::ControlConfig;
use culvert_control::ca::{CaSettings, ConfigurationUpdate};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde_json::{Value, json};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::blocking::blocked;
use crate::client::{Answer, PATIENCE, Server, config};

const CONFIGURATION: &str = "/v1/connect/ca/configuration";
const ROTATE: &str = "/v1/culvert/ca/rotate";
const LEAF: &str = "/v1/agent/connect/ca/leaf/web";
const HOUR: Duration = Duration::from_secs(3600);

/// Leaves follow a new root at once.
fn settings() -> CaSettings {
    CaSettings { root_change_smear: Duration::from_millis(10), ..CaSettings::default() }
}

async fn start() -> Server {
    with(settings()).await
}

async fn with(ca: CaSettings) -> Server {
    let server = Server::with(ControlConfig { ca, ..config() }).await;
    server.put("/v1/agent/service/register", json!({"Name": "web", "Port": 80})).await.ok();
    server
}

async fn set(server: &Server, config: Value) -> Answer {
    server.put(CONFIGURATION, json!({"Provider": "consul", "Config": config})).await
}

fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(|der| der.expect("PEM")).collect()
}

/// Would a peer that trusts `roots` accept the leaf now?
fn verify(leaf: &Value, roots: &str) -> Result<(), webpki::Error> {
    let (chain, roots) = (certificates(leaf["CertPEM"].as_str().expect("PEM")), certificates(roots));
    let anchors: Vec<_> = roots.iter().map(|root| anchor_from_trusted_cert(root).expect("a root")).collect();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let (now, usage) = (UnixTime::since_unix_epoch(now), KeyUsage::client_auth());
    let leaf = EndEntityCert::try_from(&chain[0]).expect("a certificate");
    leaf.verify_for_usage(ALL_VERIFICATION_ALGS, &anchors, &chain[1..], now, usage, None, None).map(|_| ())
}

fn life(leaf: &Value) -> Duration {
    let pem = certificates(leaf["CertPEM"].as_str().expect("PEM"));
    let (_, parsed) = x509_parser::parse_x509_certificate(&pem[0]).expect("a certificate");
    let seconds = parsed.validity().not_after.timestamp() - parsed.validity().not_before.timestamp();
    Duration::from_secs(seconds.try_into().expect("it ends after its start"))
}

#[tokio::test]
async fn settings_of_the_authority_are_changed_and_hold_for_the_next_leaf() {
    let server = start().await;
    let changed = set(&server, json!({"LeafCertTTL": "2h", "csr_max_per_second": 7})).await;
    assert_eq!((changed.status, changed.body.as_str()), (200, ""));
    let shown = server.get(CONFIGURATION).await.ok();
    assert_eq!(shown["Config"]["LeafCertTTL"], "2h0m0s");
    assert_eq!(
        (&shown["Config"]["CSRMaxPerSecond"], &shown["Config"]["RootCertTTL"]),
        (&json!(7), &json!("87600h0m0s"))
    );
    assert_eq!(life(&server.get(LEAF).await.ok()), 2 * HOUR + Duration::from_secs(60), "and the minute before");

    let mut with_state = shown.clone();
    with_state["State"] = json!({"k": "v"});
    for (body, text) in [
        (with_state, "State cannot be set"),
        (json!({"Config": {"LeafCertTTL": "1m"}}), "leaf cert TTL must be between 1h and 8760h"),
        (json!({"Config": {"PrivateKey": "-----BEGIN"}}), "Config.PrivateKey is not supported"),
        (json!({"Config": {"Colour": 1}}), "\"Colour\" is not a setting"),
        (json!({"Provider": "vault"}), "unknown CA provider \"vault\""),
        (json!({"Colour": 1}), "unknown field"),
    ] {
        let answer = server.put(CONFIGURATION, body).await;
        assert!(answer.status == 400 && answer.body.contains(text), "{text}: {answer:?}");
    }
    assert_eq!(server.get(CONFIGURATION).await.ok(), shown, "what is refused changes nothing");
}

#[tokio::test]
async fn a_rotation_gives_two_roots_of_which_the_old_one_vouches_for_the_new() {
    let server = start().await;
    let old_roots = server.get("/v1/connect/ca/roots?pem").await.body;
    let (roots, leaf) = (server.get("/v1/connect/ca/roots").await, server.get(LEAF).await);
    let rotated = server.put(ROTATE, Value::Null).await.ok();
    assert_eq!(rotated["Roots"].as_array().expect("roots").len(), 2);
    assert_ne!(rotated["ActiveRootID"], roots.ok()["ActiveRootID"]);
    assert_eq!(rotated["Roots"][0]["IntermediateCerts"].as_array().expect("certificates").len(), 1);
    assert_eq!(server.get("/v1/connect/ca/roots").await.ok(), rotated);
    let both = server.get("/v1/connect/ca/roots?pem").await.body;
    assert_eq!(verify(&leaf.ok(), &both), Ok(()), "an old leaf is still good");
    let next = server.get(&format!("{LEAF}?index={}&wait=5m", leaf.index())).await.ok();
    let new_root = rotated["Roots"][0]["RootCert"].as_str().expect("PEM");
    for (roots, whose) in [(old_roots.as_str(), "who knows the old root only"), (&both, "both"), (new_root, "the new")]
    {
        assert_eq!(verify(&next, roots), Ok(()), "{whose}");
    }
    let mut answer = server.put(ROTATE, Value::Null).await;
    for _ in 0..16 {
        answer = server.put(ROTATE, Value::Null).await;
    }
    assert!(answer.status == 429 && answer.body.contains("16 roots are trusted already"), "{answer:?}");
}

#[tokio::test]
async fn an_index_of_an_earlier_authority_is_answered_at_once() {
    let server = start().await;
    let leaf = server.get(LEAF).await;
    let asked = Instant::now();
    for path in [LEAF, "/v1/agent/connect/ca/roots", "/v1/connect/ca/roots"] {
        let answer = server.get(&format!("{path}?index=1000000&wait=10m")).await;
        assert!(answer.status == 200 && answer.index() < 1000, "{path}: {answer:?}");
    }
    assert_eq!(server.get(&format!("{LEAF}?index=1000000")).await.index(), leaf.index());
    assert!(asked.elapsed() < Duration::from_secs(60), "nobody waited");
}

#[tokio::test]
async fn settings_that_a_restart_brings_along_hold_and_the_others_stay() {
    let directory = tempfile::tempdir().expect("a directory");
    let given = |leaf_ttl: Option<Duration>| {
        let mut kept = config();
        kept.data_dir = Some(directory.path().join("data"));
        kept.ca_given = ConfigurationUpdate { leaf_ttl, ..ConfigurationUpdate::default() };
        kept
    };
    let settings = async |server: &Server| server.get(CONFIGURATION).await.ok()["Config"].clone();
    let server = Server::with(given(Some(48 * HOUR))).await;
    assert_eq!(settings(&server).await["LeafCertTTL"], "48h0m0s");
    let server = server.restart(&given(None)).await;
    assert_eq!(settings(&server).await["LeafCertTTL"], "48h0m0s");
    set(&server, json!({"LeafCertTTL": "96h", "RootCertTTL": "9000h"})).await.ok();
    let server = server.restart(&given(None)).await;
    assert_eq!(settings(&server).await["LeafCertTTL"], "96h0m0s");
    let server = server.restart(&given(Some(24 * HOUR))).await;
    let shown = settings(&server).await;
    assert_eq!((&shown["LeafCertTTL"], &shown["RootCertTTL"]), (&json!("24h0m0s"), &json!("9000h0m0s")));
}

#[tokio::test]
async fn who_waits_for_a_leaf_wakes_at_its_renewal_and_who_waits_for_the_roots_at_their_rotation() {
    let ttl = Duration::from_secs(4);
    let server = with(CaSettings { leaf_ttl: ttl, allow_short_ttls_for_tests: true, ..settings() }).await;
    let server = Arc::new(server);
    let first = server.get(LEAF).await;
    let renewed = blocked(&server, format!("{LEAF}?index={}&wait=10m", first.index())).await;
    let renewed = tokio::time::timeout(PATIENCE, renewed).await.expect("woken").expect("no panic");
    assert!(renewed.index() > first.index());
    assert_ne!(renewed.ok()["CertPEM"], first.ok()["CertPEM"]);
    assert_ne!(renewed.ok()["PrivateKeyPEM"], first.ok()["PrivateKeyPEM"], "a new key each time");

    let mut readers = Vec::new();
    for path in ["/v1/agent/connect/ca/roots", "/v1/connect/ca/roots"] {
        let index = server.get(path).await.index();
        readers.push(blocked(&server, format!("{path}?index={index}&wait=10m")).await);
    }
    let rotated = server.put(ROTATE, Value::Null).await.ok();
    for reader in readers {
        let answer = tokio::time::timeout(PATIENCE, reader).await.expect("woken").expect("no panic");
        assert_eq!(answer.ok(), rotated);
    }
}

#[tokio::test]
async fn more_leaves_than_are_signed_in_a_second_are_told_to_come_later() {
    let server = with(CaSettings { csr_max_per_second: 1, ..settings() }).await;
    let names: Vec<String> = (0..8).map(|n| format!("s{n}")).collect();
    for name in &names {
        server.put("/v1/agent/service/register", json!({"Name": name, "Port": 80})).await.ok();
    }
    let paths: Vec<String> = names.iter().map(|name| format!("/v1/agent/connect/ca/leaf/{name}")).collect();
    let answers = futures::future::join_all(paths.iter().map(|path| server.get(path))).await;
    let refused: Vec<&Answer> = answers.iter().filter(|answer| answer.status != 200).collect();
    assert!(!refused.is_empty(), "eight in far less than eight seconds");
    for answer in refused {
        assert_eq!((answer.status, answer.body.as_str()), (429, "Rate limit reached, try again later"));
    }
}
