//! The guard of application ports by packet filter, in the workload's own namespace: for nodes without eBPF.
//!
//! It judges as the kernel programs do ([`culvert_ebpf_common::admit`]), but for what only they can know: there is no direct path,
//! so nobody has leave, and source addresses are believed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

use super::firewall::{apply, removal};
use super::netns::run_in_netns;
use super::network::{INSIDE, Network, NetworkError, failed};
use super::types::Workload;

impl Network {
    /// Closes the ports `protected` of `workload` to whatever comes from outside its namespace. Those of them that are
    /// `published` stay open to what does not come from another workload. Without `protected` ports nothing is closed any more.
    ///
    /// # Errors
    /// [`NetworkError`]; the ports are guarded as before.
    pub async fn guard(&self, workload: &Workload, protected: &[u16], published: &[u16]) -> Result<(), NetworkError> {
        let (open, closed): (BTreeSet<u16>, BTreeSet<u16>) =
            protected.iter().partition(|port| published.contains(port));
        let table = &self.settings.table;
        let script = if protected.is_empty() { removal(table) } else { self.guard_script(&closed, &open) };
        let nft = self.settings.nft.clone();
        let name = workload.netns.display().to_string();
        let applied = run_in_netns(&workload.netns, move || Ok(apply(&nft, &script))).await;
        Ok(applied.map_err(failed("enter netns", name))??)
    }

    fn guard_script(&self, closed: &BTreeSet<u16>, published: &BTreeSet<u16>) -> String {
        let table = &self.settings.table;
        let mut script =
            format!("table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n  chain guard {{\n");
        script.push_str("    type filter hook input priority filter; policy accept;\n");
        close(&mut script, "", closed);
        for workloads in self.workload_sources() {
            close(&mut script, &workloads, published);
        }
        script.push_str("  }\n}\n");
        script
    }

    /// Matches of packets from workloads: all but the gateway of each network, and what hairpins carry.
    fn workload_sources(&self) -> Vec<String> {
        let subnet = self.settings.subnet;
        let mut sources =
            vec![format!("ip saddr {}/{} ip saddr != {}", subnet.network, subnet.prefix, self.gateway4())];
        if let (Some(gateway), Some(ula)) = (self.gateway6(), self.ula()) {
            sources.push(format!("ip6 saddr {ula}/64 ip6 saddr != {gateway}"));
            sources.push(format!("ip6 saddr {}/10", Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)));
        }
        sources.extend(self.hairpin().into_iter().map(|hairpin| match hairpin {
            IpAddr::V4(hairpin) => format!("ip saddr {hairpin}"),
            IpAddr::V6(hairpin) => format!("ip6 saddr {hairpin}"),
        }));
        sources
    }
}

/// Refuses connections to `ports` with a reset, and drops datagrams. Segments that open nothing pass: a connection that the workload
/// has opened itself may have such a port.
fn close(script: &mut String, from: &str, ports: &BTreeSet<u16>) {
    if ports.is_empty() {
        return;
    }
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let on = format!("iifname \"{INSIDE}\" {from}");
    let _infallible =
        writeln!(script, "    {on} tcp dport {{ {ports} }} tcp flags & (syn | ack) == syn reject with tcp reset");
    let _infallible = writeln!(script, "    {on} udp dport {{ {ports} }} drop");
}
