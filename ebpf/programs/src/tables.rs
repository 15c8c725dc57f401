//! The maps, and the questions that several programs ask them.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{bpf_ktime_get_boot_ns, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SockHash};
use culvert_ebpf_common::{
    Address, Auth, Connection, FAMILY_V4, FAMILY_V6, FlowKey, LISTENER_SLOTS, ListenerKey, PortKey, PortRule, Quota,
    Settings, Upstream, UpstreamKey, Workload, in_force,
};

/// Workloads of a node.
const MAX_WORKLOADS: u32 = 4096;

#[map]
pub static UPSTREAM: HashMap<UpstreamKey, Upstream> = HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);
#[map]
pub static AUTH: LruHashMap<FlowKey, Auth> = LruHashMap::with_max_entries(65_536, 0);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(65_536, 0);
#[map]
pub static STEERED: SockHash<ListenerKey> = SockHash::with_max_entries(16_384, 0);
#[map]
pub static WORKLOAD_IF: HashMap<u32, Workload> = HashMap::with_max_entries(MAX_WORKLOADS, BPF_F_NO_PREALLOC);
#[map]
pub static WORKLOAD_NETNS: HashMap<u64, Workload> = HashMap::with_max_entries(MAX_WORKLOADS, BPF_F_NO_PREALLOC);
#[map]
pub static WORKLOAD_ADDR: HashMap<Address, Workload> = HashMap::with_max_entries(2 * MAX_WORKLOADS, BPF_F_NO_PREALLOC);
#[map]
pub static PORTS: HashMap<PortKey, PortRule> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
pub static QUOTA: HashMap<u32, Quota> = HashMap::with_max_entries(MAX_WORKLOADS, BPF_F_NO_PREALLOC);
#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
pub static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[btf_map]
pub static CONNECTIONS: SkStorage<Connection> = SkStorage::new();

/// Reads a field of a context: the kernel's verifier wants plain loads at fixed offsets, and the compiler would merge the loads of
/// two branches into one at a computed offset. So what depends on the family is read for both, before the branch.
macro_rules! field {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the context is valid for the program's run, the verifier checks each field.
        unsafe { core::ptr::read_volatile(&raw const (*$context).$($field)+) }
    };
}
pub(crate) use field;

/// Reads the four words of an IPv6 address in a context.
macro_rules! words {
    ($context:expr, $field:ident) => {
        [
            field!($context, $field[0]),
            field!($context, $field[1]),
            field!($context, $field[2]),
            field!($context, $field[3]),
        ]
    };
}
pub(crate) use words;

/// The boot clock, in nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper takes nothing and reads a clock.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The workload behind the host's end of a veth.
#[inline(always)]
pub fn workload_by_interface(ifindex: u32) -> Option<&'static Workload> {
    // SAFETY: entries of a map without preallocation live until the program ends (RCU) and are replaced as a whole.
    unsafe { WORKLOAD_IF.get(&ifindex) }
}

/// The workload that has the network namespace.
#[inline(always)]
pub fn workload_by_netns(cookie: u64) -> Option<&'static Workload> {
    // SAFETY: as in `workload_by_interface`.
    unsafe { WORKLOAD_NETNS.get(&cookie) }
}

/// The workload that has the address.
#[inline(always)]
pub fn workload_by_address(address: &Address) -> Option<&'static Workload> {
    // SAFETY: as in `workload_by_interface`.
    unsafe { WORKLOAD_ADDR.get(address) }
}

/// Kind of a workload's port; 0 without a rule.
#[inline(always)]
pub fn port_kind(workload: u32, port: u16) -> u32 {
    // SAFETY: as in `workload_by_interface`.
    unsafe { PORTS.get(&PortKey { workload, port, reserved: 0 }) }.map_or(0, |rule| rule.kind)
}

/// Where an upstream leads, if the entry is in force.
#[inline(always)]
pub fn upstream(key: &UpstreamKey, settings: &Settings, now: u64) -> Option<&'static Upstream> {
    // SAFETY: as in `workload_by_interface`.
    let entry = unsafe { UPSTREAM.get(key) }?;
    in_force(entry.epoch, entry.expires, settings, now).then_some(entry)
}

/// Has this very connection leave to reach `destination`, now?
#[inline(always)]
pub fn authorised(flow: &FlowKey, destination: u32) -> bool {
    // SAFETY: an entry of this preallocated map may be reused for another key while it is read; what could then be read is
    // another valid authorisation, or a mixture of two. Only the programs write here, and what a mixture could allow is
    // checked again below against the entry that gave leave.
    let Some(auth) = (unsafe { AUTH.get(flow) }) else { return false };
    let Some(settings) = SETTINGS.get(0) else { return false };
    let now = now();
    auth.destination_workload == destination
        && in_force(auth.epoch, auth.expires, settings, now)
        && upstream(&auth.upstream, settings, now).is_some_and(|entry| entry.epoch == auth.epoch)
}

/// Does the workload listen on `port` with a socket that takes connections of `family`?
#[inline(always)]
pub fn listens(workload: u32, port: u16, family: u8) -> bool {
    let mut slot = 0;
    while slot < LISTENER_SLOTS {
        if has_listener(&ListenerKey { workload, port, family, slot }) {
            return true;
        }
        // An IPv6 socket may take IPv4 as well; if it does not, the connection is refused as if nobody listened.
        if family == FAMILY_V4 && has_listener(&ListenerKey { workload, port, family: FAMILY_V6, slot }) {
            return true;
        }
        slot += 1;
    }
    false
}

#[inline(always)]
fn has_listener(key: &ListenerKey) -> bool {
    // SAFETY: map and key are valid; the reference that a hit returns is given back at once, as the verifier demands.
    unsafe {
        let map = (&raw const LISTENERS).cast_mut().cast();
        let socket = aya_ebpf::helpers::bpf_map_lookup_elem(map, core::ptr::from_ref(key).cast());
        if socket.is_null() {
            return false;
        }
        aya_ebpf::helpers::generated::bpf_sk_release(socket);
    }
    true
}

/// What is kept with a socket; with `create`, made from it when there is nothing yet. May be null.
///
/// `socket` must be the full socket of the program's context, not null.
#[inline(always)]
pub fn connection(socket: *mut bpf_sock, create: Option<&mut Connection>) -> Option<&'static mut Connection> {
    let flags = if create.is_some() { u64::from(BPF_SK_STORAGE_GET_F_CREATE) } else { 0 };
    let value = create.map_or(core::ptr::null_mut(), core::ptr::from_mut);
    let map = (&raw const CONNECTIONS).cast_mut().cast();
    // SAFETY: the verifier holds every caller to a full socket that is not null; what comes back is null or lives as long as the
    // socket, which outlives the program's run.
    unsafe { bpf_sk_storage_get(map, socket.cast(), value.cast(), flags).cast::<Connection>().as_mut() }
}
