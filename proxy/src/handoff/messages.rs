//! What agent and worker say to each other, as serde types; the wire form of [`ConnectionEvent`].

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use culvert_types::{ConnectionEvent, ConnectionKind, Path, RefusalReason, SpiffeId, Verdict};
use serde::{Deserialize, Serialize};

/// Most application sockets in one message: a batch that costs the agent one `setns`, well below `SCM_MAX_FD` (253).
pub const MAX_APP_SOCKETS: u16 = 64;
/// Longest `detail` of an event in bytes; longer ones are cut, so that every message fits a datagram.
const MAX_DETAIL: usize = 512;

/// A text that must not be printed: its `Debug` form is `***`.
#[derive(Clone, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes over `text`.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself. For the wire only, never for a log or an error.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Address family of a socket made for a workload.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`.
    V6,
}

impl Family {
    /// The family of `address`.
    #[must_use]
    pub fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// From the agent to the worker.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ToWorker {
    /// Serve the proxy with this catalog ID: open an xDS stream for it. Idempotent.
    Serve {
        /// Catalog ID of the sidecar.
        proxy: String,
        /// `node.cluster` of the xDS stream: the service's name.
        cluster: String,
        /// Name of this node: instances on it are dialled at their workload's address.
        node: String,
        /// ACL token of the xDS stream.
        token: Option<Secret>,
    },
    /// Drain the proxy, then close it.
    Stop {
        /// Catalog ID of the sidecar.
        proxy: String,
        /// How long live connections may go on, in milliseconds.
        deadline_ms: u64,
    },
    /// Answer to [`ToAgent::OpenListener`]; one listening socket when `Ok`.
    Listener {
        /// Number of the request.
        request: u64,
        /// Why there is no socket.
        result: Result<(), String>,
    },
    /// Answer to [`ToAgent::MoreAppSockets`]: `count` unconnected TCP sockets made in the workload's network namespace.
    AppSockets {
        /// Catalog ID of the sidecar.
        proxy: String,
        /// Family of all of them.
        family: Family,
        /// How many descriptors follow; at most [`MAX_APP_SOCKETS`].
        count: u16,
        /// Why there are fewer than asked for.
        error: Option<String>,
    },
    /// Answer to [`ToAgent::ConnectXds`]; one connected unix stream when `Ok`.
    XdsConnection {
        /// Number of the request.
        request: u64,
        /// Why there is no stream.
        result: Result<(), String>,
    },
    /// Say [`ToAgent::Pong`] once every thread has had a turn.
    Ping,
    /// Drain the whole worker, then exit.
    Drain {
        /// How long live connections may go on, in milliseconds.
        deadline_ms: u64,
    },
}

/// From the worker to the agent.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ToAgent {
    /// First message on every control socket.
    Hello {
        /// Process ID of the worker.
        pid: u32,
        /// Version of the worker.
        version: String,
    },
    /// Re-adoption: a listening socket that this worker already holds; one descriptor.
    Adopt {
        /// Catalog ID of the sidecar.
        proxy: String,
        /// The address it was opened for.
        address: SocketAddr,
    },
    /// Please listen on `address` in the network namespace of the proxy's workload.
    OpenListener {
        /// Number of the request, unique while the socket lives.
        request: u64,
        /// Catalog ID of the sidecar.
        proxy: String,
        /// Where to listen.
        address: SocketAddr,
    },
    /// Please make `count` unconnected sockets in the network namespace of the proxy's workload.
    MoreAppSockets {
        /// Catalog ID of the sidecar.
        proxy: String,
        /// Family of all of them.
        family: Family,
        /// How many; at most [`MAX_APP_SOCKETS`].
        count: u16,
    },
    /// Please connect me to the xDS server.
    ConnectXds {
        /// Number of the request, unique while the socket lives.
        request: u64,
    },
    /// Something happened to a connection. Of workers that came before [`Self::Events`].
    Event(EventRecord),
    /// What happened to connections, in order. Together they fit a message: see [`EventRecord::room`].
    Events(Vec<EventRecord>),
    /// Events that were dropped because the agent read too slowly, since the last such message.
    EventsLost {
        /// How many.
        count: u64,
    },
    /// Answer to [`ToWorker::Ping`].
    Pong,
    /// State of one proxy, sent whenever it changes.
    Status(ProxyStatus),
    /// What one proxy carries. Sent every few seconds while it has connections, and before [`Self::Stopped`].
    Traffic {
        /// Catalog ID of the sidecar.
        proxy: String,
        /// Both sides.
        traffic: Traffic,
    },
    /// The proxy was drained and is gone: all its sockets are closed.
    Stopped {
        /// Catalog ID of the sidecar.
        proxy: String,
    },
}

