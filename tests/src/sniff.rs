//! A packet socket that looks at what goes to and from one workload.

use std::io::Read as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::socket::{getsockopt, setsockopt, sockopt::RcvBufForce};
use nix::{getsockopt_impl, libc, sockopt_impl};
use socket2::{Domain, Protocol, Socket, Type};

/// `ETH_P_ALL` in network order.
const EVERYTHING: i32 = (0x0003_u16).to_be() as i32;
/// Packets wait here while the thread looks at others.
const BUFFER: usize = 32 << 20;
/// For looking at what has arrived before the end.
const DRAIN: Duration = Duration::from_secs(10);

sockopt_impl!(
    /// How many packets came and how many of them were dropped, since it was last asked for (packet(7)).
    PacketStatistics, GetOnly, libc::SOL_PACKET, libc::PACKET_STATISTICS, libc::tpacket_stats
);

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Packets that begin with a TLS record.
    pub tls: usize,
    /// Packets that hold a marker in plain text.
    pub plain: usize,
}

/// Sees every packet of the interfaces of the network namespace that it was started in.
#[derive(Debug)]
pub struct Sniffer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

impl Sniffer {
    /// Looks at TCP packets to and from `addresses`, for `markers` in their payload, from now on.
    ///
    /// # Errors
    /// Without the right to.
    pub fn start(addresses: &[IpAddr], markers: &'static [&'static [u8]]) -> anyhow::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(EVERYTHING)));
        let socket = socket.context("open a packet socket")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        setsockopt(&socket, RcvBufForce, &BUFFER)?;
        let (stop, addresses) = (Arc::new(AtomicBool::new(false)), addresses.to_vec());
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || watch(socket, &addresses, markers, &stop)
        });
        Ok(Self { stop, thread })
    }

    /// What was seen until now.
    ///
    /// # Errors
    /// When not all packets could be looked at.
    pub fn finish(self) -> anyhow::Result<Seen> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread that looked at packets panicked"))?
    }
}

fn watch(mut socket: Socket, addresses: &[IpAddr], markers: &[&[u8]], stop: &AtomicBool) -> anyhow::Result<Seen> {
    let (mut seen, mut frame) = (Seen::default(), vec![0; 65536 + 64]);
    let mut until = None;
    loop {
        // What has arrived before the end is looked at.
        if stop.load(Ordering::SeqCst) {
            let until = *until.get_or_insert_with(|| Instant::now() + DRAIN);
            ensure!(Instant::now() < until, "packets wait to be looked at after {DRAIN:?} yet");
        }
        let Ok(length) = socket.read(&mut frame) else {
            if until.is_some() {
                let kernel = getsockopt(&socket, PacketStatistics)?;
                ensure!(
                    kernel.tp_drops == 0,
                    "nobody has looked at {} of {} packets",
                    kernel.tp_drops,
                    kernel.tp_packets
                );
                return Ok(seen);
            }
            continue;
        };
        let Some(payload) = tcp_payload(&frame[..length], addresses) else { continue };
        // TLS records: handshake or application data, version 3.x (RFC 8446 §5.1).
        seen.tls += usize::from(matches!(payload, [0x16 | 0x17, 3, ..]));
        seen.plain += usize::from(markers.iter().any(|marker| holds(payload, marker)));
    }
}

fn holds(payload: &[u8], marker: &[u8]) -> bool {
    let mut rest = payload;
    while let Some(at) = rest.iter().position(|byte| *byte == marker[0]) {
        rest = &rest[at..];
        if rest.starts_with(marker) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// The payload of a TCP packet to or from one of `addresses`.
fn tcp_payload<'a>(frame: &'a [u8], addresses: &[IpAddr]) -> Option<&'a [u8]> {
    let packet = frame.get(14..)?;
    let ends_at = |at: usize, address: &IpAddr| match address {
        IpAddr::V4(address) => packet.get(at..at + 4).is_some_and(|octets| octets == address.octets()),
        IpAddr::V6(address) => packet.get(at..at + 16).is_some_and(|octets| octets == address.octets()),
    };
    let (ends, segment) = match frame.get(12..14)? {
        [0x08, 0x00] if packet.get(9)? == &6 => ([12, 16], packet.get(usize::from(packet[0] & 0x0f) * 4..)?),
        // An extension header before TCP would be somebody else's.
        [0x86, 0xdd] if packet.get(6)? == &6 => ([8, 24], packet.get(40..)?),
        _ => return None,
    };
    let of_family = |address: &&IpAddr| address.is_ipv4() == (ends[0] == 12);
    let ours = addresses.iter().filter(of_family).any(|address| ends.iter().any(|at| ends_at(*at, address)));
    if !ours {
        return None;
    }
    segment.get(usize::from(segment.get(12)? >> 4) * 4..)
}
