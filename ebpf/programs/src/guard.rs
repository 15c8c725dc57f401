//! Placeholder.
use aya_ebpf::programs::TcContext;
pub fn from_workload(_ctx: &TcContext) -> bool {
    true
}
pub fn to_workload(_ctx: &TcContext) -> bool {
    true
}
