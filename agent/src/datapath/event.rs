//! What the kernel programs tell: read from the ring, made into types, handed on through a bounded channel.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use aya::maps::{MapData, RingBuf};
use culvert_ebpf_common::event::{PROTOCOL_TCP, PROTOCOL_UDP};
use culvert_ebpf_common::{Event, EventKind, FlowKey};
use tokio::io::Interest;
use tokio::sync::mpsc;
use tracing::warn;

use super::clock;
use crate::sys::watch;

/// Events that wait for the agent; further ones are counted and left out. More than the ring holds.
pub const EVENT_QUEUE: usize = 16_384;
/// After a look into the ring, the next one comes no sooner. Meanwhile the kernel wakes the agent once: a wake-up, with its
/// interrupt, for each event would cost a new connection more than the kernel programs do. The ring holds what comes in this time
/// many times over.
const REST: Duration = Duration::from_millis(10);

/// A connection, or a packet that would have opened one, seen from the side that calls.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Flow {
    /// Who calls.
    pub source: SocketAddr,
    /// Who is called.
    pub destination: SocketAddr,
}

impl From<FlowKey> for Flow {
    fn from(key: FlowKey) -> Self {
        Self {
            source: SocketAddr::new(IpAddr::from(key.source), key.source_port),
            destination: SocketAddr::new(IpAddr::from(key.destination), key.destination_port),
        }
    }
}

/// A direct connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DirectConnection {
    /// When it happened.
    pub at: SystemTime,
    /// Ties the events of one connection together.
    pub cookie: u64,
    /// The connection on the wire.
    pub flow: Flow,
    /// Workload that calls.
    pub source: u32,
    /// Workload that is called.
    pub destination: u32,
    /// Destination service, as in [`super::Upstream::service`].
    pub service: u32,
    /// Port of the upstream that the caller had asked for.
    pub upstream_port: u16,
}

/// A packet that was not let through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DroppedPacket {
    /// When it happened.
    pub at: SystemTime,
    /// What could be read of it; an address that could not is unspecified.
    pub flow: Flow,
    /// What kind of packet.
    pub protocol: Protocol,
    /// Workload that sent it, where known.
    pub source: Option<u32>,
    /// Workload that it was for, where known.
    pub destination: Option<u32>,
    /// Further packets of the same workload that were not told since the last one that was.
    pub suppressed: u32,
}

/// Kind of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// IP with this protocol number, or what is not IP with its Ethernet type (≥ 0x600).
    Other(u16),
}

/// Something that the kernel programs saw.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KernelEvent {
    /// A direct connection was established.
    Open(DirectConnection),
    /// It ended.
    Close {
        /// Which.
        connection: DirectConnection,
        /// Payload bytes from the caller to the called.
        bytes_to_destination: u64,
        /// Payload bytes back.
        bytes_to_source: u64,
        /// How long it was established.
        duration: Duration,
    },
    /// A direct connection was attempted and not established: refused, timed out, or given up.
    Fail(DirectConnection),
    /// A packet to a guarded port without leave.
    Refused(DroppedPacket),
    /// A packet whose source is not its sender's own.
    Spoofed(DroppedPacket),
    /// A connection that was let through found nobody listening.
    NoListener(DroppedPacket),
}

/// A record of the ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Record {
    /// For the agent.
    Event(KernelEvent),
    /// For ourselves: no listening socket of this workload is known where one was wanted.
    Unlisted(u32),
}

impl Record {
    /// Reads a record; `None` when it is none of ours. `now` and `boot` are the same moment on both clocks.
    fn read(record: &[u8], now: SystemTime, boot: u64) -> Option<Self> {
        let event = decode(record)?;
        let kind = EventKind::from_number(event.kind)?;
        if kind == EventKind::Unlisted {
            return Some(Self::Unlisted(event.destination_workload));
        }
        Some(Self::Event(KernelEvent::from_raw(kind, &event, now, boot)))
    }
}

impl KernelEvent {
    fn from_raw(kind: EventKind, event: &Event, now: SystemTime, boot: u64) -> Self {
        // Later than that moment are those that came while the ring was read.
        let at = if event.at < boot {
            now.checked_sub(Duration::from_nanos(boot - event.at))
        } else {
            now.checked_add(Duration::from_nanos(event.at - boot))
        };
        let at = at.unwrap_or(now);
        let connection = DirectConnection {
            at,
            cookie: event.cookie,
            flow: event.flow.into(),
            source: event.source_workload,
            destination: event.destination_workload,
            service: event.service,
            upstream_port: event.upstream_port,
        };
        let packet = DroppedPacket {
            at,
            flow: event.flow.into(),
            protocol: match event.protocol {
                PROTOCOL_TCP => Protocol::Tcp,
                PROTOCOL_UDP => Protocol::Udp,
                other => Protocol::Other(other),
            },
            source: (event.source_workload != 0).then_some(event.source_workload),
            destination: (event.destination_workload != 0).then_some(event.destination_workload),
            suppressed: event.suppressed,
        };
        match kind {
            EventKind::Open => Self::Open(connection),
            EventKind::Close => Self::Close {
                connection,
                bytes_to_destination: event.bytes_to_destination,
                bytes_to_source: event.bytes_to_source,
                duration: Duration::from_nanos(event.duration),
            },
            EventKind::Fail => Self::Fail(connection),
            EventKind::Refused => Self::Refused(packet),
            EventKind::Spoofed => Self::Spoofed(packet),
            EventKind::NoListener | EventKind::Unlisted => Self::NoListener(packet),
        }
    }
}

