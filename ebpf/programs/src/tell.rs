//! Events for the agent. Opens and closes are told as long as the ring has room; refusals at most so many per workload and second.

use aya_ebpf::maps::ring_buf::RingBufEntry;
use culvert_ebpf_common::{Connection, Event, EventKind, FlowKey, Quota};

use crate::tables::{EVENTS, LOST, QUOTA, SETTINGS, now};

/// Refusals are counted per this many nanoseconds.
const WINDOW: u64 = 1_000_000_000;

/// Tells about a direct connection.
#[inline(always)]
pub fn connection(kind: EventKind, connection: &Connection, cookie: u64, bytes: (u64, u64), duration: u64) {
    let Some(mut entry) = reserve() else { return };
    entry.write(Event {
        at: now(),
        bytes_to_destination: bytes.0,
        bytes_to_source: bytes.1,
        duration,
        cookie,
        kind: kind as u32,
        source_workload: connection.source_workload,
        destination_workload: connection.destination_workload,
        service: connection.service,
        suppressed: 0,
        flow: connection.flow,
        upstream_port: connection.upstream.port,
        protocol: culvert_ebpf_common::event::PROTOCOL_TCP,
        reserved: 0,
    });
    entry.submit(0);
}

/// Tells about a packet that was not let through. `accountable` is the workload whose share of events this uses up.
#[inline(always)]
pub fn packet(kind: EventKind, flow: &FlowKey, protocol: u16, source: u32, destination: u32, accountable: u32) {
    let Some(suppressed) = admitted(accountable) else { return };
    let Some(mut entry) = reserve() else { return };
    entry.write(Event {
        at: now(),
        bytes_to_destination: 0,
        bytes_to_source: 0,
        duration: 0,
        cookie: 0,
        kind: kind as u32,
        source_workload: source,
        destination_workload: destination,
        service: 0,
        suppressed,
        flow: *flow,
        upstream_port: 0,
        protocol,
        reserved: 0,
    });
    entry.submit(0);
}

/// Room for an event; without any, one more is lost.
#[inline(always)]
fn reserve() -> Option<RingBufEntry<Event>> {
    let entry = EVENTS.reserve(0);
    if entry.is_none()
        && let Some(lost) = LOST.get_ptr_mut(0)
    {
        // SAFETY: this CPU's own count. A program that interrupts this one may make it miss one, never more.
        unsafe { *lost = (*lost).wrapping_add(1) };
    }
    entry
}

/// May one more event be told in this second? If so, how many were left out before it. Counted without a lock: two CPUs at
/// once may tell one event more than the limit, never without bound.
#[inline(always)]
fn admitted(workload: u32) -> Option<u32> {
    let limit = SETTINGS.get(0)?.refusals_per_second;
    let quota: &mut Quota = {
        // SAFETY: entries of this map live until the program ends (RCU); the fields are plain integers whose lost updates
        // do no harm.
        unsafe { &mut *QUOTA.get_ptr_mut(&workload)? }
    };
    let now = now();
    if now.wrapping_sub(quota.window) >= WINDOW {
        quota.window = now;
        quota.refusals = 0;
    }
    if quota.refusals >= limit {
        quota.suppressed = quota.suppressed.wrapping_add(1);
        return None;
    }
    quota.refusals += 1;
    let suppressed = quota.suppressed;
    quota.suppressed = 0;
    Some(suppressed)
}
