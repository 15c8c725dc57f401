//! Where the connection events of both paths meet: counted once, then handed to whoever observes.
//!
//! Kernel events (direct path) and worker events (proxied path) arrive here as [`ConnectionEvent`]s. Owns the metrics of
//! connections and the broadcast behind `culvert observe`; keeps no history.

mod label;
mod metrics;

use std::sync::Arc;

use culvert_proxy::handoff::Traffic;
use culvert_types::ConnectionEvent;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::sync::broadcast;

use metrics::ConnectionMetrics;

/// Events an observer may lag behind before it loses some (it is told how many).
const OBSERVER_BACKLOG: usize = 4096;

/// The meeting point of all connection events of this node.
#[derive(Debug)]
pub struct EventHub {
    observers: broadcast::Sender<Arc<ConnectionEvent>>,
    metrics: ConnectionMetrics,
    registry: Mutex<Registry>,
}

impl EventHub {
    /// A hub that counts into a registry of its own.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("culvert");
        let metrics = ConnectionMetrics::register(&mut registry);
        Arc::new(Self { observers: broadcast::Sender::new(OBSERVER_BACKLOG), metrics, registry: Mutex::new(registry) })
    }

    /// Counts `event` and passes it on. `service` is the local service whose side reports, for the metric label.
    pub fn publish(&self, service: &str, event: ConnectionEvent) {
        self.metrics.count(service, &event, None);
        self.observed(event);
    }

    /// As [`EventHub::publish`], for the beginning or end of a direct connection; `cookie` tells which one.
    pub fn publish_direct(&self, service: &str, event: ConnectionEvent, cookie: u64) {
        self.metrics.count(service, &event, Some(cookie));
        self.observed(event);
    }

    fn observed(&self, event: ConnectionEvent) {
        // Nobody observing is the usual case, not an error.
        drop(self.observers.send(Arc::new(event)));
    }

    /// What `proxy` carries for `service`: connections that are open, and bytes since this agent attends to its worker.
    pub fn traffic(&self, proxy: &str, service: &str, traffic: &Traffic) {
        self.metrics.traffic(proxy, service, traffic);
    }

    /// This proxy carries nothing any more, or none does.
    pub fn no_traffic(&self, proxy: Option<&str>) {
        self.metrics.no_traffic(proxy);
    }

    /// Events the worker could not deliver because its queue was full.
    pub fn lost(&self, count: u64) {
        self.metrics.lost(count);
    }

    /// All events from now on. A receiver that lags is told how many it lost.
    #[must_use]
    pub fn observe(&self) -> broadcast::Receiver<Arc<ConnectionEvent>> {
        self.observers.subscribe()
    }

    /// Lets another component add its metrics to this node's exposition.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock());
    }

    /// The exposition in OpenMetrics text.
    ///
    /// # Errors
    /// Only if a metric cannot be formatted.
    pub fn exposition(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry.lock())?;
        Ok(text)
    }
}
