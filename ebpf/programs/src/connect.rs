//! The client's side of a direct connection: choosing the instance, and answering getpeername as if nothing had happened.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_sk_storage_delete};
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use culvert_ebpf_common::event::PROTOCOL_TCP;
use culvert_ebpf_common::{
    Address, Connection, EventKind, FAMILY_V4, FAMILY_V6, FlowKey, Instance, MAX_INSTANCES, PHASE_CHOSEN, UpstreamKey,
    Workload, is_application,
};

use crate::tables::{
    CONNECTIONS, QUOTA, SETTINGS, connection, field, listens, now, port_kind, upstream, words, workload_by_address,
    workload_by_netns,
};
use crate::tell;

/// Instances tried for one that listens, before the connection is left to the worker.
const TRIES: u32 = 4;

/// An IPv4 socket connects.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) {
    let sock_addr = ctx.sock_addr;
    let (asked, bound) = (Address::v4(field!(sock_addr, user_ip4)), Address::v4(field!(socket(ctx), src_ip4)));
    if let Some((address, port)) = redirect(ctx, asked, bound, FAMILY_V4) {
        // SAFETY: the context is valid for the program's run; connect4 may write both fields.
        unsafe {
            (*sock_addr).user_ip4 = address.words[3];
            (*sock_addr).user_port = u32::from(port.to_be());
        }
    }
}

/// An IPv6 socket connects, to an IPv6 address or to a v4-mapped one.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) {
    let sock_addr = ctx.sock_addr;
    let (asked, bound) = (Address::v6(words!(sock_addr, user_ip6)), Address::v6(words!(socket(ctx), src_ip6)));
    let family = if asked.is_v4() { FAMILY_V4 } else { FAMILY_V6 };
    if let Some((address, port)) = redirect(ctx, asked, bound, family) {
        // SAFETY: the context is valid for the program's run; connect6 may write these fields.
        unsafe {
            (*sock_addr).user_ip6[0] = address.words[0];
            (*sock_addr).user_ip6[1] = address.words[1];
            (*sock_addr).user_ip6[2] = address.words[2];
            (*sock_addr).user_ip6[3] = address.words[3];
            (*sock_addr).user_port = u32::from(port.to_be());
        }
    }
}

/// Who is the peer of an IPv4 socket?
#[inline(always)]
pub fn getpeername4(ctx: &SockAddrContext) {
    let Some(connection) = connection(socket(ctx), None) else { return };
    let sock_addr = ctx.sock_addr;
    // SAFETY: the context is valid for the program's run; getpeername4 may write both fields.
    unsafe {
        (*sock_addr).user_ip4 = connection.upstream.address.words[3];
        (*sock_addr).user_port = u32::from(connection.upstream.port.to_be());
    }
}

/// Who is the peer of an IPv6 socket?
#[inline(always)]
pub fn getpeername6(ctx: &SockAddrContext) {
    let Some(connection) = connection(socket(ctx), None) else { return };
    let sock_addr = ctx.sock_addr;
    let asked = &connection.upstream.address;
    // SAFETY: the context is valid for the program's run; getpeername6 may write these fields.
    unsafe {
        (*sock_addr).user_ip6[0] = asked.words[0];
        (*sock_addr).user_ip6[1] = asked.words[1];
        (*sock_addr).user_ip6[2] = asked.words[2];
        (*sock_addr).user_ip6[3] = asked.words[3];
        (*sock_addr).user_port = u32::from(connection.upstream.port.to_be());
    }
}

/// Where the connection goes instead, or `None`: left untouched.
#[inline(always)]
fn redirect(ctx: &SockAddrContext, asked: Address, bound: Address, family: u8) -> Option<(Address, u16)> {
    let target = choose(ctx, asked, bound, family);
    if target.is_none() {
        // This socket may have been chosen for before, in a connect that failed: it must not be mistaken now.
        forget(socket(ctx));
    }
    target
}

