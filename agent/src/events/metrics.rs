//! Metrics of connections. Labels come from closed sets, and those that a worker names are bounded: it may be compromised.
//!
//! Connections of the direct path that are open, and their bytes, follow from events. Those of the proxied path are what the
//! worker says it carries: its connections may be older than this agent, and it may be killed with them.

use std::collections::{HashMap, HashSet};

use culvert_proxy::handoff::{SideTraffic, Traffic};
use culvert_types::{ConnectionEvent, ConnectionKind, Path, Verdict};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::label::Label;

/// Direct connections of one service and side that are remembered as open (8 bytes each); more are not counted.
const MAX_DIRECT: usize = 262_144;

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Side {
    service: String,
    side: &'static str,
    path: &'static str,
}

impl Side {
    fn of(service: &str, inbound: bool, path: Path) -> Self {
        let side = if inbound { "inbound" } else { "outbound" };
        Self { service: service.to_owned(), side, path: path.as_str() }
    }
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
    services: Label,
    rules: Label,
    /// Direct connections whose beginning was told and whose end was not, by their cookies.
    direct: Mutex<HashMap<Side, HashSet<u64>>>,
    /// What was last said, by proxy and side.
    carried: Mutex<HashMap<(String, bool), Carried>>,
}

/// What one side of one proxy is known to carry.
#[derive(Debug)]
struct Carried {
    side: Side,
    last: SideTraffic,
}

