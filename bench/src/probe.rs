//! The caller's eyes while an intention turns to deny: one live connection, and new ones without pause.

use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::load::{ECHO, connect};

/// How long the live connection may outlive the order to stop.
const LAST_CHANCE: Duration = Duration::from_secs(2);
/// Pause between two new connections: the prober must not be what keeps the processor busy.
const PAUSE: Duration = Duration::from_millis(2);

/// What was seen. Times are of the monotonic clock, in nanoseconds: the same for every process of the machine.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Seen {
    /// When the live connection ended; `None`: it did not.
    pub(crate) live_ended: Option<u64>,
    /// When the last new connection began that was let through.
    pub(crate) last_allowed: u64,
    /// New connections that were refused.
    pub(crate) refused: u64,
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or_default()
}

/// Prints a line when the live connection stands, then watches until a line comes in; prints [`Seen`].
pub(crate) fn run(target: SocketAddr) -> anyhow::Result<()> {
    let live = live(target);
    writeln!(std::io::stdout(), "ready")?;
    let (stop, ended) = (AtomicBool::new(false), Arc::new(AtomicU64::new(0)));
    let (note, mut end) = (Arc::clone(&ended), live.try_clone()?);
    let watch = std::thread::spawn(move || {
        // Whether it reads an end or an error: it is over.
        drop(end.read(&mut [0]));
        note.store(now(), Ordering::Release);
    });
    let seen = std::thread::scope(|scope| {
        let new = scope.spawn(|| open_new_ones(target, &stop));
        let mut line = String::new();
        let order = std::io::stdin().lock().read_line(&mut line).context("wait for the order to stop");
        stop.store(true, Ordering::Release);
        let seen = new.join().map_err(|_| anyhow::anyhow!("the prober panicked"));
        order.and(seen)
    })?;
    let waited = std::time::Instant::now();
    while ended.load(Ordering::Acquire) == 0 && waited.elapsed() < LAST_CHANCE {
        std::thread::sleep(PAUSE);
    }
    let live_ended = Some(ended.load(Ordering::Acquire)).filter(|ended| *ended > 0);
    live.shutdown(std::net::Shutdown::Both).ok();
    watch.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
    let seen = Seen { live_ended, ..seen };
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&seen)?).context("write to standard output")
}

/// A connection that carried a byte and is idle now; asked for until it is let through.
fn live(target: SocketAddr) -> TcpStream {
    loop {
        if let Ok(stream) = echoed(target)
            && stream.set_read_timeout(None).is_ok()
        {
            return stream;
        }
        std::thread::sleep(PAUSE);
    }
}

fn open_new_ones(target: SocketAddr, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Acquire) {
        let began = now();
        match echoed(target) {
            Ok(_) => seen.last_allowed = began,
            Err(_) => seen.refused += 1,
        }
        std::thread::sleep(PAUSE);
    }
    seen
}

/// A connection through which a byte came back.
fn echoed(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = connect(target, ECHO)?;
    stream.write_all(&[7])?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}
