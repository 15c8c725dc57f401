//! What a proxy is told, and how: xDS resources, the client that fetches them, bootstrap files and command lines.

mod bootstrap;
mod client;
mod fake;
mod rbac;
mod recorded;
mod refusals;
mod resources;
mod state;
