//! Sockets of a network namespace, through `NETLINK_SOCK_DIAG` (sock_diag(7)): listed, and destroyed.
//!
//! Messages are put together and taken apart by hand: two requests and one answer of fixed layout
//! (`include/uapi/linux/inet_diag.h`). What comes back is the kernel's, and is still read with every bound checked.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use culvert_ebpf_common::Address;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_sockid`.
const ID: usize = 48;
/// `struct inet_diag_msg`.
const MESSAGE: usize = 72;
/// A dump's datagrams are at most 32 KiB.
const BUFFER: usize = 64 * 1024;
/// The kernel answers at once; a limit all the same, in seconds.
const ANSWER_TIMEOUT: i64 = 5;

/// Sets of TCP states, as `struct inet_diag_req_v2` wants them.
#[derive(Clone, Copy, Debug)]
pub(super) enum States {
    /// Listening sockets.
    Listening,
    /// Everything with a peer: opening, open, or closing, but for TIME_WAIT, where nobody owns the socket any more.
    Connected,
}

impl States {
    fn bits(self) -> u32 {
        match self {
            Self::Listening => 1 << 10,
            // ESTABLISHED to FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING, NEW_SYN_RECV.
            Self::Connected => 0b1_1011_0011_1110,
        }
    }
}

/// A TCP socket of the namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct TcpSocket {
    /// `AF_INET` or `AF_INET6`; a v4-mapped connection of an IPv6 socket has the latter.
    pub(super) family: u8,
    /// Address of this end.
    pub(super) local: IpAddr,
    /// Port of this end.
    pub(super) local_port: u16,
    /// Address of the other end.
    pub(super) remote: IpAddr,
    /// Port of the other end.
    pub(super) remote_port: u16,
    /// Inode number; zero for a socket that no process holds yet, or any more.
    pub(super) inode: u32,
    /// `struct inet_diag_sockid`, to name the socket in a request.
    id: [u8; ID],
}

/// A netlink socket that answers about the namespace it was made in.
pub(super) struct SockDiag {
    socket: OwnedFd,
    sequence: u32,
}

impl SockDiag {
    /// Opens it, for the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All TCP sockets in `states`, of both families.
    pub(super) fn list(&mut self, states: States) -> io::Result<Vec<TcpSocket>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            match self.dump(family, states, &mut found) {
                // Without IPv6 in the kernel there are no such sockets.
                Err(error) if family == AF_INET6 && error.raw_os_error() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        Ok(found)
    }

    fn dump(&mut self, family: u8, states: States, found: &mut Vec<TcpSocket>) -> io::Result<()> {
        self.request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, states.bits(), &[0; ID])?;
        loop {
            match self.receive(found)? {
                Progress::More => {}
                Progress::Done => return Ok(()),
            }
        }
    }

    /// Ends a connection as by a local reset: its owner gets `ECONNABORTED`, the peer `ECONNRESET`. `false` when the socket was
    /// gone already.
    pub(super) fn destroy(&mut self, target: &TcpSocket) -> io::Result<bool> {
        self.request(SOCK_DESTROY, NLM_F_ACK, target.family, u32::MAX, &target.id)?;
        match self.receive(&mut Vec::new()) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn request(&mut self, kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = encode(kind, flags | NLM_F_REQUEST, self.sequence, family, states, id);
        send(self.socket.as_fd().as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&mut self, found: &mut Vec<TcpSocket>) -> io::Result<Progress> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            return parse(&buffer[..length], self.sequence, found);
        }
    }
}

/// Is the answer complete?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Progress {
    More,
    Done,
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn encode(kind: u16, flags: u16, sequence: u32, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let length = HEADER + 8 + ID;
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&u32::try_from(length).expect("72").to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&[family, IPPROTO_TCP, 0, 0]);
    message.extend_from_slice(&states.to_ne_bytes());
    message.extend_from_slice(id);
    message
}

/// Reads one datagram of an answer to request `sequence`.
fn parse(mut datagram: &[u8], sequence: u32, found: &mut Vec<TcpSocket>) -> io::Result<Progress> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed answer of NETLINK_SOCK_DIAG");
    while !datagram.is_empty() {
        let header: &[u8; HEADER] = datagram.first_chunk().ok_or_else(malformed)?;
        let length = word(header, 0) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let body = datagram.get(HEADER..length).ok_or_else(malformed)?;
        let answered = word(header, 8);
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        if answered != sequence {
            continue;
        }
        match kind {
            NLMSG_DONE => return Ok(Progress::Done),
            NLMSG_ERROR => {
                let code: [u8; 4] = *body.first_chunk().ok_or_else(malformed)?;
                return match i32::from_ne_bytes(code) {
                    0 => Ok(Progress::Done),
                    error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                };
            }
            SOCK_DIAG_BY_FAMILY => found.push(socket_of(body.first_chunk().ok_or_else(malformed)?)),
            _ => {}
        }
    }
    Ok(Progress::More)
}

/// Reads `struct inet_diag_msg`.
fn socket_of(message: &[u8; MESSAGE]) -> TcpSocket {
    let family = message[0];
    let id: [u8; ID] = *message[4..].first_chunk().expect("inside the message");
    TcpSocket {
        family,
        local_port: u16::from_be_bytes([id[0], id[1]]),
        remote_port: u16::from_be_bytes([id[2], id[3]]),
        local: address(family, id[4..].first_chunk().expect("inside the id")),
        remote: address(family, id[20..].first_chunk().expect("inside the id")),
        inode: word(message, 68),
        id,
    }
}

fn address(family: u8, bytes: &[u8; 16]) -> IpAddr {
    let words = [word(bytes, 0), word(bytes, 4), word(bytes, 8), word(bytes, 12)];
    if family == AF_INET { Address::v4(words[0]) } else { Address::v6(words) }.into()
}

/// Four bytes at `at`, which the caller knows to be inside.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_listening_socket_is_listed() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let sockets = SockDiag::open().expect("netlink").list(States::Listening).expect("a list");
        let ours = sockets.iter().find(|socket| socket.local_port == port).expect("our listener");
        assert_eq!((ours.family, ours.local), (AF_INET, IpAddr::from([127, 0, 0, 1])));
        assert_ne!(ours.inode, 0);
    }

    #[test]
    fn the_states_are_those_with_a_peer() {
        let states = States::Connected.bits();
        for (state, name) in [(6, "TIME_WAIT"), (7, "CLOSE"), (10, "LISTEN")] {
            assert_eq!(states & 1 << state, 0, "{name}");
        }
        for state in [1, 2, 3, 4, 5, 8, 9, 11, 12] {
            assert_ne!(states & 1 << state, 0, "state {state}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_parser_down(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let mut found = Vec::new();
            parse(&bytes, 1, &mut found).ok();
        }

        #[test]
        fn no_header_brings_the_parser_down(
            length in 0_u32..400, kind in 0_u16..32, rest in proptest::collection::vec(any::<u8>(), 0..300)
        ) {
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(&[0; 2]);
            bytes.extend_from_slice(&1_u32.to_ne_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&rest);
            let mut found = Vec::new();
            parse(&bytes, 1, &mut found).ok();
            prop_assert!(found.len() <= bytes.len() / MESSAGE);
        }
    }
}
