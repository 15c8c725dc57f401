//! Counters of the data plane, and their Prometheus text.
//!
//! Labels come from closed sets only: direction, verdict, reason. The node's agent counts from events; these are what a
//! stand-alone sidecar serves, and what holds when events were dropped.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use culvert_types::{ConnectionEvent, ConnectionKind, RefusalReason};

/// Reasons in the order of their counters.
const REASONS: [RefusalReason; 8] = [
    RefusalReason::Intention,
    RefusalReason::Revoked,
    RefusalReason::ClientCertificate,
    RefusalReason::ServerCertificate,
    RefusalReason::Handshake,
    RefusalReason::NoHealthyInstance,
    RefusalReason::Connect,
    RefusalReason::Limit,
];
const DIRECTIONS: [&str; 2] = ["outbound", "inbound"];

/// All counters.
#[derive(Debug, Default)]
pub struct Metrics {
    directions: [Direction; 2],
    events_lost: AtomicU64,
}

#[derive(Debug, Default)]
struct Direction {
    opened: AtomicU64,
    open: AtomicI64,
    refused: [AtomicU64; REASONS.len()],
    bytes_to_destination: AtomicU64,
    bytes_to_source: AtomicU64,
}

impl Metrics {
    pub(crate) fn count(&self, event: &ConnectionEvent) {
        let direction = &self.directions[usize::from(event.inbound)];
        match event.kind {
            ConnectionKind::Open => {
                direction.opened.fetch_add(1, Relaxed);
                direction.open.fetch_add(1, Relaxed);
            }
            ConnectionKind::Close => {
                direction.open.fetch_sub(1, Relaxed);
                direction.bytes_to_destination.fetch_add(event.bytes_to_destination, Relaxed);
                direction.bytes_to_source.fetch_add(event.bytes_to_source, Relaxed);
            }
            ConnectionKind::Refuse => {}
        }
        let counter = REASONS.iter().position(|reason| event.reason == Some(*reason));
        if let Some(counter) = counter {
            direction.refused[counter].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn event_lost(&self) {
        self.events_lost.fetch_add(1, Relaxed);
    }

    /// Connections open now, both directions.
    #[must_use]
    pub fn open(&self) -> i64 {
        self.directions.iter().map(|direction| direction.open.load(Relaxed)).sum()
    }

    /// The Prometheus text format, version 0.0.4.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, values: &dyn Fn(&mut String)| {
            let _infallible = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            values(&mut text);
        };
        let per_direction = |name: &'static str, value: fn(&Direction) -> i128| {
            move |text: &mut String| {
                for (label, direction) in DIRECTIONS.iter().zip(&self.directions) {
                    let _infallible =
                        writeln!(text, "{name}{{direction=\"{label}\",path=\"proxied\"}} {}", value(direction));
                }
            }
        };
        let opened = "culvert_connections_opened_total";
        family(
            opened,
            "counter",
            "Connections let through.",
            &per_direction(opened, |d| d.opened.load(Relaxed).into()),
        );
        let open = "culvert_connections_open";
        family(open, "gauge", "Connections open now.", &per_direction(open, |d| d.open.load(Relaxed).into()));
        let there = "culvert_bytes_to_destination_total";
        let value: fn(&Direction) -> i128 = |d| d.bytes_to_destination.load(Relaxed).into();
        family(there, "counter", "Payload of closed connections, in bytes.", &per_direction(there, value));
        let back = "culvert_bytes_to_source_total";
        let value: fn(&Direction) -> i128 = |d| d.bytes_to_source.load(Relaxed).into();
        family(back, "counter", "Payload of closed connections, in bytes.", &per_direction(back, value));
        let refused = "culvert_connections_refused_total";
        family(refused, "counter", "Connections refused, or ended by a change of policy.", &|text| {
            for (label, direction) in DIRECTIONS.iter().zip(&self.directions) {
                for (reason, counter) in REASONS.iter().zip(&direction.refused) {
                    let (reason, value) = (reason.as_str(), counter.load(Relaxed));
                    let labels = format!("direction=\"{label}\",path=\"proxied\",reason=\"{reason}\"");
                    let _infallible = writeln!(text, "{refused}{{{labels}}} {value}");
                }
            }
        });
        let lost = "culvert_events_lost_total";
        family(lost, "counter", "Connection events dropped because nobody read them in time.", &|text| {
            let _infallible = writeln!(text, "{lost} {}", self.events_lost.load(Relaxed));
        });
        text
    }
}
