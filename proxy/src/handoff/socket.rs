//! The socket itself: one JSON message per datagram, with descriptors; and the meeting point for re-adoption.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use parking_lot::Mutex;
use rustix::cmsg_space;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use super::messages::{MAX_APP_SOCKETS, ToAgent, ToWorker};

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors in one message.
pub const MAX_DESCRIPTORS: usize = MAX_APP_SOCKETS as usize;
/// Abstract unix socket where an agent waits for the worker of its predecessor. Scoped by the network namespace.
pub const ADOPTION_SOCKET: &str = "culvert/worker";

/// A message that knows how many descriptors travel with it.
pub trait Message: Serialize + DeserializeOwned {
    /// How many descriptors the message says it carries.
    fn descriptors(&self) -> usize;
}

impl Message for ToWorker {
    fn descriptors(&self) -> usize {
        match self {
            Self::Listener { result, .. } | Self::XdsConnection { result, .. } => usize::from(result.is_ok()),
            Self::AppSockets { count, .. } => usize::from(*count),
            Self::Serve { .. } | Self::Stop { .. } | Self::Ping | Self::Drain { .. } => 0,
        }
    }
}

impl Message for ToAgent {
    fn descriptors(&self) -> usize {
        match self {
            Self::Adopt { .. } => 1,
            Self::Hello { .. }
            | Self::OpenListener { .. }
            | Self::MoreAppSockets { .. }
            | Self::ConnectXds { .. }
            | Self::Event(_)
            | Self::Events(_)
            | Self::EventsLost { .. }
            | Self::Pong
            | Self::Status(_)
            | Self::Traffic { .. }
            | Self::Stopped { .. } => 0,
        }
    }
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// The message speaks of another number of descriptors than were given, or of more than [`MAX_DESCRIPTORS`].
    #[error("message speaks of {said} descriptors, {given} given (at most {MAX_DESCRIPTORS})")]
    Descriptors {
        /// What the message says.
        said: usize,
        /// What was given.
        given: usize,
    },
    /// The message does not serialise.
    #[error("serialise message")]
    Serialise(#[source] serde_json::Error),
    /// The socket failed; `EPIPE` when the other end is gone.
    #[error("send on the control socket")]
    Socket(#[source] io::Error),
}

/// Why no message was received. Anything but [`ReceiveError::Socket`] leaves the socket usable.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("message was cut off")]
    Truncated,
    /// Not all descriptors came: this process has none left, or there were more than [`MAX_DESCRIPTORS`].
    #[error("descriptors of a message were cut off: too many of them are open here, or too many were sent")]
    DescriptorsLost,
    /// Not a message of this protocol.
    #[error("parse message")]
    Parse(#[source] serde_json::Error),
    /// The message speaks of another number of descriptors than came.
    #[error("message speaks of {said} descriptors, {came} came")]
    Descriptors {
        /// What the message says.
        said: usize,
        /// What came.
        came: usize,
    },
    /// The socket failed.
    #[error("receive on the control socket")]
    Socket(#[source] io::Error),
}

/// One end of the control socket. Sending and receiving may go on at the same time, from different tasks.
#[derive(Debug)]
pub struct ControlSocket {
    /// tokio's wrapper for a connected unix socket. It never sees a plain read or write: only `recvmsg` and `sendmsg`.
    socket: UnixStream,
    /// Space for one incoming message; locked only for the duration of one non-blocking `recvmsg`.
    incoming: Mutex<Box<[u8]>>,
}

impl ControlSocket {
    /// Wraps a connected `SOCK_SEQPACKET` socket; makes it non-blocking and close-on-exec. Needs a tokio runtime.
    ///
    /// # Errors
    /// The descriptor is no such socket, or cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if net::sockopt::socket_type(&fd)? != SocketType::SEQPACKET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "control socket is not SOCK_SEQPACKET"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        let socket = UnixStream::from_std(fd.into())?;
        Ok(Self { socket, incoming: Mutex::new(vec![0; MAX_MESSAGE].into()) })
    }

    /// Makes both ends: the agent's, and the descriptor for the worker it starts (close-on-exec until it is its standard input).
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self::new(ours)?, theirs))
    }

    /// Calls an agent that waits at the abstract socket `name` ([`ADOPTION_SOCKET`]).
    ///
    /// # Errors
    /// `ECONNREFUSED` while nobody waits.
    pub fn call(name: &str) -> io::Result<Self> {
        // On unix sockets it would wait only while the backlog is full; so EAGAIN comes back then.
        let fd = net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        net::connect(&fd, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        Self::new(fd)
    }

    /// Who is at the other end: of a pair its maker, of a call the caller. The kernel vouches for it.
    ///
    /// # Errors
    /// The socket is not a unix socket.
    pub fn peer(&self) -> io::Result<PeerCredentials> {
        let credentials = net::sockopt::socket_peercred(&self.socket)?;
        Ok(PeerCredentials { pid: credentials.pid.as_raw_nonzero().get(), uid: credentials.uid.as_raw() })
    }

    /// Sends one message with its descriptors; waits while the other end's queue is full.
    ///
    /// # Errors
    /// [`SendError`]; nothing was sent then.
    pub async fn send<M: Message>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        let bytes = encode(message, descriptors.len())?;
        let sent =
            self.socket.async_io(Interest::WRITABLE, || send_once(self.socket.as_fd(), &bytes, descriptors)).await;
        sent.map_err(SendError::Socket)
    }

    /// Sends anything, with no descriptor.
    #[cfg(test)]
    pub(crate) async fn send_raw(&self, bytes: &[u8]) {
        let sent = self.socket.async_io(Interest::WRITABLE, || send_once(self.socket.as_fd(), bytes, &[])).await;
        sent.expect("the other end listens");
    }

    /// Receives one message with its descriptors; `None` when the other end is gone. Cancel-safe.
    ///
    /// # Errors
    /// [`ReceiveError`]; descriptors of a refused message are closed.
    pub async fn recv<M: Message>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, ReceiveError> {
        let Some((message, descriptors)) = self.recv_parts().await? else { return Ok(None) };
        Ok(Some((message, descriptors?)))
    }

    /// As [`Self::recv`], but gives out a message whose descriptors did not come as they should: with
    /// [`ReceiveError::DescriptorsLost`] or [`ReceiveError::Descriptors`] in their place.
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub async fn recv_parts<M: Message>(
        &self,
    ) -> Result<Option<(M, Result<Vec<OwnedFd>, ReceiveError>)>, ReceiveError> {
        let received = self.socket.async_io(Interest::READABLE, || {
            let mut incoming = self.incoming.lock();
            let (length, cut, descriptors) = receive_once(self.socket.as_fd(), &mut incoming)?;
            if cut.contains(ReturnFlags::TRUNC) {
                return Ok(Err(ReceiveError::Truncated));
            }
            if length == 0 {
                return Ok(Ok(None)); // a message is never empty: end of file
            }
            Ok(serde_json::from_slice::<M>(&incoming[..length])
                .map_err(ReceiveError::Parse)
                .map(|m| Some((m, cut, descriptors))))
        });
        // A reset means that the other end died with our messages unread: the same as its end.
        let received = match received.await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            other => other.map_err(ReceiveError::Socket)?,
        };
        let Some((message, cut, descriptors)) = received? else { return Ok(None) };
        let (said, came) = (M::descriptors(&message), descriptors.len());
        let descriptors = if cut.contains(ReturnFlags::CTRUNC) {
            Err(ReceiveError::DescriptorsLost)
        } else if said != came {
            Err(ReceiveError::Descriptors { said, came })
        } else {
            Ok(descriptors)
        };
        Ok(Some((message, descriptors)))
    }
}

