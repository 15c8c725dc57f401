//! A packet socket that looks at what goes to and from one address.

use std::io::Read as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

/// `ETH_P_ALL` in network order.
const EVERYTHING: i32 = (0x0003_u16).to_be() as i32;
/// What the counting service's requests and answers hold.
const PAYLOAD: [&[u8]; 2] = [b"GET / HTTP/1.1", b"\"count\":"];

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Packets that begin with a TLS record.
    pub tls: usize,
    /// Packets that hold the payload in plain text.
    pub plain: usize,
}

/// Sees every packet of this network namespace's interfaces.
pub struct Sniffer {
    socket: Socket,
}

impl Sniffer {
    /// Opens the packet socket.
    ///
    /// # Errors
    /// Without the right to.
    pub fn new() -> anyhow::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(EVERYTHING)));
        let socket = socket.context("open a packet socket")?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { socket })
    }

    /// Looks at packets to and from `address` for a while.
    ///
    /// # Errors
    /// None so far; a packet that cannot be read is passed over.
    pub fn watch(mut self, address: Ipv4Addr, time: Duration) -> anyhow::Result<Seen> {
        let (started, mut seen, mut frame) = (Instant::now(), Seen::default(), vec![0; 65536]);
        while started.elapsed() < time {
            let Ok(length) = self.socket.read(&mut frame) else { continue };
            let Some(payload) = tcp_payload(&frame[..length], address) else { continue };
            // TLS records: handshake or application data, version 3.x (RFC 8446 §5.1).
            seen.tls += usize::from(matches!(payload, [0x16 | 0x17, 3, ..]));
            let plain = PAYLOAD.iter().any(|text| payload.windows(text.len()).any(|window| window == *text));
            seen.plain += usize::from(plain);
        }
        Ok(seen)
    }
}

/// The payload of an IPv4 TCP packet to or from `address`.
fn tcp_payload(frame: &[u8], address: Ipv4Addr) -> Option<&[u8]> {
    let packet = frame.get(14..)?;
    if frame.get(12..14)? != [0x08, 0x00] || packet.get(9)? != &6 {
        return None;
    }
    let end = |at: usize| packet.get(at..at + 4).is_some_and(|octets| octets == address.octets());
    if !end(12) && !end(16) {
        return None;
    }
    let segment = packet.get(usize::from(packet[0] & 0x0f) * 4..)?;
    segment.get(usize::from(segment.get(12)? >> 4) * 4..)
}
