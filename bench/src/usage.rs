//! What processes use, as the kernel accounts it in `/proc` (proc(5)).

use std::fs;

use anyhow::{Context as _, bail};

/// Processor time of all threads of `processes`, in nanoseconds. Threads that ended in between are not in it.
pub(crate) fn cpu_nanos(processes: &[u32]) -> anyhow::Result<u64> {
    let mut sum = 0;
    for process in processes {
        let folder = format!("/proc/{process}/task");
        for thread in fs::read_dir(&folder).with_context(|| folder.clone())? {
            let path = thread?.path().join("schedstat");
            // A thread may end while the list is read.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let first = text.split(' ').next().unwrap_or_default();
            sum += first.parse::<u64>().with_context(|| format!("{}: {text:?}", path.display()))?;
        }
    }
    Ok(sum)
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
