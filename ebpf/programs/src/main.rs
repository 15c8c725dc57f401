//! The kernel programs of culvert's direct path, and of the guard around every workload.
//!
//! | program | attached to | does |
//! |---|---|---|
//! | `connect4`, `connect6` | cgroup | an upstream's loopback address becomes a local instance's address |
//! | `getpeername4`, `getpeername6` | cgroup | the application sees the address it had asked for |
//! | `milestone` | cgroup (sockops) | gives leave for exactly the connection that leaves; keeps listeners; tells opens and closes |
//! | `lookup` | network namespace | hands an authorised connection to the application, refuses the rest with a reset |
//! | `from_workload` | veth, host end, ingress | drops what does not come from the workload's own addresses; leads open direct connections past the bridge |
//! | `to_workload` | veth, host end, egress | drops what would open something without leave |
//!
//! Everything fails closed: without an entry a socket is left untouched, and the worker's listener gets it, or a packet is
//! dropped. The decisions are functions of `culvert-ebpf-common`; this crate reads contexts and tables, and obeys.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod connect;
mod guard;
mod lookup;
mod packet;
mod sockops;
mod tables;
mod tell;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, sk_action};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::{cgroup_sock_addr, classifier, sk_lookup, sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, TcContext};

use guard::Passage;

/// A `cgroup_sock_addr` program lets the system call go on.
const PROCEED: i32 = 1;

/// See [`connect::connect4`].
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx);
    PROCEED
}

/// See [`connect::connect6`].
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx);
    PROCEED
}

/// See [`connect::getpeername4`].
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    connect::getpeername4(&ctx);
    PROCEED
}

/// See [`connect::getpeername6`].
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    connect::getpeername6(&ctx);
    PROCEED
}

/// See [`sockops::milestone`].
#[sock_ops]
pub fn milestone(ctx: SockOpsContext) -> u32 {
    sockops::milestone(&ctx);
    1
}

/// See [`lookup::lookup`].
#[sk_lookup]
pub fn lookup(ctx: SkLookupContext) -> u32 {
    if lookup::lookup(&ctx) { sk_action::SK_PASS } else { sk_action::SK_DROP }
}

/// See [`guard::from_workload`].
#[classifier]
pub fn from_workload(ctx: TcContext) -> i32 {
    match guard::from_workload(&ctx) {
        Passage::Drop => TC_ACT_SHOT,
        Passage::Bridge => TC_ACT_UNSPEC,
        // SAFETY: the helper takes numbers.
        Passage::Veth(ifindex) => unsafe { bpf_redirect(ifindex, 0) as i32 },
    }
}

/// See [`guard::to_workload`].
#[classifier]
pub fn to_workload(ctx: TcContext) -> i32 {
    if guard::to_workload(&ctx) { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
