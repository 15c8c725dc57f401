//! The worker's way to the rest of the agent.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use culvert_control::{Control, XdsPeer};
use culvert_proxy::handoff::Traffic;
use culvert_types::ConnectionEvent;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tracing::warn;

use crate::events::EventHub;
use crate::policy::PolicyEngine;
use crate::worker::Surroundings;

/// See the module.
pub(super) struct NodeSurroundings {
    pub(super) control: Arc<Control>,
    pub(super) control_runtime: Handle,
    pub(super) runtime: Handle,
    pub(super) policy: Arc<PolicyEngine>,
    pub(super) hub: Arc<EventHub>,
}

impl Surroundings for NodeSurroundings {
    fn connect_xds(&self, stream: UnixStream) {
        let _on_threads_without_capabilities = self.control_runtime.enter();
        self.control.serve_xds(stream, XdsPeer::Node);
    }

    fn inbound_listener(&self, proxy: &str, port: u16, listener: BorrowedFd<'_>) {
        let listener: OwnedFd = match listener.as_fd().try_clone_to_owned() {
            Ok(listener) => listener,
            Err(error) => return warn!(%error, proxy, "a listener cannot be steered to"),
        };
        let (policy, proxy) = (Arc::clone(&self.policy), proxy.to_owned());
        self.runtime.spawn(async move { policy.listener_opened(&proxy, port, listener).await });
    }

    fn event(&self, service: &str, event: ConnectionEvent) {
        self.hub.publish(service, event);
    }

    fn traffic(&self, proxy: &str, service: &str, traffic: &Traffic) {
        self.hub.traffic(proxy, service, traffic);
    }

    fn no_traffic(&self, proxy: Option<&str>) {
        self.hub.no_traffic(proxy);
    }

    fn events_lost(&self, count: u64) {
        self.hub.lost(count);
    }
}
