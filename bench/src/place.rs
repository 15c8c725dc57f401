//! Where a process runs: its network namespace, its cgroup, its processors. Taken at the start, before there are threads.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

/// Where a load generator or a contender is put.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Place {
    /// Network namespace to enter.
    #[arg(long, global = true)]
    pub(crate) netns: Option<PathBuf>,
    /// Folder of the cgroup (v2) to enter: kernel programs of the mesh are attached there.
    #[arg(long, global = true)]
    pub(crate) cgroup: Option<PathBuf>,
}

impl Place {
    /// Moves the calling thread, and whatever it starts later.
    ///
    /// The cgroup comes first: a socket belongs to the cgroup that its maker was in.
    pub(crate) fn enter(&self) -> anyhow::Result<()> {
        if let Some(cgroup) = &self.cgroup {
            let processes = cgroup.join("cgroup.procs");
            let own = std::process::id().to_string();
            fs::write(&processes, own).with_context(|| format!("enter cgroup {}", processes.display()))?;
        }
        if let Some(path) = &self.netns {
            let netns = File::open(path).with_context(|| format!("open netns {}", path.display()))?;
            setns(netns, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter netns {}", path.display()))?;
        }
        Ok(())
    }

    /// As arguments of a command line of ours.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let flag = |name: &str, path: &Option<PathBuf>| match path {
            Some(path) => vec![name.to_owned(), path.display().to_string()],
            None => Vec::new(),
        };
        [flag("--netns", &self.netns), flag("--cgroup", &self.cgroup)].concat()
    }
}

/// Binds the calling thread, and whatever it starts later, to the first processor.
pub(crate) fn pin() -> anyhow::Result<()> {
    let mut first = CpuSet::new();
    first.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &first).context("bind to processor 0")
}
