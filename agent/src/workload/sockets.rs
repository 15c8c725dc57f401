//! Sockets made inside a workload's netns and used outside of it: listeners for the worker, its sockets towards the
//! application, and the agent's health checks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::path::Path;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::netns::run_in_netns;

/// Connections that wait to be accepted, per listener; the kernel caps it at `net.core.somaxconn`.
pub const BACKLOG: i32 = 4096;
/// Sockets in one batch at most: what fits into one message of descriptors (SCM_MAX_FD is 253).
pub const MAX_APP_SOCKETS: u16 = 128;

/// Listens on `address` inside the netns: non-blocking, SO_REUSEADDR. `[::]` takes IPv4 too; where the kernel has no IPv6
/// it becomes `0.0.0.0`.
///
/// # Errors
/// When the netns cannot be entered or the address cannot be listened on.
pub async fn listen(netns: &Path, address: SocketAddr) -> io::Result<OwnedFd> {
    run_in_netns(netns, move || match listen_here(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && no_ipv6(&error) => {
            listen_here((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        result => result,
    })
    .await
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn listen_here(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = tcp_socket(address.is_ipv6())?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(address.ip() != Ipv6Addr::UNSPECIFIED)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn tcp_socket(ipv6: bool) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

/// `count` unconnected TCP sockets of the netns, non-blocking: whoever gets them connects them there.
///
/// # Errors
/// When the netns cannot be entered, no descriptor is left, or `count` is above [`MAX_APP_SOCKETS`].
pub async fn app_sockets(netns: &Path, ipv6: bool, count: u16) -> io::Result<Vec<OwnedFd>> {
    if count > MAX_APP_SOCKETS {
        let reason = format!("{count} sockets asked for, at most {MAX_APP_SOCKETS} at once");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    run_in_netns(netns, move || (0..count).map(|_| tcp_socket(ipv6).map(OwnedFd::from)).collect()).await
}

/// Connects to `address` from inside the netns, as a process of the workload would. The caller sets the time limit.
///
/// # Errors
/// When the netns cannot be entered or nobody accepts.
pub async fn dial(netns: &Path, address: SocketAddr) -> io::Result<TcpStream> {
    let address = match address.ip() {
        // As every resolver has it: an unspecified destination is this host.
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, address.port(), 0, 0))
        }
        _ => address,
    };
    let socket = run_in_netns(netns, move || tcp_socket(address.is_ipv6())).await?;
    TcpSocket::from_std_stream(socket.into()).connect(address).await
}
