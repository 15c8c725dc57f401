//! What holds of every endpoint.

use std::time::Duration;

use culvert_control::{HttpLimits, Reloadable};
use culvert_types::{Action, Encryption};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::client::{NODE_ID, PATIENCE, Server, config};

#[tokio::test]
async fn errors_are_bare_text_with_consuls_codes() {
    let server = Server::start().await;
    let cases = [
        ("GET", "/v1/nothing", 404, "Invalid URL path: not a recognized HTTP API endpoint"),
        (
            "GET",
            "/nothing",
            404,
            "Invalid URL path: if attempting to use the HTTP API, ensure the path starts with '/v1/'",
        ),
        ("POST", "/v1/agent/services", 405, "method POST not allowed"),
        ("DELETE", "/v1/agent/service/register", 405, "method DELETE not allowed"),
        ("PUT", "/v1/acl/bootstrap", 401, "ACL support disabled"),
        ("GET", "/v1/acl/token/self", 401, "ACL support disabled"),
        ("PUT", "/v1/agent/token/default", 401, "ACL support disabled"),
        ("GET", "/v1/config/proxy-defaults/global", 404, "Config entry not found for \"proxy-defaults\" / \"global\""),
        ("GET", "/v1/catalog/services?dc=dc2", 500, "No path to datacenter"),
        ("GET", "/v1/catalog/services?datacenter=dc2&dc=dc1", 500, "No path to datacenter"),
        ("GET", "/v1/catalog/services?index=x", 400, "Invalid index"),
        ("GET", "/v1/catalog/services?wait=x", 400, "Invalid wait time"),
        (
            "GET",
            "/v1/catalog/services?stale&consistent",
            400,
            "Cannot specify ?stale with ?consistent, conflicting semantics.",
        ),
        ("GET", "/v1/health/service/web?passing=maybe", 400, "Invalid value for ?passing"),
        ("GET", "/v1/health/state/fine", 400, "Invalid check state \"fine\""),
        ("GET", "/v1/agent/service/none", 404, "unknown service ID: none"),
        (
            "PUT",
            "/v1/agent/service/deregister/a%20b",
            404,
            "Unknown service ID \"a b\". Ensure that the service ID is passed, not the service name.",
        ),
        (
            "PUT",
            "/v1/agent/check/pass/none",
            404,
            "Unknown check ID \"none\". Ensure that the check ID is passed, not the check name.",
        ),
        ("PUT", "/v1/agent/maintenance", 400, "Missing value for enable"),
        ("PUT", "/v1/agent/maintenance?enable=perhaps", 400, "Invalid value for enable: \"perhaps\""),
        ("GET", "/v1/connect/intentions/none", 404, "Intention not found"),
        ("GET", "/v1/connect/intentions/exact?source=a&destination=b", 404, "Intention not found"),
        ("GET", "/v1/connect/intentions/exact?source=a", 400, "required query parameter 'destination' not set"),
        ("GET", "/v1/connect/intentions/match?name=a", 400, "required query parameter 'by' not set"),
        (
            "GET",
            "/v1/connect/intentions/match?by=x&name=a",
            400,
            "'by' parameter must be one of 'source' or 'destination'",
        ),
    ];
    for (method, path, status, text) in cases {
        let answer = server.send(method, path, "").await;
        assert_eq!((answer.status, answer.body.as_str()), (status, text), "{method} {path}");
        assert_eq!(answer.header("content-type"), "text/plain; charset=utf-8", "{method} {path}");
        assert_eq!(answer.header("x-consul-default-acl-policy"), "allow", "{method} {path}");
    }
    let refused = server.send("POST", "/v1/agent/services", "").await;
    assert_eq!(refused.header("allow"), "GET");
    let options = server.send("OPTIONS", "/v1/connect/intentions/exact", "").await;
    assert_eq!((options.status, options.body.as_str()), (200, ""));
    assert_eq!(options.header("allow"), "OPTIONS,GET,PUT,DELETE");
    let filter = server.get("/v1/agent/services?filter=Nothing%20==%20x").await;
    assert_eq!(filter.status, 500);
    assert!(filter.body.contains("Selector \"Nothing\" is not valid"), "{filter:?}");
}

