//! Socket addresses.

use std::net::{IpAddr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3::{Address, SocketAddress, address, socket_address};

use super::error::{Path, ResourceError};
use super::refuse;

/// Reads an address with an IP literal and a port from 1 to 65535.
pub(super) fn socket_address(address: Option<Address>, path: &Path<'_>) -> Result<SocketAddr, ResourceError> {
    let socket = match address.and_then(|address| address.address) {
        Some(address::Address::SocketAddress(socket)) => socket,
        Some(address::Address::Pipe(_)) => return Err(path.field("pipe").unsupported()),
        Some(address::Address::EnvoyInternalAddress(_)) => {
            return Err(path.field("envoy_internal_address").unsupported());
        }
        None => return Err(path.missing()),
    };
    let path = path.field("socket_address");
    let SocketAddress {
        protocol,
        address,
        resolver_name,
        ipv4_compat: _, // `[::]` accepts IPv4 with and without it
        network_namespace_filepath,
        port_specifier,
    } = socket;
    refuse!(path; protocol, resolver_name, network_namespace_filepath);
    let ip: IpAddr = address
        .parse()
        .map_err(|_| path.field("address").invalid(format!("{:?} is not an IP address", shorten(&address))))?;
    match port_specifier {
        Some(socket_address::PortSpecifier::PortValue(port)) => match u16::try_from(port) {
            Ok(port) if port > 0 => Ok(SocketAddr::new(ip, port)),
            _ => Err(path.field("port_value").invalid(format!("port {port} is not in 1 to 65535"))),
        },
        Some(socket_address::PortSpecifier::NamedPort(_)) => Err(path.field("named_port").unsupported()),
        None => Err(path.field("port_value").missing()),
    }
}

/// Enough of `text` to recognise it in a message.
fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}
