//! Names and places of the workload network. The defaults are the documented names; tests use their own.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use super::AllocId;

/// Longest name of a network interface (`IFNAMSIZ` less its NUL).
pub const MAX_INTERFACE_NAME: usize = 15;

/// An IPv4 network; its first host is the gateway.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Subnet4 {
    /// The network's address, host bits zero.
    pub network: Ipv4Addr,
    /// Prefix length: 8 to 30.
    pub prefix: u8,
}

impl Subnet4 {
    /// The address number `host` of the network; 1 is the gateway.
    #[must_use]
    pub fn host(&self, host: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | host)
    }

    /// The highest number a host may have: below it come the network (0) and the gateway (1), above it broadcast.
    #[must_use]
    pub fn last_host(&self) -> u32 {
        (1_u32 << (32 - u32::from(self.prefix))) - 2
    }

    /// Is `address` of this network?
    #[must_use]
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::MAX << (32 - u32::from(self.prefix));
        address.to_bits() & mask == self.network.to_bits()
    }
}

/// What the workload network is called and where its state lies.
#[derive(Clone, Debug)]
pub struct NetworkSettings {
    /// The bridge; default `culvert0`.
    pub bridge: String,
    /// The nftables table of family `inet`; default `culvert`.
    pub table: String,
    /// Workload addresses; default 172.26.64.0/20.
    pub subnet: Subnet4,
    /// IPv6 prefix (a /64); default: a random ULA (RFC 4193), made once and kept in `node.json`.
    pub ula: Option<Ipv6Addr>,
    /// Where named netns are mounted; default `/run/netns`, as `ip netns` has it.
    pub netns_dir: PathBuf,
    /// What the name of a netns starts with; default `culvert-`.
    pub netns_prefix: String,
    /// What the name of a host-side veth starts with; default `cv`, at most 7 bytes.
    pub veth_prefix: String,
    /// The agent's data directory; default `/var/lib/culvert`. Holds `node.json`, `network.json` and `alloc/`.
    pub data_dir: PathBuf,
    /// The parent of all task cgroups below each hierarchy's root; default `culvert`.
    pub cgroup_parent: String,
    /// The `nft` command; default `nft`, looked up in PATH.
    pub nft: PathBuf,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            bridge: "culvert0".to_owned(),
            table: "culvert".to_owned(),
            subnet: Subnet4 { network: Ipv4Addr::new(172, 26, 64, 0), prefix: 20 },
            ula: None,
            netns_dir: PathBuf::from("/run/netns"),
            netns_prefix: "culvert-".to_owned(),
            veth_prefix: "cv".to_owned(),
            data_dir: PathBuf::from("/var/lib/culvert"),
            cgroup_parent: "culvert".to_owned(),
            nft: PathBuf::from("nft"),
        }
    }
}

/// A setting that cannot work.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("network setting {setting}: {value:?} {expected}")]
pub struct SettingsError {
    /// Which one.
    pub setting: &'static str,
    /// Its value.
    pub value: String,
    /// What it should be.
    pub expected: &'static str,
}

impl NetworkSettings {
    /// Where the netns of an allocation is mounted.
    #[must_use]
    pub fn netns(&self, id: &AllocId) -> PathBuf {
        self.netns_dir.join(format!("{}{}", self.netns_prefix, id.short()))
    }

    /// Checks what ends up in interface names, file names and firewall rules.
    ///
    /// # Errors
    /// [`SettingsError`] with the setting's name.
    pub fn check(&self) -> Result<(), SettingsError> {
        let word = |setting, value: &str, longest: usize| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            if !value.is_empty() && value.len() <= longest && value.bytes().all(allowed) {
                return Ok(());
            }
            Err(SettingsError {
                setting,
                value: value.to_owned(),
                expected: "must be short and of letters, digits, - and _",
            })
        };
        word("bridge", &self.bridge, MAX_INTERFACE_NAME)?;
        word("table", &self.table, 64)?;
        word("netns_prefix", &self.netns_prefix, 64)?;
        word("veth_prefix", &self.veth_prefix, MAX_INTERFACE_NAME - super::SHORT_ID)?;
        crate::task::check_cgroup_parent(&self.cgroup_parent).map_err(|value| SettingsError {
            setting: "cgroup_parent",
            value,
            expected: "must be a relative path of plain names",
        })?;
        let Subnet4 { network, prefix } = self.subnet;
        let subnet = || SettingsError {
            setting: "subnet",
            value: format!("{network}/{prefix}"),
            expected: "must be an IPv4 network of prefix length 8 to 30 with host bits zero",
        };
        if !(8..=30).contains(&prefix) || !self.subnet.contains(network) {
            return Err(subnet());
        }
        if let Some(ula) = self.ula.filter(|ula| ula.to_bits() & u128::from(u64::MAX) != 0) {
            let expected = "must be a /64 prefix: its low 64 bits are zero";
            return Err(SettingsError { setting: "ula", value: ula.to_string(), expected });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_network_has_its_gateway_first() {
        let subnet = NetworkSettings::default().subnet;
        assert_eq!(subnet.host(1), Ipv4Addr::new(172, 26, 64, 1));
        assert_eq!(subnet.host(subnet.last_host()), Ipv4Addr::new(172, 26, 79, 254));
        assert!(subnet.contains(Ipv4Addr::new(172, 26, 79, 255)) && !subnet.contains(Ipv4Addr::new(172, 26, 80, 0)));
    }

    #[test]
    fn settings_that_would_reach_the_firewall_or_the_file_system_are_checked() {
        NetworkSettings::default().check().expect("the defaults work");
        let wrong = [
            NetworkSettings { bridge: "culvert0; drop".into(), ..NetworkSettings::default() },
            NetworkSettings { bridge: "a-bridge-name-too-long".into(), ..NetworkSettings::default() },
            NetworkSettings { netns_prefix: "../".into(), ..NetworkSettings::default() },
            NetworkSettings { veth_prefix: "eightlet".into(), ..NetworkSettings::default() },
            NetworkSettings { cgroup_parent: "../system.slice".into(), ..NetworkSettings::default() },
            NetworkSettings {
                subnet: Subnet4 { network: Ipv4Addr::new(10, 0, 0, 1), prefix: 24 },
                ..NetworkSettings::default()
            },
            NetworkSettings { ula: Some("fd00::1".parse().expect("an address")), ..NetworkSettings::default() },
        ];
        for settings in wrong {
            assert!(settings.check().is_err(), "{settings:?}");
        }
    }
}
