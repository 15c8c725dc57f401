//! The load generator and the echo server: blocking sockets on plain threads, so that what is measured is the path and not a
//! runtime. Both run as tasks inside the workloads' network namespaces.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;

/// Largest message of the echo test, and size of the echo server's buffer.
const MAX_MESSAGE: usize = 64 * 1024;
/// Chunk of the throughput test.
const CHUNK: usize = 64 * 1024;
/// First byte of a connection: what the server shall do with it.
pub(crate) const ECHO: u8 = b'e';
const SINK: u8 = b's';
const HOLD: u8 = b'h';

/// What the client shall do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// One message out, the same back, on one connection.
    Echo { size: usize, millis: u64 },
    /// Bytes one way, on so many connections.
    Throughput { connections: usize, millis: u64 },
    /// Connect, one byte out and back, close.
    Connect { millis: u64 },
    /// Open connections, keep them idle until told otherwise, and say so.
    Hold { connections: usize },
}

/// What the client measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    /// Round trips, connections or bytes.
    pub(crate) count: u64,
    /// How long it took.
    pub(crate) nanos: u64,
    /// Every single duration in nanoseconds: (value, how often).
    pub(crate) durations: Vec<(u64, u64)>,
}

impl Measured {
    /// The duration that a share `q` of all does not exceed, in nanoseconds.
    pub(crate) fn quantile(&self, q: f64) -> Option<u64> {
        let total: u64 = self.durations.iter().map(|(_, times)| times).sum();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank among counts"
        )]
        let rank = (total as f64 * q).ceil() as u64;
        let mut seen = 0;
        self.durations.iter().find_map(|(value, times)| {
            seen += times;
            (seen >= rank).then_some(*value)
        })
    }

    fn of(histogram: &Histogram<u64>, count: u64, elapsed: Duration) -> Self {
        let durations =
            histogram.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect();
        Self { count, nanos: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), durations }
    }
}

/// Serves echo, sink and hold connections for ever.
pub(crate) fn serve(addresses: &[SocketAddr]) -> anyhow::Result<()> {
    let listeners =
        addresses.iter().map(|address| TcpListener::bind(address).with_context(|| format!("bind {address}")));
    let threads: Vec<_> = listeners
        .collect::<anyhow::Result<Vec<_>>>()?
        .into_iter()
        .map(|listener| std::thread::spawn(move || accept(&listener)))
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("an accepting thread panicked"))?;
    }
    Ok(())
}

fn accept(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            std::thread::sleep(Duration::from_millis(10)); // out of descriptors must not spin
            continue;
        };
        let builder = std::thread::Builder::new().stack_size(128 * 1024);
        // A connection that ends in an error is the client's to report.
        drop(builder.spawn(move || answer(stream)));
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        if kind[0] == ECHO {
            stream.write_all(&buffer[..count])?;
        }
    }
}

/// A connection whose server knows what to do with it.
pub(crate) fn connect(target: SocketAddr, kind: u8) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(target).with_context(|| format!("connect to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

/// Does `work` against `target`. `held` keeps the connections of [`Work::Hold`] open.
pub(crate) fn work(target: SocketAddr, work: Work, held: &mut Vec<TcpStream>) -> anyhow::Result<Measured> {
    held.clear();
    match work {
        Work::Echo { size, millis } => echo(target, size, Duration::from_millis(millis)),
        Work::Throughput { connections, millis } => throughput(target, connections, Duration::from_millis(millis)),
        Work::Connect { millis } => connects(target, Duration::from_millis(millis)),
        Work::Hold { connections } => hold(target, connections, held),
    }
}

fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(100, 60_000_000_000, 3)?)
}

fn echo(target: SocketAddr, size: usize, time: Duration) -> anyhow::Result<Measured> {
    let mut stream = connect(target, ECHO)?;
    let (message, mut answer) = (vec![7; size], vec![0; size]);
    let mut durations = histogram()?;
    let started = Instant::now();
    let mut now = started;
    while now.duration_since(started) < time {
        stream.write_all(&message)?;
        stream.read_exact(&mut answer)?;
        let after = Instant::now();
        durations.saturating_record(u64::try_from(after.duration_since(now).as_nanos())?);
        now = after;
    }
    Ok(Measured::of(&durations, durations.len(), started.elapsed()))
}

fn throughput(target: SocketAddr, connections: usize, time: Duration) -> anyhow::Result<Measured> {
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let start = Arc::new(Barrier::new(connections + 1));
    let streams = (0..connections).map(|_| connect(target, SINK)).collect::<anyhow::Result<Vec<_>>>()?;
    let threads: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            let (stop, sent, start) = (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&start));
            std::thread::spawn(move || -> std::io::Result<()> {
                let chunk = vec![7; CHUNK];
                start.wait();
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(&chunk)?;
                    sent.fetch_add(CHUNK as u64, Ordering::Relaxed);
                }
                Ok(())
            })
        })
        .collect();
    start.wait();
    let started = Instant::now();
    std::thread::sleep(time);
    let (count, elapsed) = (sent.load(Ordering::Relaxed), started.elapsed());
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a sending thread panicked"))??;
    }
    Ok(Measured::of(&histogram()?, count, elapsed))
}

fn connects(target: SocketAddr, time: Duration) -> anyhow::Result<Measured> {
    let mut durations = histogram()?;
    let started = Instant::now();
    while started.elapsed() < time {
        let before = Instant::now();
        let mut stream = connect(target, ECHO)?;
        stream.write_all(&[7])?;
        stream.read_exact(&mut [0])?;
        // Closed by reset: a bench of new connections must not run out of ports in TIME_WAIT.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        drop(stream);
        durations.saturating_record(u64::try_from(before.elapsed().as_nanos())?);
    }
    Ok(Measured::of(&durations, durations.len(), started.elapsed()))
}

fn hold(target: SocketAddr, connections: usize, held: &mut Vec<TcpStream>) -> anyhow::Result<Measured> {
    let started = Instant::now();
    for _ in 0..connections {
        held.push(connect(target, HOLD)?);
    }
    Ok(Measured::of(&histogram()?, held.len() as u64, started.elapsed()))
}
