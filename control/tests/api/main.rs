//! The HTTP API over real sockets.

mod authority;
mod blocking;
mod client;
mod connect;
mod conventions;
mod life;
mod nomad;
mod services;