fn encode<M: Message>(message: &M, given: usize) -> Result<Vec<u8>, SendError> {
    let said = message.descriptors();
    if said != given || given > MAX_DESCRIPTORS {
        return Err(SendError::Descriptors { said, given });
    }
    let bytes = serde_json::to_vec(message).map_err(SendError::Serialise)?;
    if bytes.len() > MAX_MESSAGE { Err(SendError::TooLong(bytes.len())) } else { Ok(bytes) }
}

fn send_once(fd: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("descriptors do not fit the control buffer"));
    }
    net::sendmsg(fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Length of the message, what of it was cut off, and its descriptors.
fn receive_once(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<(usize, ReturnFlags, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = net::recvmsg(fd, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    Ok((message.bytes, message.flags, descriptors))
}

/// Who is at the other end of a unix socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PeerCredentials {
    /// Process ID.
    pub pid: i32,
    /// User ID.
    pub uid: u32,
}

/// Where an agent waits for a worker that outlived its predecessor.
#[derive(Debug)]
pub struct AdoptionListener {
    listener: UnixListener,
}

impl AdoptionListener {
    /// Listens at the abstract socket `name` ([`ADOPTION_SOCKET`]).
    ///
    /// # Errors
    /// `EADDRINUSE` while another agent waits there.
    pub fn bind(name: &str) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        net::bind(&fd, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        net::listen(&fd, 8)?;
        Ok(Self { listener: UnixListener::from_std(fd.into())? })
    }

    /// Waits for a caller. Whether it is the recorded worker is for the caller of this function to check.
    ///
    /// # Errors
    /// No descriptors left.
    pub async fn accept(&self) -> io::Result<(ControlSocket, PeerCredentials)> {
        let (caller, _) = self.listener.accept().await?;
        let socket = ControlSocket::new(caller.into_std()?.into())?;
        let peer = socket.peer()?;
        Ok((socket, peer))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream as StdStream;

    use super::*;
    use crate::handoff::Family;

    fn ends() -> (ControlSocket, ControlSocket) {
        let (agent, worker) = ControlSocket::pair().expect("socketpair");
        (agent, ControlSocket::new(worker).expect("wrap"))
    }

    #[tokio::test]
    async fn a_listener_arrives_usable_and_in_order_with_other_messages() {
        let (agent, worker) = ends();
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let asked = ToAgent::OpenListener { request: 7, proxy: "p".to_owned(), address };
        worker.send(&asked, &[]).await.expect("ask");
        assert_eq!(agent.recv::<ToAgent>().await.expect("receive").expect("open").0, asked);
        let refusal = ToWorker::Listener { request: 6, result: Err("in use".to_owned()) };
        agent.send(&refusal, &[]).await.expect("refuse");
        agent.send(&ToWorker::Listener { request: 7, result: Ok(()) }, &[listener.as_fd()]).await.expect("hand over");
        drop(listener);
        let (first, none) = worker.recv::<ToWorker>().await.expect("receive").expect("open");
        assert_eq!((first, none.len()), (refusal, 0));
        let (_, mut descriptors) = worker.recv::<ToWorker>().await.expect("receive").expect("open");
        let handed = TcpListener::from(descriptors.pop().expect("one descriptor"));
        let mut client = TcpStream::connect(address).expect("connect");
        let (mut server, _) = handed.accept().expect("accept");
        client.write_all(b"x").expect("write");
        server.read_exact(&mut [0]).expect("read");
    }

    #[tokio::test]
    async fn a_full_batch_of_sockets_travels_in_one_message() {
        let (agent, worker) = ends();
        let sockets: Vec<OwnedFd> = (0..MAX_DESCRIPTORS)
            .map(|_| net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket"))
            .collect();
        let borrowed: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let message =
            ToWorker::AppSockets { proxy: "p".to_owned(), family: Family::V4, count: MAX_APP_SOCKETS, error: None };
        agent.send(&message, &borrowed).await.expect("send");
        let (came, descriptors) = worker.recv::<ToWorker>().await.expect("receive").expect("open");
        assert_eq!((came, descriptors.len()), (message, MAX_DESCRIPTORS));
    }

    #[tokio::test]
    async fn a_wrong_number_of_descriptors_is_refused_on_both_ends() {
        let (agent, worker) = ends();
        let message = ToWorker::Listener { request: 1, result: Ok(()) };
        assert!(matches!(agent.send(&message, &[]).await, Err(SendError::Descriptors { said: 1, given: 0 })));
        let (bytes, (stream, _)) = (serde_json::to_vec(&message).expect("json"), StdStream::pair().expect("pair"));
        send_once(agent.socket.as_fd(), &bytes, &[stream.as_fd(), stream.as_fd()]).expect("send");
        assert!(matches!(worker.recv::<ToWorker>().await, Err(ReceiveError::Descriptors { said: 1, came: 2 })));
        agent.send(&ToWorker::Drain { deadline_ms: 1 }, &[]).await.expect("still usable");
        assert!(worker.recv::<ToWorker>().await.expect("receive").is_some());
    }

    #[tokio::test]
    async fn who_has_no_descriptors_left_learns_of_those_that_were_cut_off() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let (agent, worker) = ends();
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let adopt = ToAgent::Adopt { proxy: "p".to_owned(), address };
        worker.send(&adopt, &[listener.as_fd()]).await.expect("send");
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limit }).expect("lowered");
        let received = agent.recv::<ToAgent>().await;
        setrlimit(Resource::Nofile, limit).expect("as before");
        assert!(matches!(received, Err(ReceiveError::DescriptorsLost)), "{received:?}");
        worker.send(&adopt, &[listener.as_fd()]).await.expect("still usable");
        assert!(agent.recv::<ToAgent>().await.expect("receive").is_some());
    }

    #[tokio::test]
    async fn a_message_whose_descriptors_were_cut_off_says_what_it_was() {
        const TOO_MANY: usize = 2 * MAX_DESCRIPTORS;
        let (agent, worker) = ends();
        let message =
            ToWorker::AppSockets { proxy: "p".to_owned(), family: Family::V4, count: MAX_APP_SOCKETS, error: None };
        let bytes = serde_json::to_vec(&message).expect("json");
        let (stream, _) = StdStream::pair().expect("pair");
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(TOO_MANY))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [stream.as_fd(); TOO_MANY];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        net::sendmsg(&agent.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).expect("send");
        let (came, descriptors) = worker.recv_parts::<ToWorker>().await.expect("receive").expect("open");
        assert_eq!(came, message);
        assert!(matches!(descriptors, Err(ReceiveError::DescriptorsLost)), "{descriptors:?}");
    }

    #[tokio::test]
    async fn nonsense_and_oversized_messages_are_refused_and_the_end_is_told() {
        let (agent, worker) = ends();
        send_once(agent.socket.as_fd(), b"{]", &[]).expect("send");
        assert!(matches!(worker.recv::<ToWorker>().await, Err(ReceiveError::Parse(_))));
        send_once(agent.socket.as_fd(), &vec![b' '; MAX_MESSAGE + 1], &[]).expect("send");
        assert!(matches!(worker.recv::<ToWorker>().await, Err(ReceiveError::Truncated)));
        drop(agent);
        assert!(worker.recv::<ToWorker>().await.expect("end").is_none());
    }

    #[tokio::test]
    async fn a_full_queue_makes_the_sender_wait_and_nothing_is_lost() {
        const MESSAGES: u64 = 20_000; // far more than the socket queues
        let (agent, worker) = ends();
        let send = async {
            for request in 0..MESSAGES {
                worker.send(&ToAgent::ConnectXds { request }, &[]).await.expect("send");
            }
        };
        let receive = async {
            tokio::task::yield_now().await; // the sender fills the queue first
            for expected in 0..MESSAGES {
                let (message, _) = agent.recv::<ToAgent>().await.expect("receive").expect("open");
                assert_eq!(message, ToAgent::ConnectXds { request: expected });
            }
        };
        tokio::join!(send, receive);
    }

    #[tokio::test]
    async fn a_worker_finds_the_next_agent() {
        let name = format!("culvert/test/adoption/{}", std::process::id());
        assert!(ControlSocket::call(&name).is_err(), "nobody waits yet");
        let listener = AdoptionListener::bind(&name).expect("bind");
        let worker = ControlSocket::call(&name).expect("call");
        let (agent, peer) = listener.accept().await.expect("accept");
        assert_eq!(peer.pid.unsigned_abs(), std::process::id());
        worker.send(&ToAgent::Hello { pid: 1, version: "v".to_owned() }, &[]).await.expect("send");
        assert!(matches!(agent.recv::<ToAgent>().await.expect("receive"), Some((ToAgent::Hello { .. }, _))));
    }
}
