//! Milestones in the life of the cgroup's sockets. Passive sockets get here in softirq: there is no current task to ask.

use core::arch::asm;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_hash_update};
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::debug;
use culvert_ebpf_common::account::state;
use culvert_ebpf_common::{
    Address, Auth, ByteCounters, Connection, EventKind, FAMILY_V4, FAMILY_V6, FlowKey, LISTENER_SLOTS, ListenerKey,
    PHASE_CHOSEN, PHASE_CONNECTING, PHASE_ESTABLISHED, is_application, payload_bytes,
};

use crate::tables::{
    AUTH, LISTENERS, QUOTA, SETTINGS, connection, field, now, port_kind, upstream, words, workload_by_netns,
};
use crate::tell;

/// Something happened to a socket.
#[inline(always)]
pub fn milestone(ctx: &SockOpsContext) {
    match field!(ctx.ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_STATE_CB => changed(ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listening(ctx),
        _ => {}
    }
}

/// The SYN is about to leave, the four values are final: give leave for exactly this connection.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(connection) = connection_of(ctx) else { return };
    if connection.phase != PHASE_CHOSEN {
        return;
    }
    let flow = flow(ctx, connection.flow.destination.is_v4());
    if !flow.destination.same(&connection.flow.destination) || flow.destination_port != connection.flow.destination_port
    {
        return;
    }
    let now = now();
    let Some(settings) = SETTINGS.get(0) else { return };
    // Between choosing and now the pair may have been revoked (a deferred fast-open connect can wait for long).
    if !upstream(&connection.upstream, settings, now).is_some_and(|entry| entry.epoch == connection.epoch) {
        return;
    }
    let auth = Auth {
        upstream: connection.upstream,
        epoch: connection.epoch,
        expires: now.saturating_add(settings.auth_ttl),
        source_workload: connection.source_workload,
        destination_workload: connection.destination_workload,
    };
    // Without the callback on the close nobody would give the quota back.
    if ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG as i32).is_err() || AUTH.insert(&flow, &auth, 0).is_err() {
        debug!(ctx, "no leave for a connection of workload {}: it will be refused", connection.source_workload);
        return;
    }
    connection.flow = flow;
    connection.since = now;
    connection.phase = PHASE_CONNECTING;
    outstanding(connection.source_workload, 1);
}

/// The client's side is established.
#[inline(always)]
fn established(ctx: &SockOpsContext) {
    let Some(connection) = connection_of(ctx) else { return };
    if connection.phase != PHASE_CONNECTING {
        return;
    }
    connection.phase = PHASE_ESTABLISHED;
    connection.since = now();
    outstanding(connection.source_workload, -1);
    tell::connection(EventKind::Open, connection, cookie(ctx), (0, 0), 0);
}

/// The server's side is established: leave is used up.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let v4 = field!(ctx.ops, family) == u32::from(FAMILY_V4) || Address::v6(words!(ctx.ops, remote_ip6)).is_v4();
    let seen = flow(ctx, v4);
    let opened = FlowKey {
        source: seen.destination,
        destination: seen.source,
        source_port: seen.destination_port,
        destination_port: seen.source_port,
    };
    // Nothing to remove: a connection that did not need leave.
    AUTH.remove(&opened).ok();
}

/// The state of a client's socket changes. Arguments: old state, new state.
#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    if new != state::CLOSE && new != state::FIN_WAIT2 {
        return;
    }
    let Some(connection) = connection_of(ctx) else { return };
    let rcv_nxt = field!(ctx.ops, rcv_nxt);
    let (acked, received) = (field!(ctx.ops, bytes_acked), field!(ctx.ops, bytes_received));
    if new == state::FIN_WAIT2 {
        connection.fin_wait2_at = rcv_nxt;
        return;
    }
    let phase = connection.phase;
    connection.phase = 0;
    if phase == PHASE_CONNECTING {
        outstanding(connection.source_workload, -1);
        AUTH.remove(&connection.flow).ok();
        tell::connection(EventKind::Fail, connection, cookie(ctx), (0, 0), 0);
    } else if phase == PHASE_ESTABLISHED {
        let counters =
            ByteCounters { acked, received, rcv_nxt, fin_wait2_at: connection.fin_wait2_at, last_state: old };
        let duration = now().saturating_sub(connection.since);
        tell::connection(EventKind::Close, connection, cookie(ctx), payload_bytes(&counters), duration);
    }
}

/// A socket of a workload begins to listen on an application's port: keep it, in the first free slot of its port. It leaves the map by itself on close.
#[inline(always)]
fn listening(ctx: &SockOpsContext) {
    // SAFETY: the helper accepts this context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(workload) = workload_by_netns(netns_cookie) else { return };
    let port = field!(ctx.ops, local_port) as u16;
    // Nobody is led to another port, and a workload could fill the map with them.
    if !is_application(port_kind(workload.id, port)) {
        return;
    }
    let family = if field!(ctx.ops, family) == u32::from(FAMILY_V4) { FAMILY_V4 } else { FAMILY_V6 };
    let mut slot = 0;
    while slot < LISTENER_SLOTS {
        let mut key = ListenerKey { workload: workload.id, port, family, slot };
        let map = (&raw const LISTENERS).cast_mut().cast();
        // SAFETY: context, map and key are valid for the call.
        let failed = unsafe { bpf_sock_hash_update(ctx.ops, map, (&raw mut key).cast(), u64::from(BPF_NOEXIST)) };
        if failed == 0 {
            return;
        }
        slot += 1;
    }
    debug!(ctx, "workload {} listens on port {} more often than there are slots", workload.id, port);
}

/// What is kept with the context's socket.
#[inline(always)]
fn connection_of(ctx: &SockOpsContext) -> Option<&'static mut Connection> {
    let (full, socket) = (field!(ctx.ops, is_fullsock), field!(ctx.ops, __bindgen_anon_2.sk));
    if full == 0 || socket.is_null() {
        return None;
    }
    connection(socket, None)
}

/// The connection from this socket's side.
#[inline(always)]
fn flow(ctx: &SockOpsContext, v4: bool) -> FlowKey {
    let (local4, remote4) = (Address::v4(field!(ctx.ops, local_ip4)), Address::v4(field!(ctx.ops, remote_ip4)));
    let (local6, remote6) = (Address::v6(words!(ctx.ops, local_ip6)), Address::v6(words!(ctx.ops, remote_ip6)));
    let (source, destination) = if v4 { (local4, remote4) } else { (local6, remote6) };
    FlowKey {
        source,
        destination,
        source_port: field!(ctx.ops, local_port) as u16,
        destination_port: u32::from_be(field!(ctx.ops, remote_port)) as u16,
    }
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper accepts this context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Counts half-open connections of a workload.
#[inline(always)]
fn outstanding(workload: u32, change: i64) {
    let Some(quota) = QUOTA.get_ptr_mut(&workload) else { return };
    // SAFETY: entries of this map live until the program ends (RCU), and the field is eight bytes, aligned. Written as an instruction
    // because the target's atomics have no `fetch_add`.
    unsafe {
        asm!("lock *(u64 *)({field} + 0) += {change}", field = in(reg) &raw mut (*quota).outstanding, change = in(reg) change);
    }
}
