//! The test's process as the applications of a node: sockets made in the namespaces of its allocations.
//!
//! A socket belongs to the cgroup and the network namespace that it is made in. [`Apps`] moves the process into a cgroup of
//! the node, as a task is; [`App::run`] moves a thread into an allocation's namespace. What the process starts meanwhile
//! is in the cgroup too; [`crate::Node`] starts its agents outside.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{Node, PATIENCE, World, eventually};

/// The test's process is in a cgroup of the node until this is dropped; drop it before the node leaves.
#[derive(Debug)]
pub struct Apps {
    cgroup: PathBuf,
    home: PathBuf,
}

impl Apps {
    /// Moves the process.
    ///
    /// # Panics
    /// When the cgroup cannot be made or joined.
    #[must_use]
    pub fn join(world: &World) -> Self {
        let cgroup = world.unified().join(world.cgroup_parent()).join("apps");
        fs::create_dir_all(&cgroup).expect("a cgroup");
        fs::write(cgroup.join("cgroup.procs"), "0").expect("the cgroup can be joined");
        Self { cgroup, home: world.home().to_owned() }
    }
}

impl Drop for Apps {
    fn drop(&mut self) {
        drop(fs::write(self.home.join("cgroup.procs"), "0"));
        if !thread::panicking() {
            // Children of the test may be ending still.
            eventually("the cgroup is empty", || !self.cgroup.exists() || fs::remove_dir(&self.cgroup).is_ok());
        }
    }
}

/// The place of one allocation's applications.
#[derive(Debug)]
pub struct App {
    netns: File,
    /// Id of the allocation.
    pub id: String,
    /// Its address on the bridge.
    pub v4: Ipv4Addr,
    /// Its IPv6 address on the bridge.
    pub v6: Ipv6Addr,
    /// Port of its first service's sidecar.
    pub sidecar_port: u16,
}

impl App {
    /// The first allocation of `group` in `job`.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn of(node: &Node, job: &str, group: &str) -> Self {
        Self::from_allocation(&node.allocation(job, group))
    }

    /// The allocation that the status of a job tells so.
    ///
    /// # Panics
    /// When it has no namespace or no addresses.
    #[must_use]
    pub fn from_allocation(allocation: &Value) -> Self {
        let id = allocation["ID"].as_str().expect("an allocation has an ID").to_owned();
        let addresses: Vec<IpAddr> =
            allocation["Addresses"].as_array().into_iter().flatten().filter_map(address).collect();
        let v4 = addresses.iter().find_map(|ip| if let IpAddr::V4(ip) = ip { Some(*ip) } else { None });
        let v6 = addresses.iter().find_map(|ip| if let IpAddr::V6(ip) = ip { Some(*ip) } else { None });
        let port = allocation["Services"][0]["SidecarPort"].as_u64().and_then(|port| u16::try_from(port).ok());
        Self {
            netns: File::open(format!("/run/netns/culvert-{}", &id[..8])).expect("the allocation's namespace"),
            id,
            v4: v4.expect("an IPv4 address"),
            v6: v6.expect("an IPv6 address"),
            sidecar_port: port.unwrap_or_default(),
        }
    }

    /// Does something inside the namespace, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.netns, CloneFlags::CLONE_NEWNET).expect("a network namespace can be entered");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Connects from inside, blocking, with limits.
    ///
    /// # Errors
    /// As `connect` does.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        self.run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.connect_timeout(&to.into(), PATIENCE)?;
            let stream = TcpStream::from(socket);
            limit(&stream)?;
            Ok(stream)
        })
    }

    /// Connects and reads the greeting.
    ///
    /// # Errors
    /// No connection, or none that greets.
    pub fn greeted(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let mut stream = self.connect(to)?;
        greeting(&mut stream)?;
        Ok(stream)
    }

    /// Waits until it is greeted over the path that is expected.
    ///
    /// # Panics
    /// When that takes too long.
    #[must_use]
    pub fn opened(&self, to: SocketAddr, direct: bool) -> TcpStream {
        let mut opened = None;
        eventually(&format!("a connection to {to}, direct: {direct}"), || {
            opened = self.greeted(to).ok().filter(|stream| is_direct(stream) == direct);
            opened.is_some()
        });
        opened.expect("just opened")
    }

    /// Listens inside.
    ///
    /// # Panics
    /// When the port is not free.
    #[must_use]
    pub fn listen(&self, address: impl Into<SocketAddr>) -> TcpListener {
        let address = address.into();
        self.run(|| TcpListener::bind(address).unwrap_or_else(|error| panic!("listen on {address}: {error}")))
    }

    /// An application that greets, then echoes.
    #[must_use]
    pub fn serve(&self, addresses: &[SocketAddr]) -> Server {
        Server::start(addresses.iter().map(|address| self.listen(*address)).collect())
    }
}

