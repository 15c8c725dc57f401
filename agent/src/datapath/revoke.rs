//! The end of connections that policy no longer allows.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

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
struct FlowPair {
    /// Address of the caller.
    source: IpAddr,
    /// Address of the called.
    destination: IpAddr,
    /// Port of the called.
    port: u16,
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

/// Ends every connection between `ends`, at both of them; returns how many sockets were ended. `addresses` are those of the
/// workloads, and `open` opens the network namespace of one: if it is not found, its sockets have gone with it.
///
/// No kernel program is needed, so that what they once let through can be ended on a node that has none any more.
///
/// # Errors
/// When a namespace cannot be entered, or its sockets cannot be listed.
pub fn destroy_flows(
    ends: &BTreeSet<FlowEnds>,
    addresses: &BTreeMap<u32, Vec<IpAddr>>,
    open: impl Fn(u32) -> io::Result<OwnedFd>,
) -> io::Result<usize> {
    let mut by_workload: BTreeMap<u32, Vec<FlowPair>> = BTreeMap::new();
    for &FlowEnds { source, destination, port } in ends {
        let (Some(caller), Some(called)) = (addresses.get(&source), addresses.get(&destination)) else { continue };
        for (from, to) in caller.iter().flat_map(|from| called.iter().map(move |to| (*from, *to))) {
            if from.is_ipv4() == to.is_ipv4() {
                let pair = FlowPair { source: from, destination: to, port };
                by_workload.entry(source).or_default().push(pair);
                by_workload.entry(destination).or_default().push(pair);
            }
        }
    }
    let mut ended = 0;
    for (workload, pairs) in by_workload {
        ended += match open(workload) {
            Ok(netns) => destroy(netns.as_fd(), &pairs)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(ended)
}

/// Ends every connection of `pairs` that has an end in `netns`, whether it is open, opening or closing; returns how many.
fn destroy(netns: BorrowedFd<'_>, pairs: &[FlowPair]) -> io::Result<usize> {
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
