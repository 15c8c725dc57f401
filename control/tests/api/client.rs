//! A control plane on free ports, and a client that shows status, headers and body.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use culvert_control::{Control, ControlConfig, NodeDialer, StartError};
use culvert_types::Datacenter;
use http_body_util::{BodyExt as _, Full};
use hyper::header::HeaderMap;
use hyper::{Method, Request};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Longer than anything takes on a busy machine, shorter than a hung test run.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const NODE_ID: &str = "6f0a4b0e-5d3c-4f0d-9b1a-0d2f6f2b7c11";

/// A control plane in this process, spoken to over real sockets.
pub(crate) struct Server {
    pub(crate) control: Control,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// What came back.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|err| panic!("{err}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name).unwrap_or_else(|| panic!("no {name}: {self:?}"));
        value.to_str().expect("text")
    }

    pub(crate) fn index(&self) -> u64 {
        self.header("x-consul-index").parse().expect("a number")
    }

    /// The body of a success.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        if self.body.is_empty() { Value::Null } else { self.json() }
    }
}

pub(crate) fn config() -> ControlConfig {
    ControlConfig::dev("n1", NODE_ID, Datacenter::new("dc1").expect("a name"))
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(config()).await
    }

    pub(crate) async fn with(config: ControlConfig) -> Self {
        let control = Control::start(config, Arc::new(NodeDialer)).await.expect("started");
        Self { control, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// Ends `self` and starts another on the same directory: tasks that were cancelled let go of it a moment later.
    pub(crate) async fn restart(self, config: &ControlConfig) -> Self {
        self.control.shutdown().await;
        drop(self);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let control = loop {
            match Control::start(config.clone(), Arc::new(NodeDialer)).await {
                Ok(control) => break control,
                Err(StartError::Store(err)) if tokio::time::Instant::now() < deadline => drop(err),
                Err(err) => panic!("{err}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        Self { control, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Answer {
        let address = self.control.http_addrs()[0];
        let request = Request::builder().method(Method::from_bytes(method.as_bytes()).expect("a method"));
        let request = request.uri(format!("http://{address}{path}")).body(Full::new(body.into())).expect("a request");
        let response = tokio::time::timeout(PATIENCE, self.client.request(request)).await.expect("in time");
        let (parts, body) = response.expect("an answer").into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        let body = String::from_utf8(body.to_vec()).expect("text");
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "").await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send("PUT", path, body).await
    }
}