/// State of one proxy.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyStatus {
    /// Catalog ID of the sidecar.
    pub proxy: String,
    /// Every listener of the configuration in force.
    pub listeners: Vec<ListenerStatus>,
    /// Version of the configuration in force; `None` before the first.
    pub xds_version: Option<String>,
    /// The resource refused last, while the refusal stands.
    pub nack: Option<Nack>,
    /// End of the leaf certificate's life, seconds since 1970.
    pub certificate_not_after: Option<u64>,
    /// Configuration is there and every listener accepts.
    pub ready: bool,
}

/// What a proxy carries, by side.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Traffic {
    /// From the mesh to the application.
    pub inbound: SideTraffic,
    /// From the application to upstreams.
    pub outbound: SideTraffic,
}

/// What one side of a proxy carries.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SideTraffic {
    /// Connections that are open now.
    pub open: u64,
    /// Payload toward the called application since this agent came, in bytes, of open and ended connections.
    pub bytes_to_destination: u64,
    /// Payload toward the caller, likewise.
    pub bytes_to_source: u64,
}

/// State of one listener.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerStatus {
    /// Name of the xDS resource.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// It accepts.
    pub ready: bool,
    /// Why it does not.
    pub error: Option<String>,
}

/// A refused xDS resource.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Nack {
    /// Its name.
    pub resource: String,
    /// Why.
    pub reason: String,
}

/// Wire form of [`ConnectionEvent`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "field by field the same as ConnectionEvent; times in micro- and milliseconds")]
pub struct EventRecord {
    pub at_us: u64,
    pub kind: String,
    pub path: String,
    pub verdict: String,
    pub source: Option<String>,
    pub destination: Option<String>,
    pub reporter: String,
    pub inbound: bool,
    pub rule: Option<String>,
    pub reason: Option<String>,
    pub detail: Option<String>,
    pub peer: Option<SocketAddr>,
    pub bytes_to_destination: u64,
    pub bytes_to_source: u64,
    pub duration_us: u64,
}

/// A field of an [`EventRecord`] holds a word outside its set.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("event field {field}: unknown value {value:?}")]
pub struct EventError {
    /// The field.
    pub field: &'static str,
    /// The value.
    pub value: String,
}

impl EventRecord {
    /// Most bytes that it takes in a message, whatever its texts are made of.
    pub(crate) fn room(&self) -> usize {
        /// Names of fields, numbers, and the words of closed sets.
        const REST: usize = 640;
        /// A control character, as JSON escapes it.
        const ESCAPED: usize = 6;
        let texts = [&self.source, &self.destination, &self.rule, &self.detail].into_iter().flatten();
        REST + ESCAPED * (self.reporter.len() + texts.map(String::len).sum::<usize>())
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
            at_us: micros(event.at.duration_since(UNIX_EPOCH).unwrap_or_default()),
            kind: kind.to_owned(),
            path: event.path.as_str().to_owned(),
            verdict: event.verdict.as_str().to_owned(),
            source: event.source.as_ref().map(ToString::to_string),
            destination: event.destination.as_ref().map(ToString::to_string),
            reporter: event.reporter.clone(),
            inbound: event.inbound,
            rule: event.rule.clone(),
            reason: event.reason.map(|reason| reason.as_str().to_owned()),
            detail: event.detail.as_deref().map(|detail| cut(detail).to_owned()),
            peer: event.peer,
            bytes_to_destination: event.bytes_to_destination,
            bytes_to_source: event.bytes_to_source,
            duration_us: micros(event.duration),
        }
    }
}

impl TryFrom<EventRecord> for ConnectionEvent {
    type Error = EventError;

    fn try_from(record: EventRecord) -> Result<Self, EventError> {
        let unknown = |field, value: &str| EventError { field, value: cut(value).to_owned() };
        let kind = match record.kind.as_str() {
            "open" => ConnectionKind::Open,
            "close" => ConnectionKind::Close,
            "refuse" => ConnectionKind::Refuse,
            other => return Err(unknown("kind", other)),
        };
        let path = [Path::Direct, Path::Proxied].into_iter().find(|path| path.as_str() == record.path);
        let verdict = [Verdict::Allow, Verdict::Deny].into_iter().find(|verdict| verdict.as_str() == record.verdict);
        let reason = record.reason.as_deref().map(|text| {
            REASONS.into_iter().find(|reason| reason.as_str() == text).ok_or_else(|| unknown("reason", text))
        });
        let id = |field, text: Option<String>| {
            text.map(|text| SpiffeId::parse(&text).map_err(|_| unknown(field, &text))).transpose()
        };
        Ok(Self {
            at: UNIX_EPOCH.checked_add(Duration::from_micros(record.at_us)).unwrap_or(SystemTime::UNIX_EPOCH),
            kind,
            path: path.ok_or_else(|| unknown("path", &record.path))?,
            verdict: verdict.ok_or_else(|| unknown("verdict", &record.verdict))?,
            source: id("source", record.source)?,
            destination: id("destination", record.destination)?,
            reporter: record.reporter,
            inbound: record.inbound,
            rule: record.rule,
            reason: reason.transpose()?,
            detail: record.detail,
            peer: record.peer,
            bytes_to_destination: record.bytes_to_destination,
            bytes_to_source: record.bytes_to_source,
            duration: Duration::from_micros(record.duration_us),
        })
    }
}

