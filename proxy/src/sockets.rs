//! Where sockets come from: the worker is handed its own by the agent, a sidecar makes them itself.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};

use futures::FutureExt;
use futures::future::BoxFuture;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpSocket;

use crate::handoff::Family;

/// Connections that may wait to be accepted.
pub const BACKLOG: i32 = 4096;

/// Makes the sockets that belong to the workload's network namespace.
pub trait Sockets: Send + Sync + 'static {
    /// A listening socket for `address`; asked again for the same address, the same socket.
    fn listen(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpListener>>;

    /// The listener at `address` is not needed any more.
    fn forget(&self, address: SocketAddr);

    /// An unconnected socket for one connection to the application. Whoever makes it bounds the wait.
    fn app_socket(&self, family: Family) -> BoxFuture<'static, io::Result<TcpSocket>>;
}

/// Sockets of the process's own network namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct OwnSockets;

impl Sockets for OwnSockets {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpListener>> {
        std::future::ready(listen(address)).boxed()
    }

    fn forget(&self, _address: SocketAddr) {}

    fn app_socket(&self, family: Family) -> BoxFuture<'static, io::Result<TcpSocket>> {
        std::future::ready(unconnected(family)).boxed()
    }
}

pub(crate) fn unconnected(family: Family) -> io::Result<TcpSocket> {
    match family {
        Family::V4 => TcpSocket::new_v4(),
        Family::V6 => TcpSocket::new_v6(),
    }
}

/// Listens on `address`; on every address, IPv6 included where there is IPv6, if that is `0.0.0.0` or `[::]`.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    if address.ip().is_unspecified() {
        let everywhere = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), address.port());
        let dual = bind(everywhere);
        if address.is_ipv6() || dual.is_ok() {
            return dual;
        }
    }
    bind(address)
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn every_address_means_both_families() {
        let listener = listen("0.0.0.0:0".parse().expect("address")).expect("listen");
        let port = listener.local_addr().expect("address").port();
        TcpStream::connect(("127.0.0.1", port)).expect("IPv4");
        if Socket::new(Domain::IPV6, Type::STREAM, None).is_ok() && listener.local_addr().expect("address").is_ipv6() {
            TcpStream::connect(("::1", port)).expect("IPv6");
        }
    }
}
