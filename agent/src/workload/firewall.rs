//! The nftables table `inet culvert`: masquerade, published ports, and what keeps the bridge from becoming a hole.
//!
//! The whole table is computed from the records and replaced in one transaction (`nft -f -`). There are no rule handles to
//! remember, nothing half applied, and applying again changes nothing. Connections in progress live in conntrack and are
//! not touched by it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::settings::Subnet4;
use super::state::{GATEWAY, Routers};
use super::types::PortMap;

/// Where `nft` is when root's PATH lacks the system directories.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];
/// Longest part of nft's complaint that is passed on, in bytes.
const MAX_COMPLAINT: usize = 2_000;

/// The firewall could not be changed; it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// No `nft` command.
    #[error("{} not found: install nftables", nft.display())]
    Missing {
        /// What was looked for.
        nft: PathBuf,
    },
    /// It could not be run.
    #[error("run {}", nft.display())]
    Run {
        /// The command.
        nft: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It refused.
    #[error("nftables refused the table: {complaint}")]
    Refused {
        /// Its words.
        complaint: String,
    },
}

/// Everything the table depends on.
#[derive(Debug)]
pub(super) struct Ruleset<'a> {
    pub(super) table: &'a str,
    pub(super) bridge: &'a str,
    pub(super) subnet: Subnet4,
    /// The /64, where the host has IPv6.
    pub(super) ula: Option<Ipv6Addr>,
    /// Sources of what workloads send to each other's published ports.
    pub(super) hairpin4: Ipv4Addr,
    pub(super) hairpin6: Option<Ipv6Addr>,
    pub(super) routers: Routers,
    /// Published ports with the addresses of the allocation behind them.
    pub(super) ports: Vec<(Ipv4Addr, Option<Ipv6Addr>, &'a PortMap)>,
}

