//! Metrics of connections. Labels come from closed sets and from services registered on this node, never from peers.

use culvert_types::{ConnectionEvent, ConnectionKind, Verdict};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Side {
    service: String,
    side: &'static str,
    path: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Refusal {
    service: String,
    side: &'static str,
    path: &'static str,
    reason: &'static str,
    rule: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Bytes {
    service: String,
    side: &'static str,
    path: &'static str,
    direction: &'static str,
}

#[derive(Debug)]
pub(super) struct ConnectionMetrics {
    opened: Family<Side, Counter>,
    open: Family<Side, Gauge>,
    refused: Family<Refusal, Counter>,
    bytes: Family<Bytes, Counter>,
    lost: Counter,
}

impl ConnectionMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            opened: Family::default(),
            open: Family::default(),
            refused: Family::default(),
            bytes: Family::default(),
            lost: Counter::default(),
        };
        registry.register(
            "connections",
            "Connections let through, by the path their bytes take",
            metrics.opened.clone(),
        );
        registry.register("connections_open", "Connections open now", metrics.open.clone());
        registry.register("refusals", "Connections refused or ended by policy, with the rule", metrics.refused.clone());
        registry.register_with_unit(
            "payload",
            "Payload of ended connections, by direction",
            Unit::Bytes,
            metrics.bytes.clone(),
        );
        registry.register("events_lost", "Events dropped because a queue was full", metrics.lost.clone());
        metrics
    }

    pub(super) fn lost(&self, count: u64) {
        self.lost.inc_by(count);
    }

    pub(super) fn count(&self, service: &str, event: &ConnectionEvent) {
        let side = Side {
            service: service.to_owned(),
            side: if event.inbound { "inbound" } else { "outbound" },
            path: event.path.as_str(),
        };
        match event.kind {
            ConnectionKind::Open => {
                self.opened.get_or_create(&side).inc();
                self.open.get_or_create(&side).inc();
            }
            ConnectionKind::Close => {
                self.open.get_or_create(&side).dec();
                self.payload(&side, "to_destination", event.bytes_to_destination);
                self.payload(&side, "to_source", event.bytes_to_source);
            }
            ConnectionKind::Refuse => {}
        }
        if event.verdict == Verdict::Deny {
            self.refuse(side, event);
        }
    }

    fn payload(&self, side: &Side, direction: &'static str, count: u64) {
        let Side { service, side, path } = side.clone();
        self.bytes.get_or_create(&Bytes { service, side, path, direction }).inc_by(count);
    }

    fn refuse(&self, side: Side, event: &ConnectionEvent) {
        let Side { service, side, path } = side;
        let reason = event.reason.map_or("unknown", culvert_types::RefusalReason::as_str);
        let rule = event.rule.clone().unwrap_or_default();
        self.refused.get_or_create(&Refusal { service, side, path, reason, rule }).inc();
    }
}