/// Every reason; a test holds it complete.
const REASONS: [RefusalReason; 10] = [
    RefusalReason::Intention,
    RefusalReason::Revoked,
    RefusalReason::ClientCertificate,
    RefusalReason::ServerCertificate,
    RefusalReason::Handshake,
    RefusalReason::NoHealthyInstance,
    RefusalReason::Connect,
    RefusalReason::Limit,
    RefusalReason::Unauthorised,
    RefusalReason::Spoofed,
];

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The longest prefix of at most [`MAX_DETAIL`] bytes that ends at a character.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_DETAIL);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Fails to compile when a reason is added; then `REASONS` needs it too.
    fn position(reason: RefusalReason) -> usize {
        match reason {
            RefusalReason::Intention => 0,
            RefusalReason::Revoked => 1,
            RefusalReason::ClientCertificate => 2,
            RefusalReason::ServerCertificate => 3,
            RefusalReason::Handshake => 4,
            RefusalReason::NoHealthyInstance => 5,
            RefusalReason::Connect => 6,
            RefusalReason::Limit => 7,
            RefusalReason::Unauthorised => 8,
            RefusalReason::Spoofed => 9,
        }
    }

    #[test]
    fn every_reason_survives_the_wire() {
        for (index, reason) in REASONS.into_iter().enumerate() {
            assert_eq!(position(reason), index);
        }
    }

    proptest! {
        #[test]
        fn events_survive_the_wire(
            at in 0u64..u64::MAX / 2, bytes in any::<(u64, u64)>(), duration in 0u64..u64::MAX / 2, inbound: bool,
            reason in proptest::option::of(0usize..10), kind in 0usize..3, allow: bool, detail in proptest::option::of(".{0,200}"),
        ) {
            let event = ConnectionEvent {
                at: UNIX_EPOCH + Duration::from_micros(at),
                kind: [ConnectionKind::Open, ConnectionKind::Close, ConnectionKind::Refuse][kind],
                path: Path::Proxied,
                verdict: if allow { Verdict::Allow } else { Verdict::Deny },
                source: Some(SpiffeId::parse("spiffe://td.consul/ns/default/dc/dc1/svc/web").expect("valid")),
                destination: None,
                reporter: "api-sidecar-proxy".to_owned(),
                inbound,
                rule: Some("default".to_owned()),
                reason: reason.map(|index| REASONS[index]),
                detail: detail.map(|detail| cut(&detail).to_owned()),
                peer: Some("[::1]:80".parse().expect("address")),
                bytes_to_destination: bytes.0,
                bytes_to_source: bytes.1,
                duration: Duration::from_micros(duration),
            };
            let wire = serde_json::to_vec(&ToAgent::Event(EventRecord::from(&event))).expect("serialise");
            let ToAgent::Event(record) = serde_json::from_slice(&wire).expect("parse") else { panic!("another message") };
            prop_assert!(wire.len() <= record.room());
            prop_assert_eq!(ConnectionEvent::try_from(record).expect("known words"), event);
        }
    }

    #[test]
    fn unknown_words_and_fields_are_refused() {
        assert!(serde_json::from_str::<ToAgent>(r#"{"connect_xds":{"request":1,"extra":2}}"#).is_err());
        assert!(serde_json::from_str::<ToAgent>(r#"{"no_such":{}}"#).is_err());
    }

    #[test]
    fn a_token_is_never_printed() {
        let serve = ToWorker::Serve {
            proxy: "p".to_owned(),
            cluster: "c".to_owned(),
            node: "n".to_owned(),
            token: Some(Secret::new("hunter2".to_owned())),
        };
        assert!(!format!("{serve:?}").contains("hunter2"));
        assert!(serde_json::to_string(&serve).expect("serialise").contains("hunter2"));
    }
}
