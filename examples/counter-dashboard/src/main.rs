//! The dashboard of the countdash example: a page that shows the live count, who counted, and whether the connection holds.
//!
//! Settings come from the environment: `PORT` (default 9002), `HOST` (default 0.0.0.0: the page is published),
//! `COUNTING_SERVICE_URL` (default `http://127.0.0.1:8080`). One connection to the counting service is open at a time,
//! renewed every two seconds and after every failure; every viewer sees the same state by server-sent events. It knows nothing of TLS or of culvert.

#![forbid(unsafe_code)]

mod counting;
mod page;

use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("COUNTING_SERVICE_URL").unwrap_or_else(|_| "http://127.0.0.1:8080".into());
    let address = listen_address()?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let target = counting::Target::parse(&url).with_context(|| format!("COUNTING_SERVICE_URL {url:?}"))?;
    let (publish, state) = watch::channel(counting::State::default());
    tokio::spawn(counting::follow(target, publish));
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        let state = state.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| page::answer(state.clone(), request));
            let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // A browser that goes away is not our error.
            drop(served.await);
        });
    }
}

fn listen_address() -> anyhow::Result<SocketAddr> {
    let host: IpAddr = std::env::var("HOST").unwrap_or_else(|_| "0.0.0.0".into()).parse().context("HOST")?;
    let port: u16 = std::env::var("PORT").unwrap_or_else(|_| "9002".into()).parse().context("PORT")?;
    Ok(SocketAddr::new(host, port))
}
