//! The clock of the kernel programs, and its relation to the calendar's.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`, in nanoseconds: what `bpf_ktime_get_boot_ns` reads.
pub(super) fn boot() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// The moment `time` on the boot clock; what lies in the past is now.
pub(super) fn boot_at(time: SystemTime) -> u64 {
    let ahead = time.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO);
    boot().saturating_add(u64::try_from(ahead.as_nanos()).unwrap_or(u64::MAX))
}
