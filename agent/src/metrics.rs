//! Metrics of the node beside connections: certificates, applied configuration, the worker.

use culvert_control::Control;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::events::EventHub;
use crate::worker::{WorkerHandle, WorkerView};

/// Adds the node's metrics to the exposition of `hub`.
pub(crate) fn register(hub: &EventHub, worker: &WorkerHandle, control: &Control) {
    let view = worker.view();
    hub.register(|registry| registry.register_collector(Box::new(WorkerMetrics { view })));
    hub.register(|registry| control.register_metrics(registry));
}

/// What the worker last said, read when somebody asks.
#[derive(Debug)]
struct WorkerMetrics {
    view: tokio::sync::watch::Receiver<WorkerView>,
}

impl Collector for WorkerMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let view = self.view.borrow().clone();
        let number = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let restarts = number(view.restarts);
        let descriptor = encoder.encode_descriptor(
            "worker_restarts",
            "Starts of the worker after the first",
            None,
            restarts.metric_type(),
        )?;
        restarts.encode(descriptor)?;
        let mut family = encoder.encode_descriptor(
            "leaf_not_after",
            "End of the certificate of each sidecar, seconds since 1970",
            Some(&Unit::Seconds),
            restarts.metric_type(),
        )?;
        for proxy in view.proxies.values() {
            let Some(end) = proxy.certificate_not_after else { continue };
            number(end).encode(family.encode_family(&[("proxy", proxy.proxy.as_str())])?)?;
        }
        let mut family = encoder.encode_descriptor(
            "xds_applied",
            "1 for the xDS version each proxy has in force",
            None,
            restarts.metric_type(),
        )?;
        for proxy in view.proxies.values() {
            let labels = [("proxy", proxy.proxy.as_str()), ("version", proxy.xds_version.as_deref().unwrap_or("none"))];
            number(1).encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor(
            "proxy_ready",
            "1 when the worker accepts for the proxy",
            None,
            restarts.metric_type(),
        )?;
        for proxy in view.proxies.values() {
            number(u64::from(proxy.ready)).encode(family.encode_family(&[("proxy", proxy.proxy.as_str())])?)?;
        }
        let mut family = encoder.encode_descriptor(
            "proxy_failures",
            "How often the worker gave up a proxy that it should serve",
            None,
            restarts.metric_type(),
        )?;
        for (proxy, failures) in &view.proxy_failures {
            number(*failures).encode(family.encode_family(&[("proxy", proxy.as_str())])?)?;
        }
        Ok(())
    }
}
