//! The guard at the host's end of a workload's veth.
//!
//! What leaves a workload must come from its own addresses: the direct path trusts source addresses, and so does every
//! neighbour cache. What enters must not open anything that it has no leave for. A veth without an entry lets nothing out, and
//! nothing in but what goes on already.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use culvert_ebpf_common::event::{PROTOCOL_TCP, PROTOCOL_UDP};
use culvert_ebpf_common::{
    Address, Admission, Arrival, EventKind, FlowKey, Mac, Source, WORKLOAD_LOOKUP, Workload, admit, is_application,
};

use crate::packet::{Arp, ETHERTYPE_ARP, Ethernet, ICMPV6, Packet, Segment, opens};
use crate::tables::{authorised, field, port_kind, workload_by_address, workload_by_interface};
use crate::tell;

/// Options of a neighbour discovery message that are looked at; no honest one has more.
const MAX_OPTIONS: u32 = 4;

/// What becomes of a packet from a workload.
pub enum Passage {
    Drop,
    /// On to the bridge.
    Bridge,
    /// Straight to the veth with this interface index.
    Veth(u32),
}

/// A packet from the workload: may it pass, and where?
#[inline(always)]
pub fn from_workload(ctx: &TcContext) -> Passage {
    let interface = field!(ctx.skb.skb, ifindex);
    let Some(workload) = workload_by_interface(interface) else {
        debug!(ctx, "a frame from interface {}, which is no workload's, is dropped", interface);
        return Passage::Drop;
    };
    if let Some(veth) = shortcut(ctx, workload) {
        return Passage::Veth(veth);
    }
    if is_honest(ctx, workload) { Passage::Bridge } else { Passage::Drop }
}

/// The veth of the workload at the other end of a direct connection, for a segment that the workload itself has sent.
///
/// Past the bridge, because the host's packet filter may hang at it (`br_netfilter`) and costs more than all else on the way.
/// What opens a connection, or answers that, still goes by the bridge, so the filter has its say about every connection and
/// its tracking learns of a refusal. An application's port tells direct connections from others: no other connection from a
/// workload gets there. (One that leaves from such a port goes straight as well, which does it no harm.)
#[inline(always)]
fn shortcut(ctx: &TcContext, workload: &Workload) -> Option<u32> {
    let segment = Segment::peek(ctx)?;
    let Segment { ethernet, flow, .. } = &segment;
    let own = ethernet.source.same(&workload.mac) && workload.owns(&flow.source);
    if !own || segment.begins() || field!(ctx.skb.skb, vlan_present) != 0 {
        return None;
    }
    let other = workload_by_address(&flow.destination)?;
    let direct = other.id != workload.id
        && other.ready()
        && other.mac.same(&ethernet.destination)
        && (is_application(port_kind(other.id, flow.destination_port))
            || is_application(port_kind(workload.id, flow.source_port)));
    direct.then_some(other.ifindex)
}

/// Does the packet come from the workload's own addresses?
#[inline(always)]
fn is_honest(ctx: &TcContext, workload: &Workload) -> bool {
    let Some(ethernet) = Ethernet::read(ctx) else { return false };
    let kind = ethernet.kind();
    let own_mac = ethernet.source.same(&workload.mac);
    if field!(ctx.skb.skb, vlan_present) != 0 {
        return spoofed(workload, &nothing(), kind);
    }
    if kind == ETHERTYPE_ARP {
        let Some(arp) = Arp::read(ctx) else { return spoofed(workload, &nothing(), kind) };
        let sender = arp.sender();
        if own_mac && arp.sender_mac.same(&workload.mac) && (sender.same(&workload.address4) || sender.words[3] == 0) {
            return true;
        }
        return spoofed(workload, &FlowKey { source: sender, destination: arp.target(), ..nothing() }, kind);
    }
    let Some(mut packet) = Packet::read(ctx, kind) else { return spoofed(workload, &nothing(), kind) };
    if own_mac && !packet.flow.destination.is_loopback() && is_own(ctx, workload, &packet) {
        return true;
    }
    if is_transport(&packet) {
        packet.read_ports(ctx);
    }
    spoofed(workload, &packet.flow, packet.protocol)
}

/// A packet to the workload: may it pass?
#[inline(always)]
pub fn to_workload(ctx: &TcContext) -> bool {
    let workload = workload_by_interface(field!(ctx.skb.skb, ifindex));
    if let Some(segment) = Segment::peek(ctx) {
        if !segment.opens() {
            return workload.is_none_or(|workload| segment.ethernet.is_for(workload));
        }
    }
    let Some(workload) = workload else { return false };
    let Some(ethernet) = Ethernet::read(ctx) else { return false };
    // The bridge floods what it does not know the way of: nothing that would be worth telling.
    if !ethernet.is_for(workload) || field!(ctx.skb.skb, vlan_present) != 0 {
        return false;
    }
    if ethernet.kind() == ETHERTYPE_ARP {
        return true;
    }
    let Some(mut packet) = Packet::read(ctx, ethernet.kind()) else { return false };
    if packet.flow.destination.is_loopback() || packet.flow.source.is_loopback() || workload.owns(&packet.flow.source) {
        tell::packet(EventKind::Spoofed, &packet.flow, packet.protocol, 0, workload.id, workload.id);
        return false;
    }
    if !is_transport(&packet) {
        return true;
    }
    if packet.read_ports(ctx).is_none() {
        return false;
    }
    if packet.protocol == PROTOCOL_TCP {
        let Ok(flags) = ctx.load::<u8>(packet.transport + 13) else { return false };
        // What belongs to no connection is refused by the lookup.
        if !opens(flags) {
            return true;
        }
    }
    may_open(workload, &packet)
}