fn address(text: &Value) -> Option<IpAddr> {
    text.as_str()?.parse().ok()
}

/// Nothing that a test waits for on a connection may take longer than its patience.
fn limit(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)
}

/// What a [`Server`] says first.
pub const GREETING: &[u8] = b"culvert-greets-you\n";

/// Reads the greeting.
///
/// # Errors
/// When the connection ends before; other words are an error too.
pub fn greeting(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; GREETING.len()];
    stream.read_exact(&mut buffer)?;
    if buffer == GREETING { Ok(()) } else { Err(io::Error::other("greeted by somebody else")) }
}

/// Sends and expects the same back.
///
/// # Errors
/// When the connection ends, or the answer differs.
pub fn echo(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    stream.write_all(message)?;
    let mut back = vec![0; message.len()];
    stream.read_exact(&mut back)?;
    if back == message { Ok(()) } else { Err(io::Error::other("the echo differs")) }
}

/// Did the connection leave the workload, whatever its peer's address is said to be?
#[must_use]
pub fn is_direct(stream: &TcpStream) -> bool {
    stream.local_addr().is_ok_and(|own| !own.ip().to_canonical().is_loopback())
}

/// How a connection that a [`Server`] accepted ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// The caller closed its side.
    Closed,
    /// An error.
    Error(io::ErrorKind),
}

impl End {
    /// Was it broken off, rather than closed?
    #[must_use]
    pub fn is_cut(self) -> bool {
        matches!(self, Self::Error(io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted))
    }
}

/// A connection that a [`Server`] accepted.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// The first bytes that it received, at most 64.
    pub first: Vec<u8>,
    /// How it ended, if it did.
    pub end: Option<End>,
}

/// An application that greets each connection, then echoes.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<TcpListener>,
    accepted: Arc<Mutex<Vec<Accepted>>>,
}

impl Server {
    /// Serves on these listeners.
    ///
    /// # Panics
    /// Without descriptors.
    #[must_use]
    pub fn start(listeners: Vec<TcpListener>) -> Self {
        let accepted = Arc::new(Mutex::new(Vec::new()));
        for listener in &listeners {
            let (listener, accepted) = (listener.try_clone().expect("a descriptor"), Arc::clone(&accepted));
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    let accepted = Arc::clone(&accepted);
                    thread::spawn(move || attend(stream, &accepted));
                }
            });
        }
        Self { listeners, accepted }
    }

    /// All connections so far, in the order in which they were accepted.
    #[must_use]
    pub fn accepted(&self) -> Vec<Accepted> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many were broken off so far.
    #[must_use]
    pub fn cut(&self) -> usize {
        self.accepted().iter().filter(|accepted| accepted.end.is_some_and(End::is_cut)).count()
    }
}

/// Greets, echoes, and notes what came of it.
fn attend(mut stream: TcpStream, accepted: &Mutex<Vec<Accepted>>) {
    let number = {
        let mut all = accepted.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Accepted { first: Vec::new(), end: None });
        all.len() - 1
    };
    let note = |change: &dyn Fn(&mut Accepted)| {
        change(&mut accepted.lock().unwrap_or_else(PoisonError::into_inner)[number]);
    };
    let mut first = true;
    let mut exchange = || -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.write_all(GREETING)?;
        let mut buffer = vec![0; 65536];
        loop {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return stream.shutdown(Shutdown::Write);
            }
            if std::mem::take(&mut first) {
                note(&|accepted| accepted.first = buffer[..length.min(64)].to_vec());
            }
            stream.write_all(&buffer[..length])?;
        }
    };
    let end = exchange().map_or_else(|error| End::Error(error.kind()), |()| End::Closed);
    note(&|accepted| accepted.end = Some(end));
}

impl Drop for Server {
    fn drop(&mut self) {
        for listener in &self.listeners {
            // Wakes the accepting thread, which then closes its copy.
            drop(SockRef::from(listener).shutdown(Shutdown::Both));
        }
    }
}
