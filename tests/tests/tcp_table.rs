//! TCP as applications see it, through the mesh and without it: who closes how, after how many bytes, on which path. The
//! oracle is the same step between the same namespaces over a port that the mesh knows nothing of.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use culvert_tests::{App, Apps, Node, NodeOptions, Pair, World, eventually, is_direct, service, upstream, upstream6};
use socket2::SockRef;

/// A port of `called` that no service has.
const PLAIN: u16 = 9099;
const LARGE: usize = 16 << 20;
/// How long an end waits for what must come.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum How {
    /// The closer sends, closes its sending half, and is answered.
    HalfCloseThenAnswer,
    /// The closer reads all that is sent, then closes.
    CloseAfterReading,
    /// The closer sends, then resets.
    Reset,
    /// The closer reads nothing of what is sent, then closes.
    CloseUnread,
    /// The closer sends, then shuts both halves.
    ShutdownBoth,
}

const HOWS: [How; 5] =
    [How::HalfCloseThenAnswer, How::CloseAfterReading, How::Reset, How::CloseUnread, How::ShutdownBoth];

/// How an end's reading ended: at the end of the stream, or with an error.
type End = Result<(), ErrorKind>;

/// What the two ends saw.
#[derive(Debug, Eq, PartialEq)]
struct Outcome {
    /// Bytes received by the one who closes; none where it does not read.
    closer_received: usize,
    closer_end: Option<End>,
    /// Bytes received by the other; `None` where a reset may overtake them: then they are a prefix, which is checked.
    other_received: Option<usize>,
    other_end: End,
    /// What the other's writing fails with afterwards.
    later_write: Option<ErrorKind>,
}

/// Bytes that tell their position.
fn pattern(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// Reads until the end; what was received must be a prefix of `expected`.
fn read_all(stream: &mut TcpStream, expected: &[u8]) -> (usize, End) {
    let (mut received, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (received, Ok(())),
            Ok(length) => {
                assert!(expected[received..].starts_with(&buffer[..length]), "other bytes after {received}");
                received += length;
            }
            Err(error) => return (received, Err(error.kind())),
        }
    }
}

/// Writes until it fails.
fn write_until_failure(stream: &mut TcpStream) -> Option<ErrorKind> {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Err(error) = stream.write_all(b"?") {
            return Some(error.kind());
        }
        thread::sleep(Duration::from_millis(2));
    }
    None
}

/// The one who closes. Returns what it received and how that ended, where it reads.
fn close(how: How, mut stream: TcpStream, bytes: &[u8]) -> (usize, Option<End>) {
    match how {
        How::HalfCloseThenAnswer => {
            stream.write_all(bytes).expect("sent");
            stream.shutdown(Shutdown::Write).expect("half closed");
            let (received, end) = read_all(&mut stream, bytes);
            (received, Some(end))
        }
        How::CloseAfterReading => {
            let mut received = vec![0; bytes.len()];
            stream.read_exact(&mut received).expect("all that was sent");
            assert!(received == bytes, "other bytes");
            (received.len(), None)
        }
        How::Reset => {
            stream.write_all(bytes).expect("sent");
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
            (0, None)
        }
        How::CloseUnread => {
            if !bytes.is_empty() {
                assert_eq!(stream.peek(&mut [0; 1]).expect("something is there to be read"), 1);
            }
            (0, None)
        }
        How::ShutdownBoth => {
            stream.write_all(bytes).expect("sent");
            stream.shutdown(Shutdown::Both).expect("shut down");
            // It stays open: that the other's bytes are not welcome is told by the shutdown, not by a close.
            eventually("the connection is gone", || gone(&stream));
            (0, None)
        }
    }
}

/// Has the kernel forgotten the peer?
fn gone(stream: &TcpStream) -> bool {
    stream.peer_addr().is_err_and(|error| error.kind() == ErrorKind::NotConnected)
}

/// The other end.
fn follow(how: How, mut stream: TcpStream, bytes: &[u8]) -> (Option<usize>, End, Option<ErrorKind>) {
    let (received, end) = match how {
        How::HalfCloseThenAnswer => {
            let (received, end) = read_all(&mut stream, bytes);
            stream.write_all(bytes).expect("answered");
            return (Some(received), end, None);
        }
        How::CloseAfterReading => {
            stream.write_all(bytes).expect("sent");
            read_all(&mut stream, &[])
        }
        How::Reset | How::ShutdownBoth => read_all(&mut stream, bytes),
        How::CloseUnread => match stream.write_all(bytes) {
            Ok(()) => read_all(&mut stream, &[]),
            Err(error) => (0, Err(error.kind())),
        },
    };
    let later = write_until_failure(&mut stream);
    ((how != How::Reset).then_some(received), end, later)
}

/// A way from the caller to the called application.
struct Way<'a> {
    caller: &'a App,
    to: SocketAddr,
    listener: &'a TcpListener,
    direct: bool,
}