/// Takes [`Event`] apart in the order of its fields.
fn decode(record: &[u8]) -> Option<Event> {
    let record: &[u8; size_of::<Event>()] = record.try_into().ok()?;
    let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|index| record[at + index]));
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|index| record[at + index]));
    let half = |at: usize| u16::from_ne_bytes([record[at], record[at + 1]]);
    let address = |at: usize| culvert_ebpf_common::Address::v6(std::array::from_fn(|index| word(at + 4 * index)));
    Some(Event {
        at: long(0),
        bytes_to_destination: long(8),
        bytes_to_source: long(16),
        duration: long(24),
        cookie: long(32),
        kind: word(40),
        source_workload: word(44),
        destination_workload: word(48),
        service: word(52),
        suppressed: word(56),
        flow: FlowKey {
            source: address(60),
            destination: address(76),
            source_port: half(92),
            destination_port: half(94),
        },
        upstream_port: half(96),
        protocol: half(98),
        reserved: word(100),
    })
}

/// Reads the ring until nobody takes events any more. `on_missing_listener` is called with the workload whose listening socket
/// was not found.
pub(super) async fn pump(
    mut ring: RingBuf<MapData>,
    events: mpsc::Sender<KernelEvent>,
    lost: Arc<AtomicU64>,
    mut on_missing_listener: impl FnMut(u32) + Send,
) {
    let readiness = match ring.as_fd().try_clone_to_owned().and_then(|fd| watch(fd, Interest::READABLE)) {
        Ok(readiness) => readiness,
        Err(error) => return warn!(%error, "the kernel's events cannot be awaited; none will be told"),
    };
    loop {
        if let Err(error) = readiness.readable().await.map(|mut ready| ready.clear_ready()) {
            return warn!(%error, "the kernel's events cannot be awaited any more");
        }
        let (now, boot) = (SystemTime::now(), clock::boot());
        while let Some(record) = ring.next() {
            let event = match Record::read(&record, now, boot) {
                Some(Record::Event(event)) => event,
                Some(Record::Unlisted(workload)) => {
                    on_missing_listener(workload);
                    continue;
                }
                None => {
                    warn!(length = record.len(), "an event of the kernel programs that this version does not know");
                    continue;
                }
            };
            if let KernelEvent::NoListener(DroppedPacket { destination: Some(workload), .. }) = event {
                on_missing_listener(workload);
            }
            match events.try_send(event) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(_)) => {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
                Err(mpsc::error::TrySendError::Closed(_)) => return,
            }
        }
        tokio::time::sleep(REST).await;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(event: &Event) -> Vec<u8> {
        let mut bytes = Vec::new();
        for long in [event.at, event.bytes_to_destination, event.bytes_to_source, event.duration, event.cookie] {
            bytes.extend_from_slice(&long.to_ne_bytes());
        }
        for word in [event.kind, event.source_workload, event.destination_workload, event.service, event.suppressed] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        for word in event.flow.source.words.into_iter().chain(event.flow.destination.words) {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        for half in [event.flow.source_port, event.flow.destination_port, event.upstream_port, event.protocol] {
            bytes.extend_from_slice(&half.to_ne_bytes());
        }
        bytes.extend_from_slice(&event.reserved.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_record_becomes_the_event_it_describes() {
        let event = Event {
            at: 900,
            bytes_to_destination: 10,
            bytes_to_source: 20,
            duration: 30,
            cookie: 40,
            kind: EventKind::Close as u32,
            source_workload: 1,
            destination_workload: 2,
            service: 3,
            suppressed: 0,
            flow: FlowKey {
                source: std::net::Ipv4Addr::new(172, 26, 64, 5).into(),
                destination: std::net::Ipv6Addr::LOCALHOST.into(),
                source_port: 50000,
                destination_port: 9001,
            },
            upstream_port: 8080,
            protocol: PROTOCOL_TCP,
            reserved: 0,
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        let read = Record::read(&encode(&event), now, 1000).expect("an event");
        let flow = Flow {
            source: "172.26.64.5:50000".parse().expect("an address"),
            destination: "[::1]:9001".parse().expect("an address"),
        };
        let connection = DirectConnection {
            at: now - Duration::from_nanos(100),
            cookie: 40,
            flow,
            source: 1,
            destination: 2,
            service: 3,
            upstream_port: 8080,
        };
        let duration = Duration::from_nanos(30);
        let close = KernelEvent::Close { connection, bytes_to_destination: 10, bytes_to_source: 20, duration };
        assert_eq!(read, Record::Event(close));
        let KernelEvent::Close { connection, .. } = KernelEvent::from_raw(EventKind::Close, &event, now, 700) else {
            unreachable!("a close")
        };
        assert_eq!(connection.at, now + Duration::from_nanos(200), "it came after the clocks were read");
        let unlisted = Event { kind: EventKind::Unlisted as u32, ..event };
        assert_eq!(Record::read(&encode(&unlisted), now, 1000), Some(Record::Unlisted(2)));
    }

    proptest! {
        #[test]
        fn no_record_brings_the_reader_down(record in proptest::collection::vec(any::<u8>(), 0..256), boot: u64) {
            let event = Record::read(&record, SystemTime::now(), boot);
            prop_assert!(event.is_none() || record.len() == size_of::<Event>());
        }
    }
}
