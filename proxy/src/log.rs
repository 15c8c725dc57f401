//! The log of every role: lines on standard error, which never stop or end who writes them.

use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::EnvFilter;

/// How long a line waits for a reader that is slow. What it delays may be the data path.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// A pipe that can be written to has room for 4096 bytes (pipe(7)), the note of lines left out among them: more might wait.
const AT_ONCE: usize = 4096 - 128;

static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Logs from now on; `filter` is in the form of `RUST_LOG`, and `info` if it is none.
pub fn to_stderr(filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Line)
        .with_ansi(io::stderr().is_terminal())
        // Whoever read it may be gone. To say so on the same standard error would end the thread that had something to say.
        .log_internal_errors(false)
        .init();
}

/// Writes a line if it need not wait for a reader; else it is left out, and counted.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if !is_writable(&stderr) {
            LEFT_OUT.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        let left_out = LEFT_OUT.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            writeln!(stderr, "({left_out} lines of the log were left out: nobody read it)")?;
        }
        stderr.write(&line[..line.len().min(AT_ONCE)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is_writable(stderr: &io::StderrLock<'_>) -> bool {
    let mut fds = [PollFd::new(stderr, PollFlags::OUT)];
    // An error of the other end shows as writable; the write tells it.
    poll(&mut fds, Some(&PATIENCE)).is_ok_and(|ready| ready > 0)
}