#[inline(always)]
fn choose(ctx: &SockAddrContext, asked: Address, bound: Address, family: u8) -> Option<(Address, u16)> {
    let (protocol, port) = (field!(ctx.sock_addr, protocol), field!(ctx.sock_addr, user_port));
    if !asked.is_loopback() || protocol != u32::from(PROTOCOL_TCP) {
        return None;
    }
    // SAFETY: the helper accepts this context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let key = UpstreamKey { netns_cookie, address: asked, port: u16::from_be(port as u16), reserved: [0; 3] };
    let settings = SETTINGS.get(0)?;
    let entry = upstream(&key, settings, now())?;
    let source = workload_by_netns(netns_cookie)?;
    if !source.ready() || !may_leave(ctx, source, &bound) {
        return None;
    }
    if over_quota(source.id, settings.auth_cap) {
        debug!(ctx, "workload {} has as many half-open connections as it may: proxied", source.id);
        return None;
    }

    // SAFETY: the helper takes nothing.
    let start = unsafe { bpf_get_prandom_u32() };
    let mut attempt = 0;
    while attempt < TRIES && attempt < entry.count {
        let at = (start.wrapping_add(attempt) % entry.count) as usize;
        attempt += 1;
        if at >= MAX_INSTANCES {
            return None;
        }
        let instance = &entry.instances[at];
        let Some(address) = reachable(source, instance, family) else { continue };
        let mut fresh = Connection {
            upstream: key,
            epoch: entry.epoch,
            since: 0,
            flow: FlowKey {
                source: Address { words: [0; 4] },
                destination: address,
                source_port: 0,
                destination_port: instance.port,
            },
            service: entry.service,
            source_workload: source.id,
            destination_workload: instance.workload,
            phase: PHASE_CHOSEN,
            fin_wait2_at: 0,
        };
        forget(socket(ctx));
        connection(socket(ctx), Some(&mut fresh))?;
        return Some((address, instance.port));
    }
    None
}

/// The instance's address in the wanted family, if the instance can be reached directly.
#[inline(always)]
fn reachable(source: &Workload, instance: &Instance, family: u8) -> Option<Address> {
    let address = if family == FAMILY_V4 { instance.address4 } else { instance.address6 };
    let workload = workload_by_address(&address)?;
    let guarded = is_application(port_kind(instance.workload, instance.port));
    if workload.id != instance.workload || !workload.ready() || !guarded {
        return None;
    }
    if !listens(instance.workload, instance.port, family) {
        // Perhaps it does listen, and the table does not know: the agent looks.
        let flow = FlowKey {
            source: if family == FAMILY_V4 { source.address4 } else { source.address6 },
            destination: address,
            source_port: 0,
            destination_port: instance.port,
        };
        tell::packet(EventKind::Unlisted, &flow, PROTOCOL_TCP, source.id, workload.id, workload.id);
        return None;
    }
    Some(address)
}

/// Is the socket free to leave from the workload's own address? One that is bound to a loopback address or to a device is not.
#[inline(always)]
fn may_leave(ctx: &SockAddrContext, source: &Workload, bound: &Address) -> bool {
    field!(socket(ctx), bound_dev_if) == 0 && (bound.is_unspecified() || source.owns(bound))
}

/// Has the workload as many half-open direct connections as it may?
#[inline(always)]
fn over_quota(workload: u32, cap: u32) -> bool {
    // SAFETY: entries of this map live until the program ends (RCU); a torn read of one integer is not possible.
    unsafe { QUOTA.get(&workload) }.is_none_or(|quota| quota.outstanding >= i64::from(cap))
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the context is valid for the program's run; its socket is never null.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

#[inline(always)]
fn forget(socket: *mut bpf_sock) {
    let map = (&raw const CONNECTIONS).cast_mut().cast();
    // SAFETY: map and socket are valid; nothing to delete is no error that matters.
    unsafe { bpf_sk_storage_delete(map, socket.cast()) };
}
