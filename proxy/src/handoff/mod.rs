//! The control socket between agent and worker: messages, descriptors, both ends.
//!
//! One `SOCK_SEQPACKET` unix socket per worker. A datagram is one JSON message of at most [`MAX_MESSAGE`] bytes; the
//! descriptors it speaks of travel with it as `SCM_RIGHTS`, in the order the message says. The agent makes the socket with
//! [`ControlSocket::pair`] and gives one end to the worker it starts; a worker that lost its agent calls the next one at
//! [`ADOPTION_SOCKET`], where the agent waits with an [`AdoptionListener`].
//!
//! Left out: who may ask for what. The agent checks every request of the worker against its own records; the worker is
//! the less trusted end.

mod messages;
mod socket;

pub use messages::{
    EventError, EventRecord, Family, ListenerStatus, MAX_APP_SOCKETS, Nack, ProxyStatus, Secret, SideTraffic, ToAgent,
    ToWorker, Traffic,
};
pub use socket::{
    ADOPTION_SOCKET, AdoptionListener, ControlSocket, MAX_DESCRIPTORS, MAX_MESSAGE, Message, PeerCredentials,
    ReceiveError, SendError,
};
