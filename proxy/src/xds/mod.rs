//! Client of a control plane: delta ADS, one stream per proxy, many streams over one connection.
//!
//! [`XdsChannel`] is a connection to a control plane, dialled again whenever it breaks. [`XdsClient`] is one proxy's stream
//! over it: it subscribes to listeners, clusters and the endpoints those need, acknowledges or refuses what comes, and
//! publishes a [`ProxyConfig`](crate::config::ProxyConfig) and a [`Status`]. Without a control plane the last configuration
//! stays in force for ever.
//!
//! `state` holds what is known and decides what is in force; it does no I/O. Parsing is in [`crate::config::parse`].
//!
//! Source: xDS protocol, "Incremental xDS" and "Eventual consistency considerations".

mod backoff;
mod channel;
mod client;
mod node;
mod state;
mod status;
mod trust;

pub use backoff::{FIRST_RETRY, LAST_RETRY};
pub use channel::{CONNECT_TIMEOUT, Dial, MAX_MESSAGE, Transport, XdsChannel};
pub use client::{DENIED_LIMIT, OUTBOX, XdsClient};
pub use node::{BadToken, Node, Token};
pub use state::{MAX_RESOURCES, Rejection, ResourceKind, State, UnknownType};
pub use status::{MAX_NACK_MESSAGE, Nack, Status};
pub use trust::{MAX_TRUSTED, ServerTrust, TrustError};
