//! Keys and values of the kernel tables.

use crate::address::Address;

/// Instances that one upstream entry holds; a service with more on one node is reached through the worker, which balances among all.
pub const MAX_INSTANCES: usize = 16;
/// Listening sockets kept per workload, port and family: members of a `SO_REUSEPORT` group beyond the fourth are still
/// served (the kernel balances within the group), but are not there to take over when the first four have closed.
pub const LISTENER_SLOTS: u8 = 4;

/// Default of [`Settings::auth_ttl`]: longer than the 127 s for which Linux retransmits a SYN by default, so that a slow
/// accept queue ends in the application's own time-out and not in a refusal.
pub const DEFAULT_AUTH_TTL: u64 = 130_000_000_000;
/// Default of [`Settings::auth_cap`].
pub const DEFAULT_AUTH_CAP: u32 = 1024;
/// Default of [`Settings::refusals_per_second`].
pub const DEFAULT_REFUSALS_PER_SECOND: u32 = 64;

/// Who connects where: the network namespace of the caller, and the upstream's address in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct UpstreamKey {
    /// Cookie of the caller's network namespace.
    pub netns_cookie: u64,
    /// Loopback address that the upstream listens on.
    pub address: Address,
    /// Port of the upstream.
    pub port: u16,
    /// Zero.
    pub reserved: [u16; 3],
}
const _: () = assert!(size_of::<UpstreamKey>() == 32);

/// One instance of an upstream's service on this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Instance {
    /// Its IPv4 address.
    pub address4: Address,
    /// Its IPv6 address, or all zero.
    pub address6: Address,
    /// Id of its workload.
    pub workload: u32,
    /// Port of the application.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}
const _: () = assert!(size_of::<Instance>() == 40);

/// Where an upstream leads. Present only while intentions and certificates allow the pair.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Upstream {
    /// Changes whenever the entry begins to mean another service or comes back after a removal: an authorisation given under
    /// another epoch is void.
    pub epoch: u64,
    /// The entry is void from this time on; the certificate's end.
    pub expires: u64,
    /// Id of the destination service, for events.
    pub service: u32,
    /// How many of `instances` count.
    pub count: u32,
    /// The instances to choose among.
    pub instances: [Instance; MAX_INSTANCES],
}
const _: () = assert!(size_of::<Upstream>() == 24 + 40 * MAX_INSTANCES);

/// The four values that name a TCP connection, from the side that opened it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct FlowKey {
    /// Address of the caller.
    pub source: Address,
    /// Address of the called.
    pub destination: Address,
    /// Port of the caller.
    pub source_port: u16,
    /// Port of the called.
    pub destination_port: u16,
}
const _: () = assert!(size_of::<FlowKey>() == 36);

/// Leave to open one connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Auth {
    /// The entry that gave leave; it must still be there, with the same epoch.
    pub upstream: UpstreamKey,
    /// Epoch of that entry when leave was given.
    pub epoch: u64,
    /// Void from this time on.
    pub expires: u64,
    /// Who may.
    pub source_workload: u32,
    /// To whom.
    pub destination_workload: u32,
}
const _: () = assert!(size_of::<Auth>() == 56);

/// A listening socket of a workload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct ListenerKey {
    /// Id of the workload.
    pub workload: u32,
    /// Port that it listens on.
    pub port: u16,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// 0 to [`LISTENER_SLOTS`] − 1.
    pub slot: u8,
}
const _: () = assert!(size_of::<ListenerKey>() == 8);

/// `AF_INET`.
pub const FAMILY_V4: u8 = 2;
/// `AF_INET6`.
pub const FAMILY_V6: u8 = 10;

/// Id of the entry whose addresses any workload may have as its source: a translation on the way has hidden which.
pub const SOME_WORKLOAD: u32 = 0;

/// The program that refuses with a reset, `sk_lookup`, is attached in the workload's namespace.
pub const WORKLOAD_LOOKUP: u32 = 1;
/// Both programs on the host's end of the veth are attached.
pub const WORKLOAD_GUARDED: u32 = 2;

/// A MAC address, as three halves of two bytes each in network order: so it lies in a frame, where nothing is aligned better.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Mac {
    /// Two bytes each, in the order of the wire.
    pub halves: [u16; 3],
}
const _: () = assert!(size_of::<Mac>() == 6);

impl Mac {
    /// Are the two equal?
    #[inline(always)]
    #[must_use]
    pub const fn same(&self, other: &Self) -> bool {
        self.halves[0] == other.halves[0] && self.halves[1] == other.halves[1] && self.halves[2] == other.halves[2]
    }
}

impl From<[u8; 6]> for Mac {
    #[inline(always)]
    fn from([a, b, c, d, e, f]: [u8; 6]) -> Self {
        Self { halves: [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])] }
    }
}

/// A workload as the programs know it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Workload {
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Its id, from 1; or [`SOME_WORKLOAD`].
    pub id: u32,
    /// [`WORKLOAD_LOOKUP`], [`WORKLOAD_GUARDED`].
    pub flags: u32,
    /// Its IPv4 address.
    pub address4: Address,
    /// Its IPv6 address, or all zero.
    pub address6: Address,
    /// Interface index of the host's end of its veth.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: Mac,
    /// Zero.
    pub reserved: [u8; 6],
}
const _: () = assert!(size_of::<Workload>() == 64);

impl Workload {
    /// Is `address` one of this workload's?
    #[inline(always)]
    #[must_use]
    pub const fn owns(&self, address: &Address) -> bool {
        if address.is_v4() {
            self.address4.same(address)
        } else {
            !address.is_unspecified() && self.address6.same(address)
        }
    }