impl ConnectionMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            opened: Family::default(),
            open: Family::default(),
            refused: Family::default(),
            bytes: Family::default(),
            lost: Counter::default(),
            services: Label::default(),
            rules: Label::default(),
            direct: Mutex::default(),
            carried: Mutex::default(),
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
            "Payload, by direction; that of the direct path when a connection ends",
            Unit::Bytes,
            metrics.bytes.clone(),
        );
        registry.register("events_lost", "Events dropped because a queue was full", metrics.lost.clone());
        metrics
    }

    pub(super) fn lost(&self, count: u64) {
        self.lost.inc_by(count);
    }

    /// `cookie` ties the events of one direct connection together.
    pub(super) fn count(&self, service: &str, event: &ConnectionEvent, cookie: Option<u64>) {
        let side = Side::of(&self.services.value(service), event.inbound, event.path);
        match event.kind {
            ConnectionKind::Open => {
                self.opened.get_or_create(&side).inc();
            }
            ConnectionKind::Close if event.path == Path::Direct => {
                self.payload(&side, "to_destination", event.bytes_to_destination);
                self.payload(&side, "to_source", event.bytes_to_source);
            }
            ConnectionKind::Close | ConnectionKind::Refuse => {}
        }
        if let Some(cookie) = cookie {
            self.direct(&side, event.kind, cookie);
        }
        if event.verdict == Verdict::Deny {
            self.refuse(side, event);
        }
    }

    /// An end without a beginning, of a connection that is older than this agent, changes nothing.
    fn direct(&self, side: &Side, kind: ConnectionKind, cookie: u64) {
        let mut direct = self.direct.lock();
        let open = direct.entry(side.clone()).or_default();
        match kind {
            ConnectionKind::Open if open.len() < MAX_DIRECT => drop(open.insert(cookie)),
            ConnectionKind::Close => drop(open.remove(&cookie)),
            ConnectionKind::Open | ConnectionKind::Refuse => {}
        }
        self.open.get_or_create(side).set(i64::try_from(open.len()).unwrap_or(i64::MAX));
    }

    pub(super) fn traffic(&self, proxy: &str, service: &str, traffic: &Traffic) {
        let mut carried = self.carried.lock();
        for (inbound, now) in [(true, traffic.inbound), (false, traffic.outbound)] {
            let known = carried.entry((proxy.to_owned(), inbound)).or_insert_with(|| {
                let side = Side::of(service, inbound, Path::Proxied);
                Carried { side, last: SideTraffic::default() }
            });
            self.carry(known, now);
        }
    }

    pub(super) fn no_traffic(&self, proxy: Option<&str>) {
        self.carried.lock().retain(|(owner, _), known| {
            let gone = proxy.is_none_or(|proxy| proxy == owner);
            if gone {
                self.carry(known, SideTraffic { open: 0, ..known.last });
            }
            !gone
        });
    }

    fn carry(&self, known: &mut Carried, now: SideTraffic) {
        let Carried { side, last } = known;
        let open = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.open.get_or_create(side).inc_by(open(now.open) - open(last.open));
        last.open = now.open;
        // Never less: a listener that goes may be missing in one report.
        for (direction, last, now) in [
            ("to_destination", &mut last.bytes_to_destination, now.bytes_to_destination),
            ("to_source", &mut last.bytes_to_source, now.bytes_to_source),
        ] {
            self.payload(side, direction, now.saturating_sub(*last));
            *last = now.max(*last);
        }
    }

    fn payload(&self, side: &Side, direction: &'static str, count: u64) {
        let Side { service, side, path } = side.clone();
        self.bytes.get_or_create(&Bytes { service, side, path, direction }).inc_by(count);
    }

    fn refuse(&self, side: Side, event: &ConnectionEvent) {
        let Side { service, side, path } = side;
        let reason = event.reason.map_or("unknown", culvert_types::RefusalReason::as_str);
        let rule = event.rule.as_deref().map(|rule| self.rules.value(rule)).unwrap_or_default();
        self.refused.get_or_create(&Refusal { service, side, path, reason, rule }).inc();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use culvert_types::SpiffeId;

    use super::*;
    use crate::events::label::OTHER;

    fn metrics() -> (ConnectionMetrics, Registry) {
        let mut registry = Registry::default();
        (ConnectionMetrics::register(&mut registry), registry)
    }

    fn value(registry: &Registry, name: &str, labels: &[&str]) -> i64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).expect("text");
        let is = |line: &&str| {
            line.split_once('{').is_some_and(|(start, _)| start == name)
                && labels.iter().all(|label| line.contains(label))
        };
        let values = text.lines().filter(is).map(|line| line.rsplit(' ').next().expect("a value"));
        values.map(|value| value.parse::<i64>().expect("a number")).sum()
    }

    fn event(kind: ConnectionKind, path: Path) -> ConnectionEvent {
        ConnectionEvent {
            at: SystemTime::now(),
            kind,
            path,
            verdict: Verdict::Allow,
            source: SpiffeId::parse("spiffe://td/ns/default/dc/dc1/svc/web").ok(),
            destination: None,
            reporter: "web-sidecar-proxy".to_owned(),
            inbound: false,
            rule: None,
            reason: None,
            detail: None,
            peer: None,
            bytes_to_destination: 5,
            bytes_to_source: 7,
            duration: Duration::ZERO,
        }
    }

    fn carries(open: u64, bytes: u64) -> Traffic {
        let outbound = SideTraffic { open, bytes_to_destination: bytes, bytes_to_source: 2 * bytes };
        Traffic { outbound, ..Traffic::default() }
    }

    #[test]
    fn events_count_what_is_direct_and_the_worker_what_it_carries() {
        let (metrics, registry) = metrics();
        let direct = ["path=\"direct\"", "service=\"web\""];
        let proxied = ["path=\"proxied\"", "service=\"web\"", "side=\"outbound\""];
        for path in [Path::Direct, Path::Proxied] {
            let count = |kind, cookie| {
                metrics.count("web", &event(kind, path), (path == Path::Direct).then_some(cookie));
            };
            count(ConnectionKind::Open, 1);
            count(ConnectionKind::Open, 2);
            count(ConnectionKind::Close, 1);
        }
        assert_eq!(value(&registry, "connections_open", &direct), 1);
        assert_eq!(value(&registry, "payload_bytes_total", &direct), 12);
        assert_eq!(value(&registry, "connections_total", &proxied), 2);
        assert_eq!(value(&registry, "connections_open", &proxied), 0, "whatever is lost or older than the agent");
        metrics.traffic("web-1", "web", &carries(3, 100));
        metrics.traffic("web-2", "web", &carries(1, 10));
        metrics.traffic("web-1", "web", &carries(2, 150));
        assert_eq!(value(&registry, "connections_open", &proxied), 3, "two instances of one service");
        let to_destination = [&proxied[..], &["to_destination"]].concat();
        assert_eq!(value(&registry, "payload_bytes_total", &to_destination), 160, "while they are open");
    }

    #[test]
    fn the_end_of_a_connection_that_is_older_than_the_agent_takes_nothing_away() {
        let (metrics, registry) = metrics();
        let open = || value(&registry, "connections_open", &["path=\"direct\"", "service=\"web\""]);
        let count = |kind, cookie| metrics.count("web", &event(kind, Path::Direct), Some(cookie));
        count(ConnectionKind::Close, 1);
        assert_eq!(open(), 0);
        count(ConnectionKind::Open, 2);
        count(ConnectionKind::Close, 1);
        assert_eq!(open(), 1);
        count(ConnectionKind::Close, 2);
        assert_eq!(open(), 0);
        assert_eq!(
            value(&registry, "payload_bytes_total", &["to_destination"]),
            15,
            "their bytes are told all the same"
        );
    }

    #[test]
    fn a_proxy_or_worker_that_is_gone_has_nothing_open_and_its_bytes_stay() {
        let (metrics, registry) = metrics();
        for proxy in ["web-1", "web-2"] {
            metrics.traffic(proxy, "web", &carries(4, 100));
        }
        metrics.no_traffic(Some("web-1"));
        assert_eq!(value(&registry, "connections_open", &[]), 4);
        metrics.no_traffic(None);
        assert_eq!(value(&registry, "connections_open", &[]), 0);
        metrics.traffic("web-1", "web", &carries(1, 1)); // the successor counts from zero
        assert_eq!(value(&registry, "connections_open", &[]), 1);
        assert_eq!(value(&registry, "payload_bytes_total", &["to_destination"]), 201);
    }

    #[test]
    fn a_worker_that_makes_up_names_does_not_fill_the_memory() {
        let (metrics, registry) = metrics();
        let refused = |service: &str, rule: String| {
            let mut event = event(ConnectionKind::Refuse, Path::Proxied);
            (event.verdict, event.rule) = (Verdict::Deny, Some(rule));
            metrics.count(service, &event, None);
        };
        let count = |labels: &[&str]| value(&registry, "refusals_total", labels);
        refused("web", "a => web (deny)".to_owned());
        for made_up in 0..2 * Label::MOST {
            refused(&format!("made-up-{made_up}"), made_up.to_string());
        }
        refused("web", "a => web (deny)".to_owned());
        refused("web", "x".repeat(1 << 20));
        assert_eq!(count(&["service=\"web\"", "a => web (deny)"]), 2, "what was known before is told apart still");
        assert_eq!(count(&[&format!("service=\"{OTHER}\",")]), 1 + i64::try_from(Label::MOST).expect("few"));
        assert_eq!(count(&[&format!("rule=\"{OTHER}\"")]), 2 + i64::try_from(Label::MOST).expect("few"));
    }

    /// IDs of instances are chosen by whoever registers them.
    #[test]
    fn no_name_breaks_out_of_its_label() {
        let (metrics, registry) = metrics();
        metrics.traffic("web-1", "we\"b\\} 1", &carries(3, 100));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        let label = r#"{service="we\"b\\} 1",side="outbound",path="proxied"} 3"#;
        assert!(text.contains(&format!("connections_open{label}")), "{text}");
    }
}
