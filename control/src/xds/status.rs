//! Which proxies are connected, what they run, what they refused: for metrics and for people.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::render::Kind;
use super::session::Refusal;

/// What is known of a connected proxy.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ProxyStatus {
    /// The version of all resources together that the proxy has acknowledged, or refused in part.
    pub version: String,
    /// What it refused last, by kind, until it accepts a response of that kind.
    pub refusals: BTreeMap<Kind, Refusal>,
}

/// The connected proxies. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Status {
    proxies: Arc<Mutex<BTreeMap<String, (u64, ProxyStatus)>>>,
    metrics: Metrics,
}

#[derive(Clone, Debug, Default)]
struct Metrics {
    streams: Gauge,
    refused_streams: Counter,
    responses: Family<KindLabels, Counter>,
    refusals: Family<KindLabels, Counter>,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct KindLabels {
    kind: KindLabel,
}

#[derive(Clone, Copy, Debug, EncodeLabelValue, Eq, Hash, PartialEq)]
enum KindLabel {
    Cluster,
    Endpoints,
    Listener,
}

impl From<Kind> for KindLabels {
    fn from(kind: Kind) -> Self {
        let kind = match kind {
            Kind::Cluster => KindLabel::Cluster,
            Kind::Endpoints => KindLabel::Endpoints,
            Kind::Listener => KindLabel::Listener,
        };
        Self { kind }
    }
}

impl Status {
    /// Adds its metrics to `registry`, under names that start with `xds_`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("xds");
        let metrics = self.metrics.clone();
        registry.register("streams", "Open streams of proxies", metrics.streams);
        registry.register(
            "streams_refused",
            "Streams that were refused or ended by the server",
            metrics.refused_streams,
        );
        registry.register("responses", "Responses sent to proxies", metrics.responses);
        registry.register("refusals", "Responses that proxies refused (NACK)", metrics.refusals);
    }

    /// Every connected proxy by ID.
    #[must_use]
    pub fn proxies(&self) -> BTreeMap<String, ProxyStatus> {
        self.proxies.lock().iter().map(|(id, (_, status))| (id.clone(), status.clone())).collect()
    }

    /// Enters a stream; it is taken out when the result is dropped.
    pub(super) fn enter(&self, proxy: &str) -> Entry {
        self.metrics.streams.inc();
        let mut proxies = self.proxies.lock();
        let (streams, _) = proxies.entry(proxy.to_owned()).or_default();
        *streams += 1;
        Entry { status: self.clone(), proxy: proxy.to_owned() }
    }

    pub(super) fn refused_stream(&self) {
        self.metrics.refused_streams.inc();
    }
}

/// One stream of a proxy.
pub(super) struct Entry {
    status: Status,
    proxy: String,
}

impl Entry {
    pub(super) fn sent(&self, kind: Kind) {
        self.status.metrics.responses.get_or_create(&kind.into()).inc();
    }

    pub(super) fn accepted(&self, kind: Kind) {
        self.change(|status| {
            status.refusals.remove(&kind);
        });
    }

    pub(super) fn refused(&self, refusal: Refusal) {
        self.status.metrics.refusals.get_or_create(&refusal.kind.into()).inc();
        self.change(|status| {
            status.refusals.insert(refusal.kind, refusal);
        });
    }

    pub(super) fn runs(&self, version: &str) {
        self.change(|status| {
            if status.version != version {
                version.clone_into(&mut status.version);
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut ProxyStatus)) {
        if let Some((_, status)) = self.status.proxies.lock().get_mut(&self.proxy) {
            change(status);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.status.metrics.streams.dec();
        let mut proxies = self.status.proxies.lock();
        if let Some((streams, _)) = proxies.get_mut(&self.proxy) {
            *streams -= 1;
            if *streams == 0 {
                proxies.remove(&self.proxy);
            }
        }
    }
}
