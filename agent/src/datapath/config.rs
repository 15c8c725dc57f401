//! What the datapath is told, and how it says that something failed.

use std::error::Error;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use aya::maps::MapError;
use culvert_ebpf_common::{
    DEFAULT_AUTH_CAP, DEFAULT_AUTH_TTL, DEFAULT_REFUSALS_PER_SECOND, PORT_PROTECTED, PORT_PUBLISHED, PORT_STEERED,
    Settings,
};

/// Where the datapath lives, and its limits.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Directory for pins; default `/sys/fs/bpf/culvert`.
    pub bpf_dir: PathBuf,
    /// The cgroup (version 2) above all workloads; made if it does not exist. See [`unified_root`].
    pub cgroup: PathBuf,
    /// Sources that stand for some workload of this node, and never for the host or what is beyond; default none.
    pub hairpin: Vec<IpAddr>,
    /// How long leave to open a connection lasts; default 130 s, longer than a SYN is retransmitted.
    pub auth_ttl: Duration,
    /// Most half-open direct connections per workload; default 1024. Further ones go through the worker.
    pub auth_cap: u32,
    /// Most events of refused and spoofed packets per workload and second; default 64.
    pub refusals_per_second: u32,
}

impl DatapathConfig {
    /// The defaults.
    #[must_use]
    pub fn new(bpf_dir: PathBuf, cgroup: PathBuf) -> Self {
        Self {
            bpf_dir,
            cgroup,
            hairpin: Vec::new(),
            auth_ttl: Duration::from_nanos(DEFAULT_AUTH_TTL),
            auth_cap: DEFAULT_AUTH_CAP,
            refusals_per_second: DEFAULT_REFUSALS_PER_SECOND,
        }
    }

    /// As the programs read them.
    pub(super) fn settings(&self) -> Settings {
        Settings {
            epoch: 0,
            auth_ttl: u64::try_from(self.auth_ttl.as_nanos()).unwrap_or(u64::MAX),
            auth_cap: self.auth_cap,
            refusals_per_second: self.refusals_per_second,
        }
    }
}

/// Why there is no direct path on this node. The proxied path carries everything then.
#[derive(Debug, thiserror::Error)]
#[error("no direct path: {reason}")]
pub struct DatapathUnavailable {
    /// What was tried, and what the kernel said.
    pub reason: String,
}

impl DatapathUnavailable {
    pub(super) fn new(step: &str, error: &dyn Error) -> Self {
        let mut reason = format!("{step}: {error}");
        let mut cause = error.source();
        while let Some(inner) = cause {
            let text = inner.to_string();
            if !reason.ends_with(&text) {
                reason.push_str(": ");
                reason.push_str(&text);
            }
            cause = inner.source();
        }
        Self { reason: shorten(&reason) }
    }

    pub(super) fn missing(kind: &str, name: &str) -> Self {
        Self { reason: format!("the object has no {kind} {name}") }
    }
}

/// The kernel explains at length why it refuses a program; what matters stands at the beginning and at the end.
fn shorten(reason: &str) -> String {
    const HEAD: usize = 300;
    const TAIL: usize = 700;
    let length = reason.chars().count();
    if length <= HEAD + TAIL {
        return reason.to_owned();
    }
    reason.chars().take(HEAD).chain(" … ".chars()).chain(reason.chars().skip(length - TAIL)).collect()
}

/// A table could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("kernel table {table}")]
pub struct TableError {
    pub(super) table: &'static str,
    pub(super) source: MapError,
}

/// A workload could not be put under the programs.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// An attachment, or finding out about its target, failed.
    #[error("workload {workload}: {step}")]
    Step {
        /// Which workload.
        workload: u32,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A table did not take the workload.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What [`Datapath::attach`] needs to know of a workload.
#[derive(Debug)]
pub struct WorkloadLinks {
    /// Its id, from 1.
    pub id: u32,
    /// Its network namespace, as a path: `/run/netns/…`.
    pub netns: PathBuf,
    /// Interface index of the host's end of its veth.
    pub host_ifindex: u32,
    /// Its IPv4 address.
    pub addr4: Ipv4Addr,
    /// Its IPv6 address.
    pub addr6: Option<Ipv6Addr>,
    /// MAC address of its end of the veth.
    pub mac: [u8; 6],
}

/// How a port of a workload is guarded.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PortKind {
    /// An application of the mesh: only authorised direct connections reach it from outside the namespace.
    Protected,
    /// The same, but open to what does not come from a workload, because the user has exposed it.
    Published,
    /// The worker's: connections go to the listener of [`Datapath::steer`], and are refused as long as there is none.
    Steered,
}

impl PortKind {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Protected => PORT_PROTECTED,
            Self::Published => PORT_PUBLISHED,
            Self::Steered => PORT_STEERED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_keeps_its_beginning_and_its_end() {
        let log = format!("load program lookup: {}invalid access", "é; ".repeat(10_000));
        let unavailable = DatapathUnavailable::new("load", &io::Error::other(log));
        assert!(unavailable.reason.len() < 2_000);
        assert!(
            unavailable.reason.starts_with("load: load program lookup")
                && unavailable.reason.ends_with("invalid access")
        );
        assert_eq!(shorten("short"), "short");
    }
}
