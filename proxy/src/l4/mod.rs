//! TCP through the proxy: listeners, both directions, and the copy between them.
//!
//! `listener` accepts and keeps the registry of open connections; `inbound` and `outbound` bring a connection to the point
//! where bytes may flow; `copy` carries them; `live` tells the events, `tally` the totals; `socket` knows options and
//! ends.

mod copy;
mod inbound;
mod listener;
mod live;
mod outbound;
mod socket;
mod tally;

#[cfg(test)]
pub(crate) use inbound::HANDSHAKE_TIMEOUT;
pub(crate) use listener::{ACCEPT_BACKOFF, Listener, State, domain_of};
pub(crate) use tally::Tally;
