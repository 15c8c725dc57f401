//! Links, addresses and routes: the only user of `rtnetlink`, whose interface changes often.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::path::Path;

use futures::TryStreamExt as _;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteProtocol};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::netns::run_in_netns;
use super::types::MacAddress;

/// A link as the kernel describes it.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) is_bridge: bool,
    pub(super) up: bool,
    /// Index of the bridge it is a port of.
    pub(super) controller: Option<u32>,
}

/// A conversation with the kernel about one netns.
pub(super) struct Netlink {
    handle: Handle,
}

fn plain(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

impl Netlink {
    /// About the calling thread's netns.
    pub(super) fn connect() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        // Ends by itself when the handle is dropped.
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// About the netns at `path`.
    pub(super) async fn connect_in(path: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        run_in_netns(path, move || {
            let _entered = runtime.enter();
            Self::connect()
        })
        .await
    }

    /// All links.
    pub(super) async fn links(&self) -> io::Result<Vec<Link>> {
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(plain)?;
        Ok(links.iter().map(describe).collect())
    }

    /// The link called `name`, if there is one.
    pub(super) async fn link(&self, name: &str) -> io::Result<Option<Link>> {
        match self.handle.link().get().match_name(name).execute().try_next().await.map_err(plain) {
            Ok(found) => Ok(found.as_ref().map(describe)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The index of `name`, which must exist.
    pub(super) async fn index(&self, name: &str) -> io::Result<u32> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("interface {name} does not exist"));
        Ok(self.link(name).await?.ok_or_else(missing)?.index)
    }

    /// Makes a bridge. Its Ethernet address is fixed: by default it would change with its ports.
    pub(super) async fn add_bridge(&self, name: &str, mac: MacAddress) -> io::Result<()> {
        let link = LinkBridge::new(name).address(mac.0.to_vec()).build();
        self.handle.link().add(link).execute().await.map_err(plain)
    }

    /// Makes a veth pair: `name` here, `peer` with `mac` in `netns`, in one step: there is no moment at which the peer is in
    /// this netns.
    pub(super) async fn add_veth(&self, name: &str, netns: &Path, peer: &str, mac: MacAddress) -> io::Result<()> {
        let netns = std::fs::File::open(netns)?;
        let mut inside = LinkMessage::default();
        inside.attributes = vec![
            LinkAttribute::IfName(peer.to_owned()),
            LinkAttribute::Address(mac.0.to_vec()),
            LinkAttribute::NetNsFd(netns.as_raw_fd()),
        ];
        let link = LinkVeth::new(name, peer).set_info_data(InfoData::Veth(InfoVeth::Peer(inside))).build();
        self.handle.link().add(link).execute().await.map_err(plain)
    }

    /// Makes the link a port of `bridge` and takes it up. Hairpin: a workload may reach itself through a published port,
    /// also where bridged packets pass the host's packet filter (`bridge-nf-call-iptables`).
    pub(super) async fn attach(&self, link: u32, bridge: u32) -> io::Result<()> {
        let port = LinkUnspec::new_with_index(link).controller(bridge).build();
        self.handle.link().set(port).execute().await.map_err(plain)?;
        self.handle.link().set_port(LinkBridgePort::new(link).hairpin(true).build()).execute().await.map_err(plain)?;
        self.set_up(link).await
    }

    /// Takes the link up.
    pub(super) async fn set_up(&self, link: u32) -> io::Result<()> {
        self.handle.link().set(LinkUnspec::new_with_index(link).up().build()).execute().await.map_err(plain)
    }

    /// Deletes a link; one that is not there is deleted.
    pub(super) async fn delete(&self, name: &str) -> io::Result<()> {
        let Some(link) = self.link(name).await? else { return Ok(()) };
        match self.handle.link().del(link.index).execute().await.map_err(plain) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
    }

    /// Gives the link an address; the same one again changes nothing. IPv6: without duplicate address detection, whose
    /// second of delay every start would pay; we assign the addresses, so none is there twice.
    pub(super) async fn add_address(&self, link: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut request = self.handle.address().add(link, address, prefix).replace();
        if address.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(plain)
    }

    /// The addresses of one link with their prefix lengths.
    pub(super) async fn addresses(&self, link: u32) -> io::Result<Vec<(IpAddr, u8)>> {
        let request = self.handle.address().get().set_link_index_filter(link);
        let addresses: Vec<AddressMessage> = request.execute().try_collect().await.map_err(plain)?;
        let address = |message: &AddressMessage| {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            local.or(any).map(|address| (address, message.header.prefix_len))
        };
        Ok(addresses.iter().filter(|message| message.header.index == link).filter_map(address).collect())
    }

    /// Default route over IPv4.
    pub(super) async fn add_default4(&self, link: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(link).build();
        self.handle.route().add(route).replace().execute().await.map_err(plain)
    }

    /// Default route over IPv6.
    pub(super) async fn add_default6(&self, link: u32, gateway: Ipv6Addr) -> io::Result<()> {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(link).build();
        self.handle.route().add(route).replace().execute().await.map_err(plain)
    }

    /// Is there a default route over IPv4?
    pub(super) async fn has_default4(&self) -> io::Result<bool> {
        let dump = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<_> = self.handle.route().get(dump).execute().try_collect().await.map_err(plain)?;
        Ok(routes.iter().any(|route| {
            route.header.destination_prefix_length == 0
                && route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)))
        }))
    }

    /// Is there an IPv6 default route that was learned from a router (RFC 4861)? Such routes are lost when the host
    /// becomes a router itself.
    pub(super) async fn has_learned_default6(&self) -> io::Result<bool> {
        let dump = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let routes: Vec<_> = self.handle.route().get(dump).execute().try_collect().await.map_err(plain)?;
        Ok(routes
            .iter()
            .any(|route| route.header.destination_prefix_length == 0 && route.header.protocol == RouteProtocol::Ra))
    }
}

fn describe(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        is_bridge: false,
        up: message.header.flags.contains(LinkFlags::Up),
        controller: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
            }
            _ => {}
        }
    }
    link
}