    /// Are the programs that direct connections rely on all in place?
    #[inline(always)]
    #[must_use]
    pub const fn ready(&self) -> bool {
        self.flags & (WORKLOAD_LOOKUP | WORKLOAD_GUARDED) == WORKLOAD_LOOKUP | WORKLOAD_GUARDED
    }
}

/// A port of a workload.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct PortKey {
    /// Id of the workload.
    pub workload: u32,
    /// The port.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}
const _: () = assert!(size_of::<PortKey>() == 8);

/// How a port is guarded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct PortRule {
    /// [`PORT_PROTECTED`], [`PORT_PUBLISHED`] or [`PORT_STEERED`].
    pub kind: u32,
}
const _: () = assert!(size_of::<PortRule>() == 4);

/// Only authorised direct connections reach it.
pub const PORT_PROTECTED: u32 = 1;
/// As protected, but open to what does not come from a workload.
pub const PORT_PUBLISHED: u32 = 2;
/// Connections go to the worker's listener.
pub const PORT_STEERED: u32 = 3;

/// Is a port of this kind one of an application of the mesh?
#[inline(always)]
#[must_use]
pub const fn is_application(kind: u32) -> bool {
    matches!(kind, PORT_PROTECTED | PORT_PUBLISHED)
}

/// Chosen by connect4/6, SYN not yet sent.
pub const PHASE_CHOSEN: u32 = 1;
/// SYN sent, counted in the quota.
pub const PHASE_CONNECTING: u32 = 2;
/// Established.
pub const PHASE_ESTABLISHED: u32 = 3;

/// What is kept with the client's socket of a direct connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Connection {
    /// The entry that led here; its address and port are what getpeername answers.
    pub upstream: UpstreamKey,
    /// Epoch of that entry.
    pub epoch: u64,
    /// When the SYN was sent, then when the connection was established.
    pub since: u64,
    /// The connection on the wire; the source is known from the SYN on.
    pub flow: FlowKey,
    /// Id of the destination service.
    pub service: u32,
    /// Who calls.
    pub source_workload: u32,
    /// Who is called.
    pub destination_workload: u32,
    /// [`PHASE_CHOSEN`], [`PHASE_CONNECTING`] or [`PHASE_ESTABLISHED`].
    pub phase: u32,
    /// `rcv_nxt` when FIN_WAIT2 was entered: tells whether a FIN came after it.
    pub fin_wait2_at: u32,
}
const _: () = assert!(size_of::<Connection>() == 104);

/// Limits of one workload's share, kept by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Quota {
    /// Start of the second in which refusals are counted.
    pub window: u64,
    /// Connections whose SYN is sent and which are not yet established. Signed: a decrement without its increment must
    /// not read as a full quota.
    pub outstanding: i64,
    /// Events of refusal in this second.
    pub refusals: u32,
    /// Events left out since the last one told.
    pub suppressed: u32,
}
const _: () = assert!(size_of::<Quota>() == 24);

/// Settings of the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Settings {
    /// Entries and authorisations with a smaller epoch are void.
    pub epoch: u64,
    /// How long an authorisation lasts, in nanoseconds.
    pub auth_ttl: u64,
    /// Most connections of one workload whose SYN is sent and which are not yet established; further ones go through the worker.
    pub auth_cap: u32,
    /// Most events of refusal per workload and second.
    pub refusals_per_second: u32,
}
const _: () = assert!(size_of::<Settings>() == 24);

/// Is an entry, or an authorisation, with this epoch and end still good at `now`?
#[inline(always)]
#[must_use]
pub const fn in_force(epoch: u64, expires: u64, settings: &Settings, now: u64) -> bool {
    epoch >= settings.epoch && now < expires
}

#[cfg(feature = "user")]
mod pod {
    //! Bytes of these types may be read from and written to the kernel.

    use super::{
        Auth, Connection, FlowKey, ListenerKey, PortKey, PortRule, Quota, Settings, Upstream, UpstreamKey, Workload,
    };
    use crate::address::Address;

    macro_rules! pod {
        ($($name:ident)*) => {$(
            // SAFETY: repr(C), integers only, no padding (size asserted beside the definition); every bit pattern is valid.
            unsafe impl aya::Pod for $name {}
        )*};
    }
    pod!(Address UpstreamKey Upstream FlowKey Auth ListenerKey Workload PortKey PortRule Connection Quota Settings);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_in_force_from_the_epoch_on_until_it_expires() {
        let settings = Settings { epoch: 5, ..Settings::default() };
        assert!(in_force(5, 100, &settings, 99));
        assert!(in_force(6, 100, &settings, 0));
        assert!(!in_force(4, 100, &settings, 0));
        assert!(!in_force(5, 100, &settings, 100));
    }

    #[test]
    fn a_workload_without_ipv6_does_not_own_the_unspecified_address() {
        let workload = Workload { address4: Address::v4(0x0100_000a), ..Workload::default() };
        assert!(workload.owns(&Address::v4(0x0100_000a)));
        assert!(!workload.owns(&Address::v4(0)));
        assert!(!workload.owns(&Address::v6([0; 4])));
    }

    #[test]
    fn a_workload_is_ready_only_with_every_program_in_place() {
        for (flags, ready) in [(0, false), (WORKLOAD_LOOKUP, false), (WORKLOAD_GUARDED, false), (3, true)] {
            assert_eq!(Workload { flags, ..Workload::default() }.ready(), ready);
        }
    }
}
