//! The counting service of the countdash example: every `GET /` counts one up and tells the number and who counted.
//!
//! Settings come from the environment, as a job file gives them: `PORT` (default 9001), `HOST` (default 127.0.0.1: only the
//! mesh reaches it). It knows nothing of TLS or of culvert.

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

struct Counter {
    count: AtomicU64,
    hostname: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let address = listen_address()?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let hostname = std::env::var("NOMAD_ALLOC_NAME").or_else(|_| std::env::var("HOSTNAME"));
    let counter =
        Arc::new(Counter { count: AtomicU64::new(0), hostname: hostname.unwrap_or_else(|_| "unknown".into()) });
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        let counter = Arc::clone(&counter);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&counter), request));
            let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // A caller that goes away in the middle of a request is not our error.
            drop(served.await);
        });
    }
}

fn listen_address() -> anyhow::Result<SocketAddr> {
    let host: IpAddr = std::env::var("HOST").unwrap_or_else(|_| "127.0.0.1".into()).parse().context("HOST")?;
    let port: u16 = std::env::var("PORT").unwrap_or_else(|_| "9001".into()).parse().context("PORT")?;
    Ok(SocketAddr::new(host, port))
}

async fn answer(counter: Arc<Counter>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/health") => (StatusCode::OK, "{\"status\":\"ok\"}".to_owned()),
        (&Method::GET, "/") => {
            let count = counter.count.fetch_add(1, Ordering::Relaxed) + 1;
            (StatusCode::OK, format!("{{\"count\":{count},\"hostname\":{:?}}}", counter.hostname))
        }
        _ => (StatusCode::NOT_FOUND, "{\"error\":\"not found\"}".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    Ok(response)
}