impl Ruleset<'_> {
    /// The script that replaces the table. Every value in it is a number, an address, or a name that
    /// [`super::NetworkSettings::check`] or the kernel's own list of interfaces vouches for.
    pub(super) fn script(&self) -> String {
        let mut script = String::new();
        let table = self.table;
        // Declared first, so that the deletion always finds one.
        let _infallible = write!(script, "table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n");
        self.raw(&mut script);
        let published = self.published();
        chain(&mut script, "prerouting", "nat", "prerouting", "dstnat", &published);
        // Connections of the host itself do not pass prerouting. -100 is what `dstnat` means there.
        chain(&mut script, "output", "nat", "output", "-100", &published);
        chain(&mut script, "postrouting", "nat", "postrouting", "srcnat", &self.masquerade());
        chain(&mut script, "forward", "filter", "forward", "filter", &self.forward());
        script.push_str("}\n");
        script
    }

    /// `route_localnet` on the bridge, needed for `localhost:<published port>`, would let workloads reach what the host
    /// binds to 127.0.0.1 (CVE-2020-8558). No packet on the wire of the bridge has such an address rightfully.
    fn raw(&self, script: &mut String) {
        let bridge = self.bridge;
        let rules = [
            format!("iifname \"{bridge}\" ip daddr 127.0.0.0/8 drop"),
            format!("iifname \"{bridge}\" ip saddr 127.0.0.0/8 drop"),
        ];
        chain(script, "loopback", "filter", "prerouting", "raw", &rules);
    }

    fn published(&self) -> Vec<String> {
        let mut rules = Vec::new();
        for (addr4, addr6, map) in &self.ports {
            let PortMap { host_port, to, addr, .. } = map;
            let ports = format!("meta l4proto {{ tcp, udp }} th dport {host_port}");
            let on4 = match addr {
                None => Some("fib daddr type local".to_owned()),
                Some(IpAddr::V4(address)) => Some(format!("ip daddr {address}")),
                Some(IpAddr::V6(_)) => None,
            };
            let on6 = match addr {
                // ::1 cannot be translated: the kernel has no route_localnet for IPv6.
                None => Some("ip6 daddr != ::1 fib daddr type local".to_owned()),
                Some(IpAddr::V6(address)) => Some(format!("ip6 daddr {address}")),
                Some(IpAddr::V4(_)) => None,
            };
            if let Some(on) = on4 {
                rules.push(format!("meta nfproto ipv4 {on} {ports} dnat ip to {addr4}:{to}"));
            }
            if let (Some(on), Some(addr6)) = (on6, addr6) {
                rules.push(format!("meta nfproto ipv6 {on} {ports} dnat ip6 to [{addr6}]:{to}"));
            }
        }
        rules
    }

    fn masquerade(&self) -> Vec<String> {
        let (bridge, Subnet4 { network, prefix }) = (self.bridge, self.subnet);
        // The host itself, through a published port on 127.0.0.1.
        let mut rules = vec![format!("oifname \"{bridge}\" ip saddr 127.0.0.0/8 masquerade")];
        // A workload that reaches itself, or another one, through a published port: the answer must come back here. Itself it may
        // reach, as the host may. Another one must not take it for the host: its ports of mesh services are closed to workloads.
        let published: BTreeSet<_> = self.ports.iter().map(|(addr4, addr6, _)| (*addr4, *addr6)).collect();
        for (addr4, addr6) in published {
            rules.push(format!("oifname \"{bridge}\" ip saddr {addr4} ip daddr {addr4} ct status dnat masquerade"));
            rules.extend(addr6.map(|addr6| {
                format!("oifname \"{bridge}\" ip6 saddr {addr6} ip6 daddr {addr6} ct status dnat masquerade")
            }));
        }
        let (gateway, hairpin) = (self.subnet.host(GATEWAY), self.hairpin4);
        let workloads = format!("ip saddr {network}/{prefix} ip saddr != {gateway}");
        rules.push(format!("oifname \"{bridge}\" {workloads} ct status dnat snat ip to {hairpin}"));
        rules.push(format!("oifname != \"{bridge}\" ip saddr {network}/{prefix} masquerade"));
        if let (Some(ula), Some(hairpin)) = (self.ula, self.hairpin6) {
            let gateway = Ipv6Addr::from_bits(ula.to_bits() | u128::from(GATEWAY));
            let workloads = format!("ip6 saddr {ula}/64 ip6 saddr != {gateway}");
            rules.push(format!("oifname \"{bridge}\" {workloads} ct status dnat snat ip6 to {hairpin}"));
            rules.push(format!("oifname != \"{bridge}\" ip6 saddr {ula}/64 masquerade"));
        }
        rules
    }

    /// Only published ports are reachable from outside, and interfaces that did not forward before culvert came, or were
    /// not there, lead nowhere but to workloads. What another program translates (`ct status dnat`) is its own affair.
    fn forward(&self) -> Vec<String> {
        let bridge = self.bridge;
        let mut rules = vec![
            format!("iifname != \"{bridge}\" oifname \"{bridge}\" ct status dnat accept"),
            format!("iifname != \"{bridge}\" oifname \"{bridge}\" ct state new drop"),
        ];
        for (family, routers) in [("ipv4", &self.routers.ipv4), ("ipv6", &self.routers.ipv6)] {
            let Some(routers) = routers else { continue };
            let plain = routers.iter().map(String::as_str).filter(|name| is_plain_name(name));
            let free: Vec<String> = std::iter::once(bridge).chain(plain).map(|name| format!("\"{name}\"")).collect();
            let others = format!("iifname != {{ {} }}", free.join(", "));
            let from = format!("meta nfproto {family} {others} oifname != \"{bridge}\"");
            rules.push(format!("{from} ct status dnat accept"));
            rules.push(format!("{from} ct state new drop"));
        }
        rules
    }
}

fn chain(script: &mut String, name: &str, kind: &str, hook: &str, priority: &str, rules: &[String]) {
    let head = format!("type {kind} hook {hook} priority {priority}; policy accept;");
    let _infallible = writeln!(script, "  chain {name} {{\n    {head}");
    for rule in rules {
        let _infallible = writeln!(script, "    {rule}");
    }
    script.push_str("  }\n");
}

/// Runs a script of [`Ruleset::script`] or [`removal`]: all of it, or nothing.
pub(super) fn apply(nft: &Path, script: &str) -> Result<(), FirewallError> {
    run(nft, &["-f", "-"], script).map(drop)
}

/// The script that removes the table; a missing one is removed.
pub(super) fn removal(table: &str) -> String {
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// A chain of somebody else that drops what it does not know when it is forwarded, as Docker's does: a verdict of ours
/// cannot overrule it.
pub(super) fn foreign_drop(nft: &Path, own: &str) -> Result<Option<String>, FirewallError> {
    let listing = run(nft, &["list", "chains"], "")?;
    Ok(find_foreign_drop(&listing, own))
}

fn find_foreign_drop(listing: &str, own: &str) -> Option<String> {
    let (mut table, mut chain) = ("", "");
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ").and_then(|rest| rest.strip_suffix(" {")) {
            table = name;
        } else if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            chain = name;
        } else if line.contains("hook forward") && line.contains("policy drop") && table != format!("inet {own}") {
            return Some(format!("{table} {chain}"));
        }
    }
    None
}

