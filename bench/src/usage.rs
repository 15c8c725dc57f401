//! What processes use, as the kernel accounts it (clock_getcpuclockid(3), proc(5)).

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// Processor time of `processes` so far, in nanoseconds, that of threads which have ended included.
pub(crate) fn cpu_nanos(processes: &[u32]) -> anyhow::Result<u64> {
    let mut sum = Duration::ZERO;
    for process in processes {
        let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(*process)?));
        let time = clock.and_then(clock_gettime).with_context(|| format!("processor time of process {process}"))?;
        sum += Duration::from(time);
    }
    Ok(u64::try_from(sum.as_nanos())?)
}

/// Memory of `processes` that is resident, in bytes.
pub(crate) fn resident(processes: &[u32]) -> anyhow::Result<u64> {
    processes.iter().map(|process| field(*process, "VmRSS:")).sum()
}

fn field(process: u32, name: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{process}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let Some(line) = text.lines().find_map(|line| line.strip_prefix(name)) else { bail!("{path} has no {name}") };
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{path}: {line}"))?;
    Ok(kibibytes * 1024)
}