impl Way<'_> {
    /// A connection that both ends have used.
    fn open(&self) -> io::Result<(TcpStream, TcpStream)> {
        let mut caller = self.caller.connect(self.to)?;
        assert_eq!(is_direct(&caller), self.direct, "another path to {}", self.to);
        caller.write_all(b"c")?;
        let (mut called, _) = self.listener.accept()?;
        called.set_nodelay(true)?;
        for stream in [&caller, &called] {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
        }
        let mut byte = [0; 1];
        called.read_exact(&mut byte)?;
        called.write_all(b"s")?;
        caller.read_exact(&mut byte)?;
        Ok((caller, called))
    }

    fn step(&self, how: How, caller_closes: bool, bytes: &[u8]) -> Outcome {
        let (caller, called) = self.open().expect("a connection");
        let (closer, other) = if caller_closes { (caller, called) } else { (called, caller) };
        thread::scope(|scope| {
            let other = scope.spawn(|| follow(how, other, bytes));
            let (closer_received, closer_end) = close(how, closer, bytes);
            let (other_received, other_end, later_write) = other.join().expect("no panic");
            Outcome { closer_received, closer_end, other_received, other_end, later_write }
        })
    }

    /// Bytes written one by one arrive in order, whoever speaks first.
    fn small_writes(&self) {
        let bytes = pattern(3000);
        for caller_writes in [true, false] {
            let mut caller = self.caller.connect(self.to).expect("a connection");
            let (mut called, _) = self.listener.accept().expect("accepted before anybody spoke");
            called.set_nodelay(true).expect("an option");
            called.set_read_timeout(Some(PATIENCE)).expect("an option");
            let (writer, reader) = if caller_writes { (&mut caller, &mut called) } else { (&mut called, &mut caller) };
            thread::scope(|scope| {
                scope.spawn(|| {
                    bytes.chunks(3).for_each(|chunk| writer.write_all(chunk).expect("sent"));
                    writer.shutdown(Shutdown::Write).expect("half closed");
                });
                assert_eq!(read_all(reader, &bytes), (bytes.len(), Ok(())), "caller writes: {caller_writes}");
            });
        }
    }

    /// Who writes and closes at once loses nothing.
    fn write_and_close(&self, times: usize) {
        let bytes = pattern(100);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for time in 0..times {
                    let (mut called, _) = self.listener.accept().expect("accepted");
                    called.set_read_timeout(Some(PATIENCE)).expect("an option");
                    assert_eq!(read_all(&mut called, &bytes), (bytes.len(), Ok(())), "connection {time}");
                }
            });
            for _ in 0..times {
                self.caller.connect(self.to).and_then(|mut stream| stream.write_all(&bytes)).expect("sent");
            }
            reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    }
}

/// The table for one family.
fn table(pair: &Pair, v6: bool, direct: bool) {
    let (any, own, up): (SocketAddr, SocketAddr, _) = if v6 {
        ((Ipv6Addr::UNSPECIFIED, PLAIN).into(), (pair.called.v6, PLAIN).into(), upstream6())
    } else {
        ((Ipv4Addr::UNSPECIFIED, PLAIN).into(), (pair.called.v4, PLAIN).into(), upstream())
    };
    let (plain, meshed) = (pair.called.listen(any), pair.called.listen(service()[usize::from(v6 && direct)]));
    for listener in [&plain, &meshed] {
        SockRef::from(listener).set_read_timeout(Some(PATIENCE)).expect("an option");
    }
    let oracle = Way { caller: &pair.caller, to: own, listener: &plain, direct: true };
    let way = Way { caller: &pair.caller, to: up, listener: &meshed, direct };
    eventually("the path is there", || {
        let path = pair.caller.connect(up).map(|stream| is_direct(&stream));
        let accepted = path.is_ok().then(|| meshed.accept().expect("accepted"));
        path.is_ok_and(|path| path == direct) && accepted.is_some()
    });
    let sizes: &[usize] = if v6 { &[1, 1 << 16] } else { &[0, 1, 1 << 16, LARGE] };
    for (size, how, caller_closes) in
        sizes.iter().flat_map(|size| HOWS.iter().flat_map(move |how| [(*size, *how, true), (*size, *how, false)]))
    {
        let bytes = pattern(size);
        let expected = oracle.step(how, caller_closes, &bytes);
        let outcome = way.step(how, caller_closes, &bytes);
        assert_eq!(outcome, expected, "{how:?}, {size} bytes, caller closes: {caller_closes}, to {up}");
    }
    way.small_writes();
    way.write_and_close(if v6 { 100 } else { 1000 });
}

fn as_plain_tcp(name: &str, options: NodeOptions, direct: bool) {
    let world = World::new(name);
    let mut node = Node::start(&world, options);
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    for v6 in [false, true] {
        table(&pair, v6, direct);
    }
    drop(apps);
    node.leave();
}

#[test]
fn the_direct_path_is_plain_tcp() {
    as_plain_tcp("tcp-direct", NodeOptions { encryption: "between-nodes", ..NodeOptions::default() }, true);
}

#[test]
fn the_proxied_path_looks_like_plain_tcp() {
    as_plain_tcp("tcp-proxied", NodeOptions::default(), false);
}

#[test]
fn the_proxied_path_without_ebpf_looks_like_plain_tcp() {
    as_plain_tcp("tcp-no-ebpf", NodeOptions { ebpf: false, ..NodeOptions::default() }, false);
}
