//! What the control plane counts. The agent registers it: `Control::metrics` adds nothing by itself.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use culvert_types::HealthStatus;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::state::rows::Probe;

/// Counters and gauges of the control plane. Clones share the numbers.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    requests: Family<RequestLabels, Counter>,
    connections: Gauge<i64, AtomicI64>,
    connections_refused: Counter,
    blocked: Gauge<i64, AtomicI64>,
    runs: Family<RunLabels, Counter>,
    changes: Family<ChangeLabels, Counter>,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RequestLabels {
    method: &'static str,
    status: u16,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RunLabels {
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ChangeLabels {
    status: &'static str,
}

impl Metrics {
    /// Adds everything to `registry`, under the prefix that it has.
    pub fn register(&self, registry: &mut Registry) {
        let Inner { requests, connections, connections_refused, blocked, runs, changes } = &*self.inner;
        registry.register("api_requests", "Answered requests of the HTTP API", requests.clone());
        registry.register("api_connections", "Open connections of the HTTP API", connections.clone());
        let help = "Connections of the HTTP API refused because of a limit";
        registry.register("api_connections_refused", help, connections_refused.clone());
        registry.register("api_blocked_reads", "Reads that wait for a change", blocked.clone());
        registry.register("check_runs", "Runs of health checks, by what they found", runs.clone());
        registry.register("check_changes", "Changes of the status of a check, by the new one", changes.clone());
    }

    pub(crate) fn request(&self, method: &'static str, status: u16) {
        self.inner.requests.get_or_create(&RequestLabels { method, status }).inc();
    }

    pub(crate) fn connection_refused(&self) {
        self.inner.connections_refused.inc();
    }

    /// Counts an open connection for as long as the guard lives.
    pub(crate) fn connection(&self) -> Counted {
        Counted::new(&self.inner.connections)
    }

    /// Counts a blocked read for as long as the guard lives.
    pub(crate) fn blocked(&self) -> Counted {
        Counted::new(&self.inner.blocked)
    }

    pub(crate) fn check_ran(&self, probe: &Probe, result: HealthStatus) {
        self.inner.runs.get_or_create(&RunLabels { kind: probe.kind(), result: result.as_str() }).inc();
    }

    pub(crate) fn check_changed(&self, status: HealthStatus) {
        self.inner.changes.get_or_create(&ChangeLabels { status: status.as_str() }).inc();
    }
}

/// One more on a gauge, until dropped.
pub(crate) struct Counted(Gauge<i64, AtomicI64>);

impl Counted {
    fn new(gauge: &Gauge<i64, AtomicI64>) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