#[tokio::test]
async fn bodies_are_read_as_go_reads_them() {
    let server = Server::start().await;
    let register = "/v1/agent/service/register";
    let lower = json!({"name": "web", "tagged_addresses": {"lan": {"address": "10.0.0.1", "port": 1}}});
    assert_eq!(server.put(register, lower).await.ok(), Value::Null);
    let unknown = server.put(register, json!({"Name": "web", "Colour": 1})).await;
    assert_eq!((unknown.status, unknown.body.as_str()), (400, "Request decode failed: json: unknown field \"Colour\""));
    let empty = server.send("PUT", register, "").await;
    assert_eq!((empty.status, empty.body.as_str()), (400, "Request decode failed: EOF"));
    let broken = server.send("PUT", register, "{\"Name\":").await;
    assert!(broken.status == 400 && broken.body.starts_with("Request decode failed: "), "{broken:?}");
    let large = server.send("PUT", register, vec![b' '; (1 << 20) + 1]).await;
    assert_eq!(large.status, 413, "{large:?}");
    let many = (0..300).map(|n| format!("a{n}=1")).collect::<Vec<_>>().join("&");
    assert_eq!(server.get(&format!("/v1/agent/services?{many}")).await.status, 400);
}

#[tokio::test]
async fn answers_are_indented_in_dev_mode_or_on_request() {
    let dev = Server::start().await;
    assert_eq!(dev.get("/v1/catalog/datacenters").await.body, "[\n    \"dc1\"\n]");
    assert_eq!(dev.get("/v1/catalog/datacenters?pretty").await.body, "[\n    \"dc1\"\n]\n");
    let mut plain = config();
    (plain.dev, plain.settings.default_policy) = (false, Action::Deny);
    let plain = Server::with(plain).await;
    let answer = plain.get("/v1/catalog/datacenters").await;
    assert_eq!(answer.body, "[\"dc1\"]");
    assert_eq!(answer.header("x-consul-default-acl-policy"), "deny");
    assert_eq!(answer.header("content-type"), "application/json");
    let settings = Reloadable { default_policy: Action::Allow, encryption: Encryption::Always };
    plain.control.reload(settings);
    assert_eq!(plain.get("/v1/catalog/datacenters").await.header("x-consul-default-acl-policy"), "allow");
}

#[tokio::test]
async fn indexed_reads_carry_their_headers() {
    let server = Server::start().await;
    for path in [
        "/v1/catalog/nodes",
        "/v1/catalog/services",
        "/v1/catalog/service/none",
        "/v1/catalog/connect/none",
        "/v1/catalog/node/n1",
        "/v1/catalog/node-services/n1",
        "/v1/health/service/none",
        "/v1/health/connect/none",
        "/v1/health/checks/none",
        "/v1/health/node/n1",
        "/v1/health/state/any",
        "/v1/connect/intentions",
        "/v1/connect/ca/roots",
        "/v1/connect/ca/configuration",
        "/v1/agent/connect/ca/roots",
        "/v1/config/service-defaults",
    ] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        assert!(answer.index() > 0, "{path}");
        assert_eq!(
            (answer.header("x-consul-knownleader"), answer.header("x-consul-lastcontact")),
            ("true", "0"),
            "{path}"
        );
        assert_eq!(answer.header("x-consul-effective-consistency"), "leader", "{path}");
    }
    let stale = server.get("/v1/catalog/nodes?stale").await;
    assert_eq!(stale.header("x-consul-effective-consistency"), "stale");
}

