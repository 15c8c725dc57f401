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

pub use copy::MAX_KEPT;
pub use inbound::HANDSHAKE_TIMEOUT;
pub use listener::{ACCEPT_BACKOFF, DEFAULT_MAX_CONNECTIONS};
pub(crate) use listener::{Listener, State, domain_of};
pub use outbound::DEFAULT_CONNECT_ATTEMPTS;
pub use socket::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES};
pub use tally::Tally;
