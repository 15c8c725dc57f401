//! The destination's side: which socket gets a packet that belongs to no connection yet.
//!
//! Runs in the workload's namespace before the ordinary search for a listener, and so also before a listener bound to
//! `0.0.0.0`. A packet that is not let through finds no socket, and the kernel answers a SYN with a reset: the caller gets
//! `ECONNREFUSED` at once.

use aya_ebpf::maps::SockHash;
use aya_ebpf::programs::SkLookupContext;
use culvert_ebpf_common::event::{PROTOCOL_TCP, PROTOCOL_UDP};
use culvert_ebpf_common::{
    Address, Admission, Arrival, EventKind, FAMILY_V4, FAMILY_V6, FlowKey, LISTENER_SLOTS, ListenerKey, SOME_WORKLOAD,
    Source, admit,
};

use crate::tables::{LISTENERS, STEERED, authorised, field, port_kind, words, workload_by_address};
use crate::tell;

/// Pass (with or without a socket assigned), or drop?
#[inline(always)]
pub fn lookup(ctx: &SkLookupContext) -> bool {
    let (flow, family, protocol) = read(ctx);
    if flow.destination.is_loopback() {
        return true;
    }
    let own = flow.source.same(&flow.destination);
    let Some(workload) = workload_by_address(&flow.destination).filter(|workload| workload.id != SOME_WORKLOAD) else {
        // An address that the workload gave itself. Datagrams were judged on the veth; a connection has no business there.
        return own || protocol != PROTOCOL_TCP;
    };
    let kind = port_kind(workload.id, flow.destination_port);
    if kind == 0 {
        return true;
    }
    let caller = if own { None } else { workload_by_address(&flow.source) };
    let source = match (own, caller) {
        (true, _) => Source::Own,
        (false, Some(_)) => Source::Workload,
        (false, None) => Source::Outside,
    };
    let arrival = if protocol == PROTOCOL_UDP {
        Arrival::Udp
    } else if authorised(&flow, workload.id) {
        Arrival::TcpAuthorised
    } else {
        Arrival::Tcp
    };
    let refusal = match admit(kind, source, arrival) {
        Admission::Pass => return true,
        Admission::Application => {
            if assign(ctx, &LISTENERS, workload.id, flow.destination_port, family) {
                return true;
            }
            EventKind::NoListener
        }
        Admission::Worker => {
            if assign(ctx, &STEERED, workload.id, flow.destination_port, family) {
                return true;
            }
            EventKind::NoListener
        }
        Admission::Refuse => EventKind::Refused,
    };
    let caller = caller.map_or(0, |caller| caller.id);
    tell::packet(refusal, &flow, protocol, caller, workload.id, workload.id);
    false
}

#[inline(always)]
fn read(ctx: &SkLookupContext) -> (FlowKey, u8, u16) {
    let lookup = ctx.lookup;
    let v4 = field!(lookup, family) == u32::from(FAMILY_V4);
    // All of them, before it is asked which: a volatile load in a branch is still merged with that of the other branch.
    let (source4, destination4) = (Address::v4(field!(lookup, remote_ip4)), Address::v4(field!(lookup, local_ip4)));
    let (source6, destination6) = (Address::v6(words!(lookup, remote_ip6)), Address::v6(words!(lookup, local_ip6)));
    let (source, destination) = if v4 { (source4, destination4) } else { (source6, destination6) };
    let flow = FlowKey {
        source,
        destination,
        source_port: u16::from_be(field!(lookup, remote_port)),
        destination_port: field!(lookup, local_port) as u16,
    };
    (flow, if v4 { FAMILY_V4 } else { FAMILY_V6 }, field!(lookup, protocol) as u16)
}

/// Hands the packet to the first listening socket that takes it.
#[inline(always)]
fn assign(ctx: &SkLookupContext, sockets: &SockHash<ListenerKey>, workload: u32, port: u16, family: u8) -> bool {
    let mut slot = 0;
    while slot < LISTENER_SLOTS {
        if sockets.redirect_sk_lookup(ctx, ListenerKey { workload, port, family, slot }, 0).is_ok() {
            return true;
        }
        // An IPv6 socket takes IPv4 too, unless it says it does not: then the kernel refuses the assignment.
        if family == FAMILY_V4
            && sockets.redirect_sk_lookup(ctx, ListenerKey { workload, port, family: FAMILY_V6, slot }, 0).is_ok()
        {
            return true;
        }
        slot += 1;
    }
    false
}
