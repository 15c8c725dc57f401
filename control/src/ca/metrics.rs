//! What the authority tells about itself: certificates signed and refused, and when the ones in use end.

use std::time::SystemTime;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use culvert_types::ServiceName;

use super::rows::seconds;
use super::view::Roots;

/// Counters and gauges. Cheap to clone; clones share their values.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    signed: Counter,
    refused: Family<RefusedLabels, Counter>,
    roots: Gauge,
    root_end: Gauge,
    leaf_end: Family<LeafLabels, Gauge>,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RefusedLabels {
    reason: RefusalLabel,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct LeafLabels {
    service: String,
}

/// Why a request was not signed.
#[derive(Clone, Copy, Debug, EncodeLabelValue, Eq, Hash, PartialEq)]
pub(crate) enum RefusalLabel {
    RateLimit,
    Request,
    NotRegistered,
    Internal,
}

impl Metrics {
    /// Adds everything to `registry`, under names that start with `ca_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("ca");
        registry.register("leaf_certificates_signed", "Leaf certificates signed", self.signed.clone());
        registry.register("requests_refused", "Certificate requests refused", self.refused.clone());
        registry.register("roots", "Roots that are trusted", self.roots.clone());
        let (root_end, leaf_end) = (self.root_end.clone(), self.leaf_end.clone());
        let at = "seconds since 1970";
        registry.register_with_unit("root_not_after", format!("End of the active root, {at}"), Unit::Seconds, root_end);
        let help = format!("End of the leaf of a service of this node, {at}");
        registry.register_with_unit("leaf_not_after", help, Unit::Seconds, leaf_end);
    }

    pub(crate) fn signed(&self) {
        self.signed.inc();
    }

    pub(crate) fn refused(&self, reason: RefusalLabel) {
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }

    pub(crate) fn show_roots(&self, roots: &Roots) {
        self.roots.set(i64::try_from(roots.roots.len()).unwrap_or(i64::MAX));
        if let Some(active) = roots.active() {
            self.root_end.set(gauge(active.not_after));
        }
    }

    /// `None`: this node keeps no leaf of the service any more.
    pub(crate) fn show_leaf(&self, service: &ServiceName, end: Option<SystemTime>) {
        let labels = LeafLabels { service: service.to_string() };
        match end {
            Some(end) => {
                self.leaf_end.get_or_create(&labels).set(gauge(end));
            }
            None => {
                self.leaf_end.remove(&labels);
            }
        }
    }
}

fn gauge(time: SystemTime) -> i64 {
    i64::try_from(seconds(time)).unwrap_or(i64::MAX)
}