/// May this SYN, or datagram, reach its port?
#[inline(always)]
fn may_open(workload: &Workload, packet: &Packet) -> bool {
    let kind = port_kind(workload.id, packet.flow.destination_port);
    if kind == 0 {
        return true;
    }
    let caller = workload_by_address(&packet.flow.source);
    let source = if caller.is_some() { Source::Workload } else { Source::Outside };
    let tcp = packet.protocol == PROTOCOL_TCP;
    let arrival = if !tcp {
        Arrival::Udp
    } else if authorised(&packet.flow, workload.id) {
        Arrival::TcpAuthorised
    } else {
        Arrival::Tcp
    };
    if admit(kind, source, arrival) != Admission::Refuse {
        return true;
    }
    // To be refused, but not here: a packet that is dropped keeps its sender waiting, and the lookup in the namespace, which
    // judges by the same function, answers with a reset.
    if tcp && workload.flags & WORKLOAD_LOOKUP != 0 && workload.owns(&packet.flow.destination) {
        return true;
    }
    let caller = caller.map_or(0, |caller| caller.id);
    tell::packet(EventKind::Refused, &packet.flow, packet.protocol, caller, workload.id, workload.id);
    false
}

/// Does the source address belong to the workload? Link-local and unspecified addresses are for neighbour discovery and
/// multicast listeners alone.
#[inline(always)]
fn is_own(ctx: &TcContext, workload: &Workload, packet: &Packet) -> bool {
    let source = &packet.flow.source;
    if packet.protocol == ICMPV6 && !source.is_v4() {
        if packet.later_fragment {
            return workload.owns(source);
        }
        return icmpv6_is_own(ctx, workload, packet);
    }
    workload.owns(source)
}

/// Is an ICMPv6 message one that the workload may send? It must not speak for the addresses of others, nor as a router.
#[inline(always)]
fn icmpv6_is_own(ctx: &TcContext, workload: &Workload, packet: &Packet) -> bool {
    let source = &packet.flow.source;
    let Ok(kind) = ctx.load::<u8>(packet.transport) else { return false };
    let own = workload.owns(source) || source.is_link_local_v6();
    match kind {
        // Router solicitation, neighbour solicitation; from the unspecified address while an address is being checked.
        133 | 135 => {
            let options = packet.transport + if kind == 133 { 8 } else { 24 };
            !packet.extended && (own || source.is_unspecified()) && options_are_own(ctx, workload, options)
        }
        // Neighbour advertisement: for an own address only.
        136 => {
            let Ok(target) = ctx.load::<[u32; 4]>(packet.transport + 8) else { return false };
            let target = Address::v6(target);
            !packet.extended
                && own
                && (workload.owns(&target) || target.is_link_local_v6() && target.same(source))
                && options_are_own(ctx, workload, packet.transport + 24)
        }
        // Router advertisement, redirect.
        134 | 137 => false,
        // Reports of multicast listeners, which carry a hop-by-hop header.
        131 | 132 | 143 => own || source.is_unspecified(),
        _ => own,
    }
}

/// Do the link-layer addresses in the options (RFC 4861 §4.6.1) belong to the workload?
#[inline(always)]
fn options_are_own(ctx: &TcContext, workload: &Workload, start: usize) -> bool {
    let mut at = start;
    let mut seen = 0;
    while seen < MAX_OPTIONS {
        let Ok(option) = ctx.load::<[u8; 8]>(at) else { return true };
        let (kind, length) = (option[0], usize::from(option[1]) * 8);
        let mac = [option[2], option[3], option[4], option[5], option[6], option[7]];
        if length == 0 || (kind == 1 || kind == 2) && !(length == 8 && Mac::from(mac).same(&workload.mac)) {
            return false;
        }
        at += length;
        seen += 1;
    }
    // Nothing may follow unseen.
    ctx.load::<u8>(at).is_err()
}

/// Has the packet ports?
#[inline(always)]
fn is_transport(packet: &Packet) -> bool {
    !packet.later_fragment && (packet.protocol == PROTOCOL_TCP || packet.protocol == PROTOCOL_UDP)
}

/// Drops, and tells.
#[inline(always)]
fn spoofed(workload: &Workload, flow: &FlowKey, protocol: u16) -> bool {
    let destination = workload_by_address(&flow.destination).map_or(0, |called| called.id);
    tell::packet(EventKind::Spoofed, flow, protocol, workload.id, destination, workload.id);
    false
}

#[inline(always)]
fn nothing() -> FlowKey {
    let unspecified = Address { words: [0; 4] };
    FlowKey { source: unspecified, destination: unspecified, source_port: 0, destination_port: 0 }
}
