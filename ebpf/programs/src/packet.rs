//! Reading packets at the veth: Ethernet, ARP, IPv4, IPv6 with its extension headers. Whatever cannot be read is none.

use aya_ebpf::programs::TcContext;
use culvert_ebpf_common::{Address, FlowKey, Mac, Workload};

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
pub const ICMPV6: u16 = 58;

/// Length of the Ethernet header.
const ETHERNET: usize = 14;
/// Extension headers that are walked; RFC 8200 §4.1 knows of six in a sane packet.
const MAX_EXTENSIONS: u32 = 6;

/// Ethernet header. This and the following are aligned to two bytes, like everything in a frame.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub destination: Mac,
    pub source: Mac,
    /// Network order.
    kind: u16,
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Arp {
    hardware: u16,
    protocol: u16,
    hardware_length: u8,
    protocol_length: u8,
    operation: u16,
    pub sender_mac: Mac,
    sender_ip: [u16; 2],
    target_mac: Mac,
    target_ip: [u16; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv4 {
    version_and_length: u8,
    service: u8,
    total_length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: [u16; 2],
    destination: [u16; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv6 {
    version: u8,
    flow_label: [u8; 3],
    payload_length: u16,
    next: u8,
    hops: u8,
    source: [u16; 8],
    destination: [u16; 8],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Tcp {
    ports: [u16; 2],
    numbers: [u16; 4],
    offset: u8,
    flags: u8,
}

/// Flags of a TCP header.
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// A segment of TCP over IP without options, extensions or fragments, whose headers lie in place: what goes on all the time,
/// recognised at little cost. Headers of a frame made on this node always lie in place.
#[derive(Clone, Copy)]
pub struct Segment {
    pub ethernet: Ethernet,
    pub flow: FlowKey,
    flags: u8,
    /// The sequence number is zero.
    first: bool,
}

impl Segment {
    /// The segment in a frame, if it is such a plain one.
    #[inline(always)]
    pub fn peek(ctx: &TcContext) -> Option<Self> {
        let ethernet = peek::<Ethernet>(ctx, 0)?;
        let (source, destination, tcp) = match ethernet.kind() {
            ETHERTYPE_IPV4 => {
                let header = peek::<Ipv4>(ctx, ETHERNET)?;
                let fragment = u16::from_be(header.fragment) & 0x3fff != 0;
                if header.version_and_length != 0x45 || header.protocol != 6 || fragment {
                    return None;
                }
                let tcp = peek::<Tcp>(ctx, ETHERNET + size_of::<Ipv4>())?;
                (Address::v4(word(header.source)), Address::v4(word(header.destination)), tcp)
            }
            ETHERTYPE_IPV6 => {
                let header = peek::<Ipv6>(ctx, ETHERNET)?;
                let (source, destination) = (words(header.source), words(header.destination));
                if header.version >> 4 != 6 || header.next != 6 || is_mapped(&source, &destination) {
                    return None;
                }
                (source, destination, peek::<Tcp>(ctx, ETHERNET + size_of::<Ipv6>())?)
            }
            _ => return None,
        };
        let [source_port, destination_port] = [u16::from_be(tcp.ports[0]), u16::from_be(tcp.ports[1])];
        let flow = FlowKey { source, destination, source_port, destination_port };
        let first = tcp.numbers[0] | tcp.numbers[1] == 0;
        Some(Self { ethernet, flow, flags: tcp.flags, first })
    }

    /// Does it open a connection?
    #[inline(always)]
    pub fn opens(&self) -> bool {
        opens(self.flags)
    }

    /// Does it open a connection, or accept or refuse one? A refusal has the sequence number zero (RFC 9293 §3.5.2).
    #[inline(always)]
    pub fn begins(&self) -> bool {
        self.flags & SYN != 0 || self.flags & RST != 0 && self.first
    }
}

/// Does a segment with these flags open a connection?
#[inline(always)]
pub fn opens(flags: u8) -> bool {
    flags & (SYN | ACK) == SYN
}

/// IPv4 addresses in an IPv6 header: on the wire these are forbidden (RFC 4291 §2.5.5.2), and in our tables they mean IPv4.
#[inline(always)]
fn is_mapped(source: &Address, destination: &Address) -> bool {
    source.is_v4() || destination.is_v4()
}

/// What lies at `offset`, if that part of the frame can be read in place: the headers of a frame made on this node always can.
#[inline(always)]
fn peek<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    let at = ctx.data() + offset;
    if at + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: inside the frame, as just checked; every bit pattern is valid in the types of this file, and their alignment is
    // two, as a frame's.
    Some(unsafe { *(at as *const T) })
}

/// What lies at `offset`, read in place or fetched.
#[inline(always)]
fn read<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    match peek(ctx, offset) {
        Some(found) => Some(found),
        None => ctx.load(offset).ok(),
    }
}

/// An IP packet.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Addresses; the ports are zero until [`Packet::read_ports`].
    pub flow: FlowKey,
    /// IP protocol number, after extension headers.
    pub protocol: u16,
    /// Where that protocol's header begins.
    pub transport: usize,
    /// Not the first fragment: the protocol's header is in another packet.
    pub later_fragment: bool,
    /// Extension headers, or fragmentation, come before the protocol's header.
    pub extended: bool,
}

impl Ethernet {
    /// The Ethernet header.
    #[inline(always)]
    pub fn read(ctx: &TcContext) -> Option<Self> {
        read(ctx, 0)
    }

    /// The Ethernet type, in host order.
    #[inline(always)]
    pub fn kind(&self) -> u16 {
        u16::from_be(self.kind)
    }

    /// Is the frame for `workload`, or for a group, and not its own that the bridge has sent back? (Its own for itself is what
    /// it sends to its published port, translated on the way.)
    #[inline(always)]
    pub fn is_for(&self, workload: &Workload) -> bool {
        let group = self.destination.halves[0].to_ne_bytes()[0] & 1 != 0;
        if group { !self.source.same(&workload.mac) } else { self.destination.same(&workload.mac) }
    }
}

impl Arp {
    /// An ARP packet of the one kind there is on Ethernet.
    #[inline(always)]
    pub fn read(ctx: &TcContext) -> Option<Self> {
        let arp: Self = read(ctx, ETHERNET)?;
        let usual = arp.hardware == 1_u16.to_be()
            && arp.protocol == ETHERTYPE_IPV4.to_be()
            && arp.hardware_length == 6
            && arp.protocol_length == 4;
        usual.then_some(arp)
    }

    /// Who says so.
    #[inline(always)]
    pub fn sender(&self) -> Address {
        Address::v4(word(self.sender_ip))
    }

    /// Who is asked for, or told.
    #[inline(always)]
    pub fn target(&self) -> Address {
        Address::v4(word(self.target_ip))
    }
}

#[inline(always)]
fn word(halves: [u16; 2]) -> u32 {
    u32::from(halves[0]) | u32::from(halves[1]) << 16
}

#[inline(always)]
fn words(halves: [u16; 8]) -> Address {
    Address::v6([
        word([halves[0], halves[1]]),
        word([halves[2], halves[3]]),
        word([halves[4], halves[5]]),
        word([halves[6], halves[7]]),
    ])
}

impl Packet {
    /// The IP packet in a frame of type `kind`.
    #[inline(always)]
    pub fn read(ctx: &TcContext, kind: u16) -> Option<Self> {
        match kind {
            ETHERTYPE_IPV4 => Self::read_v4(ctx),
            ETHERTYPE_IPV6 => Self::read_v6(ctx),
            _ => None,
        }
    }

    #[inline(always)]
    fn read_v4(ctx: &TcContext) -> Option<Self> {
        let header: Ipv4 = read(ctx, ETHERNET)?;
        let length = usize::from(header.version_and_length & 0xf) * 4;
        if header.version_and_length >> 4 != 4 || length < size_of::<Ipv4>() {
            return None;
        }
        let fragment = u16::from_be(header.fragment);
        Some(Self {
            flow: flow(Address::v4(word(header.source)), Address::v4(word(header.destination))),
            protocol: u16::from(header.protocol),
            transport: ETHERNET + length,
            later_fragment: fragment & 0x1fff != 0,
            extended: fragment & 0x3fff != 0,
        })
    }

    #[inline(always)]
    fn read_v6(ctx: &TcContext) -> Option<Self> {
        let header: Ipv6 = read(ctx, ETHERNET)?;
        if header.version >> 4 != 6 {
            return None;
        }
        let (source, destination) = (words(header.source), words(header.destination));
        if is_mapped(&source, &destination) {
            return None;
        }
        let mut packet = Self {
            flow: flow(source, destination),
            protocol: u16::from(header.next),
            transport: ETHERNET + size_of::<Ipv6>(),
            later_fragment: false,
            extended: false,
        };
        packet.skip_extensions(ctx)?;
        Some(packet)
    }

    /// Walks extension headers (RFC 8200 §4) up to the transport's.
    #[inline(always)]
    fn skip_extensions(&mut self, ctx: &TcContext) -> Option<()> {
        let mut walked = 0;
        while walked < MAX_EXTENSIONS {
            let length = match self.protocol {
                // Hop-by-hop, routing, destination options.
                0 | 43 | 60 => usize::from(self.extension(ctx)?[1]) * 8 + 8,
                // Fragment.
                44 => {
                    let header = self.extension(ctx)?;
                    self.later_fragment = u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0;
                    8
                }
                // Authentication.
                51 => usize::from(self.extension(ctx)?[1]) * 4 + 8,
                _ => return Some(()),
            };
            self.protocol = u16::from(self.extension(ctx)?[0]);
            self.transport += length;
            self.extended = true;
            if self.later_fragment {
                return Some(());
            }
            walked += 1;
        }
        None
    }

    #[inline(always)]
    fn extension(&self, ctx: &TcContext) -> Option<[u8; 4]> {
        ctx.load(self.transport).ok()
    }

    /// Reads the ports of TCP or UDP into the flow.
    #[inline(always)]
    pub fn read_ports(&mut self, ctx: &TcContext) -> Option<()> {
        let ports: [u16; 2] = ctx.load(self.transport).ok()?;
        self.flow.source_port = u16::from_be(ports[0]);
        self.flow.destination_port = u16::from_be(ports[1]);
        Some(())
    }
}

#[inline(always)]
fn flow(source: Address, destination: Address) -> FlowKey {
    FlowKey { source, destination, source_port: 0, destination_port: 0 }
}
