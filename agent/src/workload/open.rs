//! What the network needs of the host before the first allocation: bridge, addresses, kernel settings.

use std::net::{IpAddr, Ipv6Addr};

use super::netlink::Netlink;
use super::network::{NetworkError, PREFIX6, failed, mac_of};
use super::settings::NetworkSettings;
use super::state::{GATEWAY, State, forwarding, interface_forwarding};
use super::sysctl;

/// Makes or adopts the bridge with its addresses; returns its index.
pub(super) async fn open_bridge(
    netlink: &Netlink,
    settings: &NetworkSettings,
    ula: Option<Ipv6Addr>,
) -> Result<u32, NetworkError> {
    let name = &settings.bridge;
    let gateway = settings.subnet.host(GATEWAY);
    check_overlap(netlink, settings).await?;
    match netlink.link(name).await.map_err(failed("look at", name))? {
        Some(link) if !link.is_bridge => return Err(NetworkError::NotABridge(name.clone())),
        Some(_) => {}
        None => netlink.add_bridge(name, mac_of(gateway)).await.map_err(failed("create bridge", name))?,
    }
    let index = netlink.index(name).await.map_err(failed("look at", name))?;
    if ula.is_some() {
        for (setting, value) in [("disable_ipv6", "0"), ("accept_ra", "0"), ("accept_dad", "0")] {
            sysctl::set(&format!("net/ipv6/conf/{name}/{setting}"), value)?;
        }
    }
    sysctl::set(&format!("net/ipv4/conf/{name}/route_localnet"), "1")?;
    let prefix = settings.subnet.prefix;
    netlink.add_address(index, gateway.into(), prefix).await.map_err(failed("give its address to", name))?;
    if let Some(ula) = ula {
        let gateway = Ipv6Addr::from_bits(ula.to_bits() | u128::from(GATEWAY));
        netlink.add_address(index, gateway.into(), PREFIX6).await.map_err(failed("give its address to", name))?;
    }
    netlink.set_up(index).await.map_err(failed("take up", name))?;
    Ok(index)
}

async fn check_overlap(netlink: &Netlink, settings: &NetworkSettings) -> Result<(), NetworkError> {
    let subnet = settings.subnet;
    for link in netlink.links().await.map_err(failed("list", "interfaces"))? {
        if link.name == settings.bridge {
            continue;
        }
        let addresses = netlink.addresses(link.index).await.map_err(failed("read addresses of", &link.name))?;
        for (address, prefix) in addresses {
            let IpAddr::V4(other) = address else { continue };
            // Two networks overlap when one holds the other's address under the shorter prefix.
            let wider = super::Subnet4 { network: other, prefix: prefix.min(subnet.prefix).max(1) };
            let mask = u32::MAX << (32 - u32::from(wider.prefix));
            if other.to_bits() & mask == subnet.network.to_bits() & mask {
                let subnet = format!("{}/{}", subnet.network, subnet.prefix);
                return Err(NetworkError::Overlap { subnet, address, interface: link.name });
            }
        }
    }
    Ok(())
}

/// Makes the host forward for the bridge. What is changed is remembered for [`Network::close_all`]; the packet filter lets
/// only interfaces go on that forwarded before, so that the host becomes a router for workloads only.
pub(super) async fn open_sysctls(
    netlink: &Netlink,
    settings: &NetworkSettings,
    ipv6: bool,
    state: &mut State,
) -> Result<Vec<String>, NetworkError> {
    let mut warnings = Vec::new();
    if sysctl::read(forwarding("ipv4"))? == "0" {
        // The kernel changes these when forwarding is switched, either way.
        remember_forwarding(settings, "ipv4", state)?;
        let redirects = "net/ipv4/conf/all/accept_redirects";
        state.remember_sysctl(redirects, &sysctl::read(redirects)?)?;
        state.remember_sysctl(forwarding("ipv4"), "0")?;
        sysctl::set(forwarding("ipv4"), "1")?;
    }
    if ipv6 && sysctl::read(forwarding("ipv6"))? == "0" {
        if netlink.has_learned_default6().await.map_err(failed("list", "IPv6 routes"))? {
            warnings.push(
                "this host learned its IPv6 default route from a router and would lose it as a router itself: IPv6 stays \
                 between workloads and this host (set net.ipv6.conf.all.forwarding=1 to change that)"
                    .to_owned(),
            );
        } else {
            remember_forwarding(settings, "ipv6", state)?;
            state.remember_sysctl(forwarding("ipv6"), "0")?;
            sysctl::set(forwarding("ipv6"), "1")?;
        }
    }
    Ok(warnings)
}

fn remember_forwarding(settings: &NetworkSettings, family: &str, state: &mut State) -> Result<(), NetworkError> {
    for interface in sysctl::interfaces(family) {
        let name = interface_forwarding(family, &interface);
        if interface != settings.bridge && sysctl::exists(&name) && sysctl::read(&name)? != "0" {
            state.remember_sysctl(&name, "1")?;
        }
    }
    Ok(())
}