#[tokio::test]
async fn the_agent_describes_itself_as_nomads_fingerprint_needs_it() {
    let node_meta = [("rack".to_owned(), "r1".to_owned())].into();
    let server = Server::with(culvert_control::ControlConfig { node_meta, ..config() }).await;
    let nodes = server.get("/v1/catalog/nodes?node-meta=rack:r1").await.ok();
    assert_eq!(nodes[0]["Node"], "n1", "{nodes}");
    let body = server.get("/v1/agent/self").await.ok();
    for (key, value) in body.as_object().expect("an object") {
        assert!(value.is_object() || value.is_null(), "{key} must decode as an object");
    }
    let grpc = server.control.grpc_addr().expect("gRPC is on").port();
    for (pointer, expected) in [
        ("/Config/Datacenter", json!("dc1")),
        ("/Config/NodeName", json!("n1")),
        ("/Config/NodeID", json!(NODE_ID)),
        ("/Config/Server", json!(true)),
        ("/DebugConfig/ConnectEnabled", json!(true)),
        ("/DebugConfig/GRPCPort", json!(grpc)),
        ("/Member/Tags/segment", json!("")),
        ("/Meta/rack", json!("r1")),
        ("/Meta/consul-network-segment", json!("")),
        ("/xDS/Port", json!(grpc)),
        ("/xDS/Ports/Plaintext", json!(grpc)),
    ] {
        assert_eq!(body.pointer(pointer), Some(&expected), "{pointer}");
    }
    let version = body["Config"]["Version"].as_str().expect("text");
    let parts: Vec<u32> = version.split('.').map(|part| part.parse().expect("a number")).collect();
    assert!(parts.len() == 3 && parts >= vec![1, 14, 0], "{version}");
    let build = body["Member"]["Tags"]["build"].as_str().expect("text");
    assert!(build.starts_with(&format!("{version}:")), "{build}");
    assert!(body["xDS"]["SupportedProxies"]["envoy"][0].is_string());
    assert_eq!(server.get("/v1/agent/version").await.ok()["HumanVersion"], version);
    assert_eq!(server.get("/v1/agent/members").await.ok()[0]["Name"], "n1");
    assert_eq!(server.get("/v1/status/leader").await.ok(), json!("127.0.0.1:8300"));
    assert_eq!(server.get("/v1/status/peers").await.ok(), json!(["127.0.0.1:8300"]));
}

