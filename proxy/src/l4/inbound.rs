//! From the mesh to the local application: TLS, identity, policy, then the application.

use std::io;
use std::time::Duration;

use culvert_types::RefusalReason;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::copy::{copy, deny};
use super::listener::{Shared, State};
use super::live::{Live, Refusal, Story};
use super::socket::Connection;
use crate::balance::{NoPlace, Place};
use crate::handoff::Family;
use crate::tls::{self, Established, HandshakeError};

/// Longest time a handshake may take. How many there are at a time is bounded by the connections of the listener: who takes
/// part in one and is silent must not hold up the others.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn carry(shared: &Shared, live: &Live, tunnel: Connection) {
    let mut story = shared.story(live, &shared.state.load());
    // Boxed: what is needed before the first byte of payload must not weigh on idle connections.
    let (Established { session, early, .. }, app, _place) = match Box::pin(establish(shared, &mut story, &tunnel)).await
    {
        Ok(established) => established,
        Err((_, End::Silent)) => return story.forget(),
        Err((refusal, end)) => {
            if matches!(end, End::Orderly) {
                tunnel.finish();
            }
            return story.refuse(refusal);
        }
    };
    story.open();
    match copy(&app, &tunnel, session, early, live).await {
        Ok(()) => {
            app.finish();
            tunnel.finish();
            story.close(None);
        }
        Err(error) => {
            drop((app, tunnel));
            story.close(Some(error.to_string()));
        }
    }
}

/// How a refused peer learns it.
enum End {
    /// Not at all: it left without a word, and is no connection worth telling about.
    Silent,
    /// FIN behind the TLS alert, which a reset could overtake.
    Orderly,
    /// RST.
    Reset,
}

async fn establish(
    shared: &Shared,
    story: &mut Story<'_>,
    tunnel: &TcpStream,
) -> Result<(Established, Connection, Place), (Refusal, End)> {
    let mut established = match timeout(HANDSHAKE_TIMEOUT, handshake(shared, tunnel)).await {
        Ok(Ok(established)) => established,
        Ok(Err(error)) => {
            let end = if matches!(error, HandshakeError::Silent) { End::Silent } else { End::Orderly };
            return Err((Refusal::new(error.reason(), &error), end));
        }
        Err(_) => {
            let refusal = Refusal::new(RefusalReason::Handshake, "TLS handshake did not finish in time");
            return Err((refusal, End::Reset));
        }
    };
    let reset = |refusal| (refusal, End::Reset);
    let peer = established.peer.clone();
    story.source = Some(peer.id().clone());
    let state = shared.identify(story.live, peer.clone());
    let (decision, rule) = state.judge(&peer, story.live);
    let detail = format!("{peer} is not allowed");
    story.rule = Some(rule);
    if !decision.allowed {
        deny(tunnel, &mut established.session);
        return Err((Refusal::new(RefusalReason::Intention, detail), End::Orderly));
    }
    let (app, place) = connect_app(shared, &state).await.map_err(reset)?;
    Ok((established, app, place))
}

async fn handshake(shared: &Shared, tunnel: &TcpStream) -> Result<Established, HandshakeError> {
    let state = shared.state.load_full();
    match &state.tls {
        Some(tls) => tls::accept(tunnel, tls).await,
        // The configuration's parser lets no inbound listener without TLS pass; refuse all the same.
        None => Err(HandshakeError::Socket(io::Error::other("inbound listener without TLS"))),
    }
}

async fn connect_app(shared: &Shared, state: &State) -> Result<(Connection, Place), Refusal> {
    let failed = |detail: String| Refusal::new(RefusalReason::Connect, detail);
    let destination = state.destination.as_ref();
    let destination = destination
        .ok_or_else(|| failed(format!("cluster {:?} of the application is unknown", state.config.cluster)))?;
    let place = destination.place(&[]).map_err(|why| match why {
        NoPlace::NoInstance => failed(format!("cluster {:?} has no address", state.config.cluster)),
        NoPlace::Full => Refusal::new(RefusalReason::Limit, "the application's limit of connections is reached"),
    })?;
    let address = place.address;
    let refused = |error: io::Error| failed(format!("connect to the application at {address}: {error}"));
    let socket = shared.context.sockets.app_socket(Family::of(address)).await.map_err(refused)?;
    let connect = async { Connection::opened(socket.connect(address).await?) };
    match timeout(destination.config.connect_timeout, connect).await {
        Ok(Ok(app)) => Ok((app, place)),
        Ok(Err(error)) => Err(refused(error)),
        Err(_) => Err(failed(format!("connect to the application at {address}: not in time"))),
    }
}
