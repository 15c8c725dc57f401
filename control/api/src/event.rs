//! Connection events: one JSON object per line of `GET /v1/culvert/observe`.

use std::net::SocketAddr;
use std::time::Duration;

use culvert_types::{ConnectionEvent, ConnectionKind};
use serde::{Deserialize, Serialize};

use crate::value::Timestamp;

/// A [`ConnectionEvent`] on the wire.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "field by field the same as ConnectionEvent")]
pub struct EventRecord {
    pub at: Timestamp,
    /// `open`, `close`, `refuse`; `lost` tells of events that this observer was too slow for.
    pub kind: String,
    pub path: String,
    pub verdict: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    pub reporter: String,
    pub inbound: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    pub bytes_to_destination: u64,
    pub bytes_to_source: u64,
    pub duration_micros: u64,
}

/// A line that is no event.
#[derive(Debug, thiserror::Error)]
#[error("not an event: {line:?}")]
pub struct EventRecordError {
    /// The line.
    pub line: String,
    /// What is wrong with it.
    #[source]
    pub source: serde_json::Error,
}

impl EventRecord {
    /// Reads one line.
    ///
    /// # Errors
    /// [`EventRecordError`] with the line.
    pub fn parse(line: &str) -> Result<Self, EventRecordError> {
        serde_json::from_str(line).map_err(|source| EventRecordError { line: line.to_owned(), source })
    }

    /// Tells an observer that it missed `count` events.
    #[must_use]
    pub fn lost(count: u64) -> Self {
        let detail = Some(format!("{count} events were lost: the observer reads too slowly"));
        Self { at: std::time::SystemTime::now().into(), kind: "lost".to_owned(), detail, ..Self::default() }
    }
}

impl From<&ConnectionEvent> for EventRecord {
    fn from(event: &ConnectionEvent) -> Self {
        let kind = match event.kind {
            ConnectionKind::Open => "open",
            ConnectionKind::Close => "close",
            ConnectionKind::Refuse => "refuse",
        };
        Self {
            at: event.at.into(),
            kind: kind.to_owned(),
            path: event.path.as_str().to_owned(),
            verdict: event.verdict.as_str().to_owned(),
            source: event.source.as_ref().map(ToString::to_string),
            destination: event.destination.as_ref().map(ToString::to_string),
            reporter: event.reporter.clone(),
            inbound: event.inbound,
            rule: event.rule.clone(),
            reason: event.reason.map(|reason| reason.as_str().to_owned()),
            detail: event.detail.clone(),
            peer: event.peer,
            bytes_to_destination: event.bytes_to_destination,
            bytes_to_source: event.bytes_to_source,
            duration_micros: micros(event.duration),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