#[tokio::test]
async fn a_web_page_of_another_site_cannot_change_anything() {
    let server = Server::start().await;
    let address = server.control.http_addrs()[0];
    let body =
        json!({"SourceName": "web", "DestinationName": "api", "SourceType": "consul", "Action": "allow"}).to_string();
    for (origin, status) in [("http://evil.example", "403"), ("null", "403"), (&format!("http://{address}"), "200")] {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let length = body.len();
        let request = format!(
            "POST /v1/connect/intentions HTTP/1.1\r\nHost: {address}\r\nOrigin: {origin}\r\nConnection: close\r\n\
             Content-Type: text/plain\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("in time").expect("read");
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{origin}: {answer}");
        let written = server.get("/v1/connect/intentions").await.ok().as_array().expect("an array").len();
        assert_eq!(written, usize::from(status == "200"), "{origin}");
    }
}

#[tokio::test]
async fn a_page_whose_name_was_made_to_point_here_gets_nothing() {
    let server = Server::start().await;
    let address = server.control.http_addrs()[0];
    let port = address.port();
    for (host, status) in [
        ("evil.example:8500".to_owned(), "403"),
        ("127.0.0.1.evil.example".to_owned(), "403"),
        (format!("localhost:{port}"), "200"),
        (format!("LocalHost:{port}"), "200"),
        (address.to_string(), "200"),
        ("[::1]:8500".to_owned(), "200"),
        ("n1".to_owned(), "200"),
        ("[::1]".to_owned(), "200"),
        ("[::1].evil.example".to_owned(), "403"),
        ("[127.0.0.1]evil.example:80".to_owned(), "403"),
        (format!("localhost\r\nHost: {address}"), "400"),
    ] {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let request = format!("GET /v1/agent/services HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("in time").expect("read");
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {answer}");
    }
}

#[tokio::test]
async fn one_client_cannot_take_every_connection() {
    let mut limited = config();
    limited.limits = HttpLimits { max_connections_per_client: 2, ..HttpLimits::default() };
    let server = Server::with(limited).await;
    let address = server.control.http_addrs()[0];
    let connect = || async { TcpStream::connect(address).await.expect("connected") };
    let ask = async |stream: &mut TcpStream| {
        stream.write_all(b"GET /v1/status/leader HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("sent");
        let mut answer = vec![0; 4096];
        let length = tokio::time::timeout(PATIENCE, stream.read(&mut answer)).await.expect("in time").expect("read");
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    let (mut first, mut second) = (connect().await, connect().await);
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
    assert!(ask(&mut second).await.starts_with("HTTP/1.1 200"));
    let mut third = connect().await;
    let mut refused = String::new();
    tokio::time::timeout(PATIENCE, third.read_to_string(&mut refused)).await.expect("in time").expect("closed");
    let (head, body) = refused.split_once("\r\n\r\n").expect("a header");
    assert!(head.starts_with("HTTP/1.1 429"), "{refused}");
    assert!(head.ends_with(&format!("Content-Length: {}", body.len())), "{refused}");
    drop(first);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let mut again = connect().await;
        if ask(&mut again).await.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "a place is given back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_client_that_is_refused_may_finish_its_request_before_it_reads_the_answer() {
    let mut limited = config();
    limited.limits = HttpLimits { max_connections: 0, ..HttpLimits::default() };
    let server = Server::with(limited).await;
    let mut stream = TcpStream::connect(server.control.http_addrs()[0]).await.expect("connected");
    let head = "PUT /v1/agent/service/register HTTP/1.1\r\nHost: localhost\r\nContent-Length: 32768\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream.readable().await.expect("answered");
    for _ in 0..32 {
        stream.write_all(&[b'x'; 1024]).await.expect("not reset");
        tokio::time::sleep(Duration::from_millis(2)).await; // for a reset to arrive
    }
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("in time").expect("not reset");
    assert!(answer.starts_with("HTTP/1.1 429"), "{answer}");
}

#[tokio::test]
async fn a_client_that_is_refused_is_not_listened_to_for_long() {
    let mut limited = config();
    limited.limits = HttpLimits { max_connections: 0, ..HttpLimits::default() };
    let server = Server::with(limited).await;
    let mut stream = TcpStream::connect(server.control.http_addrs()[0]).await.expect("connected");
    let mut sent = 0;
    let talks = async {
        while stream.write_all(&[b'x'; 1 << 16]).await.is_ok() {
            sent += 1 << 16;
        }
    };
    tokio::time::timeout(PATIENCE, talks).await.expect("cut off");
    // What the sockets hold comes on top; within the time alone it would be hundreds.
    assert!(sent < 32 << 20, "cut off by bytes, not by time: {sent}");
    let mut silent = TcpStream::connect(server.control.http_addrs()[0]).await.expect("connected");
    let closed = async {
        while silent.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.expect("cut off by time");
}

#[tokio::test]
async fn slow_requests_are_cut_off() {
    let mut impatient = config();
    let (header_timeout, body_timeout) = (Duration::from_millis(300), Duration::from_millis(300));
    impatient.limits = HttpLimits { header_timeout, body_timeout, ..HttpLimits::default() };
    let server = Server::with(impatient).await;
    let address = server.control.http_addrs()[0];
    for start in [
        "GET /v1/status/leader HTTP/1.1\r\nHost:",
        "PUT /v1/agent/service/register HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    ] {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(start.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        let closed = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
        // Closed with or without a word, but closed; and never as if it had been a request.
        closed.expect("closed in time").ok();
        assert!(!answer.starts_with("HTTP/1.1 200"), "{start}: {answer}");
    }
}
