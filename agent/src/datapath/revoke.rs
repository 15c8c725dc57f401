//! The end of connections that policy no longer allows.

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use super::netns;
use super::sock_diag::{SockDiag, States, TcpSocket};

/// All direct connections from one workload to a port of another.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FlowEnds {
    /// The workload that calls.
    pub source: u32,
    /// The workload that is called.
    pub destination: u32,
    /// Port of the called application.
    pub port: u16,
}

/// All connections from one address to a port of another.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct FlowPair {
    /// Address of the caller.
    pub(super) source: IpAddr,
    /// Address of the called.
    pub(super) destination: IpAddr,
    /// Port of the called.
    pub(super) port: u16,
}

impl FlowPair {
    /// Is `socket` an end of such a connection, on either side?
    fn has_end(&self, socket: &TcpSocket) -> bool {
        let called =
            (socket.remote, socket.remote_port) == (self.destination, self.port) && socket.local == self.source;
        let calls = (socket.local, socket.local_port) == (self.destination, self.port) && socket.remote == self.source;
        called || calls
    }
}

/// Ends every connection of `pairs` that has an end in `netns`, whether it is open, opening or closing; returns how many.
pub(super) fn destroy(netns: BorrowedFd<'_>, pairs: &[FlowPair]) -> io::Result<usize> {
    if pairs.is_empty() {
        return Ok(0);
    }
    netns::enter(netns, || {
        let mut diag = SockDiag::open()?;
        let sockets = diag.list(States::Connected)?;
        let mut ended = 0;
        for socket in sockets.iter().filter(|socket| pairs.iter().any(|pair| pair.has_end(socket))) {
            ended += usize::from(diag.destroy(socket)?);
        }
        Ok(ended)
    })?
}
