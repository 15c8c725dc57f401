//! What the programs tell the agent, through the ring buffer.

use crate::tables::FlowKey;

/// Kinds of events, [`Event::kind`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum EventKind {
    /// A direct connection was established.
    Open = 1,
    /// It ended; bytes and duration are final.
    Close = 2,
    /// A direct connection was chosen, and did not come to be: refused, timed out, or given up.
    Fail = 3,
    /// A packet to a guarded port without leave.
    Refused = 4,
    /// A packet whose source is not its sender's own.
    Spoofed = 5,
    /// An authorised connection found no listening socket of the application.
    NoListener = 6,
    /// A connection was left to the worker because the table knows no listening socket of the instance. Tells of no failure: the
    /// agent looks whether there is one.
    Unlisted = 7,
}

impl EventKind {
    /// The kind with this number, if this version knows it.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Open,
            2 => Self::Close,
            3 => Self::Fail,
            4 => Self::Refused,
            5 => Self::Spoofed,
            6 => Self::NoListener,
            7 => Self::Unlisted,
            _ => return None,
        })
    }
}

/// `IPPROTO_TCP`.
pub const PROTOCOL_TCP: u16 = 6;
/// `IPPROTO_UDP`.
pub const PROTOCOL_UDP: u16 = 17;

/// One event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// When, on the boot clock.
    pub at: u64,
    /// Payload bytes from the caller to the called.
    pub bytes_to_destination: u64,
    /// Payload bytes back.
    pub bytes_to_source: u64,
    /// How long the connection was established, in nanoseconds.
    pub duration: u64,
    /// Cookie of the caller's socket: ties open and close together. Zero for packets.
    pub cookie: u64,
    /// An [`EventKind`].
    pub kind: u32,
    /// Who calls, or 0.
    pub source_workload: u32,
    /// Who is called, or 0.
    pub destination_workload: u32,
    /// The destination service, or 0.
    pub service: u32,
    /// Events of this workload left out since the last one told.
    pub suppressed: u32,
    /// The connection, or what could be read of the packet.
    pub flow: FlowKey,
    /// Port of the upstream that the caller had called, or 0.
    pub upstream_port: u16,
    /// IP protocol number, or the Ethernet type (≥ 0x600) of what is not IP.
    pub protocol: u16,
    /// Zero.
    pub reserved: u32,
}
const _: () = assert!(size_of::<Event>() == 104);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: repr(C), integers only, no padding (size asserted beside the definition); every bit pattern is valid.
    unsafe impl aya::Pod for super::Event {}
}

#[cfg(test)]
mod tests {
    use super::EventKind;

    #[test]
    fn kinds_come_back_from_their_numbers() {
        for number in 0..=16 {
            assert!(EventKind::from_number(number).is_none_or(|kind| kind as u32 == number));
        }
        assert_eq!(EventKind::from_number(6), Some(EventKind::NoListener));
        assert_eq!(EventKind::from_number(8), None);
    }
}
