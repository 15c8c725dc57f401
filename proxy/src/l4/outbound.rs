//! From the local application to an instance of an upstream: choose, connect, TLS, and another try while nothing was sent.

use std::net::SocketAddr;

use culvert_types::RefusalReason;
use tokio::time::timeout;

use super::copy::copy;
use super::inbound::HANDSHAKE_TIMEOUT;
use super::listener::{Shared, State};
use super::live::{Live, Refusal};
use super::socket::Connection;
use crate::balance::{Destination, NoPlace, Place};
use crate::handoff::Family;
use crate::sockets::unconnected;
use crate::tls::{self, ClientContext, Established};

/// Instances that are tried for one connection, where the configuration names no number.
const DEFAULT_CONNECT_ATTEMPTS: u32 = 3;

pub(super) async fn carry(shared: &Shared, live: &Live, app: Connection) {
    let state = shared.state.load_full();
    let mut story = shared.story(live, &state);
    // Boxed: what is needed before the first byte of payload must not weigh on idle connections.
    let connected = Box::pin(connect_any(&state)).await;
    drop(state); // an idle connection must not keep an old configuration alive
    let (Established { session, early, peer }, tunnel, _place) = match connected {
        Ok(connected) => connected,
        Err(refusal) => return story.refuse(refusal), // dropping `app` resets it
    };
    story.destination = Some(peer.id().clone());
    drop(peer);
    story.open();
    match copy(&app, &tunnel, session, early, live).await {
        Ok(()) => {
            app.finish();
            tunnel.finish();
            story.close(None);
        }
        Err(error) => {
            drop((app, tunnel));
            // In TLS 1.3 the called side judges after we have opened.
            if error.is_denial() { story.denied(error.to_string()) } else { story.close(Some(error.to_string())) }
        }
    }
}

/// Tries instances until one is connected with a finished handshake. Nothing of the application has been sent by then.
async fn connect_any(state: &State) -> Result<(Established, Connection, Place), Refusal> {
    let no_instance = |detail: String| Refusal::new(RefusalReason::NoHealthyInstance, detail);
    let cluster = &state.config.cluster;
    let destination =
        state.destination.as_ref().ok_or_else(|| no_instance(format!("cluster {cluster:?} is unknown")))?;
    let Some(tls) = &destination.tls else {
        return Err(Refusal::new(
            RefusalReason::Handshake,
            format!("cluster {cluster:?} has no TLS; every upstream must"),
        ));
    };
    let attempts = state.config.max_connect_attempts.unwrap_or(DEFAULT_CONNECT_ATTEMPTS).max(1);
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = None;
    for _ in 0..attempts {
        let place = match destination.place(&tried) {
            Ok(place) => place,
            Err(NoPlace::NoInstance) => break,
            Err(NoPlace::Full) => {
                let detail = format!("the limit of connections to cluster {cluster:?} is reached");
                return Err(Refusal::new(RefusalReason::Limit, detail));
            }
        };
        tried.push(place.address);
        match connect_one(destination, tls, place.address).await {
            Ok((established, tunnel)) => return Ok((established, tunnel, place)),
            Err(refusal) => last = Some(refusal),
        }
    }
    Err(last.unwrap_or_else(|| no_instance(format!("cluster {cluster:?} has no healthy instance"))))
}

async fn connect_one(
    destination: &Destination,
    tls: &ClientContext,
    address: SocketAddr,
) -> Result<(Established, Connection), Refusal> {
    let failed =
        |error: &dyn std::fmt::Display| Refusal::new(RefusalReason::Connect, format_args!("{address}: {error}"));
    let connect = async { unconnected(Family::of(address))?.connect(address).await };
    let stream = match timeout(destination.config.connect_timeout, connect).await {
        Ok(connected) => connected.map_err(|error| failed(&error))?,
        Err(_) => return Err(failed(&"no answer in time")),
    };
    let tunnel = Connection::opened(stream).map_err(|error| failed(&error))?;
    match timeout(HANDSHAKE_TIMEOUT, tls::connect(&tunnel, tls)).await {
        Ok(Ok(established)) => Ok((established, tunnel)),
        Ok(Err(error)) => {
            tunnel.finish(); // our alert says why
            Err(Refusal::new(error.reason(), format_args!("{address}: {error}")))
        }
        Err(_) => {
            Err(Refusal::new(RefusalReason::Handshake, format_args!("{address}: TLS handshake did not finish in time")))
        }
    }
}