fn run(nft: &Path, args: &[&str], script: &str) -> Result<String, FirewallError> {
    let failed = |source| FirewallError::Run { nft: nft.to_owned(), source };
    let spawn = |program: &Path| {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let mut child = match spawn(nft) {
        Err(error) if absent(&error) => SYSTEM_DIRECTORIES
            .iter()
            .find_map(|directory| spawn(&Path::new(directory).join(nft)).ok())
            .ok_or_else(|| FirewallError::Missing { nft: nft.to_owned() })?,
        child => child.map_err(failed)?,
    };
    // nft reads all of its input before it says a word, so neither side waits for the other.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return written.map_err(failed).map(|()| String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if complaint.len() > MAX_COMPLAINT {
        complaint.truncate(complaint.floor_char_boundary(MAX_COMPLAINT));
    }
    Err(FirewallError::Refused { complaint })
}

/// May `name`, read from the kernel, stand in a script? The kernel allows almost any byte in an interface's name.
fn is_plain_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':' | b'@');
    !name.is_empty() && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_replaced_as_a_whole_and_holds_each_port_for_both_families() {
        let routers = Routers { ipv4: Some(["eth1".to_owned(), "a\"b".to_owned()].into()), ipv6: None };
        let everywhere = PortMap { host_port: 9002, to: 80, addr: None, owner: "web:http".into() };
        let one = PortMap { host_port: 53, to: 5353, addr: "10.0.0.1".parse().ok(), owner: "dns:dns".into() };
        let (addr4, addr6) = (Ipv4Addr::new(172, 26, 64, 5), "fd00::5".parse().ok());
        let ruleset = Ruleset {
            table: "culvert",
            bridge: "culvert0",
            subnet: Subnet4 { network: Ipv4Addr::new(172, 26, 64, 0), prefix: 20 },
            ula: "fd00::".parse().ok(),
            hairpin4: Ipv4Addr::new(169, 254, 172, 26),
            hairpin6: "fd00:0:0:1::1".parse().ok(),
            routers,
            ports: vec![(addr4, addr6, &everywhere), (addr4, addr6, &one)],
        };
        let script = ruleset.script();
        assert!(script.starts_with("table inet culvert\ndelete table inet culvert\ntable inet culvert {\n"));
        let count = |text: &str| script.matches(text).count();
        assert_eq!(count("th dport 9002 dnat ip to 172.26.64.5:80"), 2, "{script}");
        assert_eq!(count("th dport 9002 dnat ip6 to [fd00::5]:80"), 2, "{script}");
        assert_eq!(count("ip daddr 10.0.0.1 meta l4proto { tcp, udp } th dport 53 dnat ip to 172.26.64.5:5353"), 2);
        assert_eq!(count("5353"), 2, "an IPv4 address is published for IPv4 alone");
        let others = "meta nfproto ipv4 iifname != { \"culvert0\", \"eth1\" } oifname != \"culvert0\"";
        assert_eq!((count(others), count("nfproto ipv6 iifname")), (2, 0), "{script}");
        assert_eq!(count("ip saddr != 172.26.64.1 ct status dnat snat ip to 169.254.172.26"), 1, "{script}");
        assert_eq!(count("ip6 saddr != fd00::1 ct status dnat snat ip6 to fd00:0:0:1::1"), 1, "{script}");
        assert_eq!(count("ip saddr 172.26.64.5 ip daddr 172.26.64.5 ct status dnat masquerade"), 1, "{script}");
        assert_eq!(script.matches('{').count(), script.matches('}').count());
    }

    #[test]
    fn a_foreign_chain_that_drops_is_named() {
        let listing = "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n\
                       \tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        assert_eq!(find_foreign_drop(listing, "culvert"), Some("ip filter FORWARD".to_owned()));
        assert_eq!(find_foreign_drop(&listing.replace("policy drop", "policy accept"), "culvert"), None);
        assert_eq!(find_foreign_drop(&listing.replace("ip filter", "inet culvert"), "culvert"), None);
    }

    #[test]
    fn names_that_could_end_a_string_stay_out_of_scripts() {
        assert!(is_plain_name("enp0s31f6") && is_plain_name("eth0.100") && is_plain_name("br-1a2b"));
        for name in ["", "a\"b", "a b", "a;b", "a\nb", "a{"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
    }
}
