//! The log of every role: lines on standard error, which never stop or end who writes them.
//!
//! Whoever reads it may be slow, hang, or be gone. What there is no room for is left out and counted.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};
use rustix::net::SendFlags;
use tracing::{Level, error};
use tracing_subscriber::EnvFilter;

/// How long a line waits for a reader that is slow. What it delays may be the data path.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// What goes into a pipe as a whole or not at all (pipe(7)); longer lines are cut.
const AT_ONCE: usize = 4096;

static STDERR: OnceLock<Stderr> = OnceLock::new();
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Logs from now on, panics too; `filter` is in the form of `RUST_LOG`, and `info` if it is none.
pub fn to_stderr(filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    STDERR.get_or_init(Stderr::find);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Line)
        .with_ansi(io::stderr().is_terminal())
        // To say on standard error that standard error fails would end the thread that had something to say.
        .log_internal_errors(false)
        .init();
    let otherwise = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !tracing::enabled!(Level::ERROR) {
            return otherwise(panic);
        }
        let trace = Backtrace::capture();
        match trace.status() {
            BacktraceStatus::Captured => error!("{panic}\n{trace}"),
            _ => error!("{panic}"),
        }
    }));
}

/// Standard error, by how it can be written to without waiting.
enum Stderr {
    /// A pipe or a terminal, opened anew: `O_NONBLOCK` on the descriptor itself would be others' as well.
    Own(File),
    Socket,
    /// One of those that may not be opened anew, as after a change of user. Two writers at once may have to wait for each other.
    Polled,
    /// A file never waits.
    File,
}

impl Stderr {
    fn find() -> Self {
        let kind = rustix::fs::fstat(io::stderr()).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind {
            Ok(FileType::Fifo | FileType::CharacterDevice) => {
                let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
                let own = OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/2");
                own.map_or(Self::Polled, Self::Own)
            }
            Ok(FileType::Socket) => Self::Socket,
            _ => Self::File,
        }
    }

    fn write(&self, text: &[u8]) -> io::Result<usize> {
        // A terminal that two write to at once refuses one of them.
        let mut stderr = io::stderr().lock();
        match self {
            Self::Own(file) => (&*file).write(text),
            Self::Socket => Ok(rustix::net::send(io::stderr(), text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?),
            Self::Polled if !is_writable(Timespec::default()) => Err(ErrorKind::WouldBlock.into()),
            Self::Polled => stderr.write(text),
            Self::File => stderr.write_all(text).map(|()| text.len()),
        }
    }
}

/// Takes a line at a time.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = STDERR.get_or_init(Stderr::find);
        let left_out = LEFT_OUT.swap(0, Ordering::Relaxed);
        let text = if matches!(stderr, Stderr::File) { line.into() } else { text(line, left_out) };
        let mut written = stderr.write(&text);
        // Once a line was left out, the next ones do not wait.
        if left_out == 0 && is_full(&written) && is_writable(PATIENCE) {
            written = stderr.write(&text);
        }
        if is_full(&written) {
            LEFT_OUT.fetch_add(left_out + 1, Ordering::Relaxed);
            return Ok(line.len());
        }
        written.map(|_| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `line`, after how many were left out, cut to what can be written at once.
fn text(line: &[u8], left_out: u64) -> Cow<'_, [u8]> {
    if left_out == 0 && line.len() <= AT_ONCE {
        return line.into();
    }
    let mut text = Vec::with_capacity(AT_ONCE);
    if left_out > 0 {
        text.extend(format!("({left_out} lines of the log were left out: nobody read it)\n").bytes());
    }
    text.extend(line);
    if text.len() > AT_ONCE {
        let end = "…\n".as_bytes();
        text.truncate(AT_ONCE - end.len());
        text.extend(end);
    }
    text.into()
}

fn is_full(written: &io::Result<usize>) -> bool {
    written.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

fn is_writable(patience: Timespec) -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    poll(&mut fds, Some(&patience)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_into_a_pipe_and_says_what_is_missing_before_it() {
        assert_eq!(*text(b"all is well\n", 0), *b"all is well\n");
        let after = text(b"back\n", 7);
        assert_eq!(*after, *b"(7 lines of the log were left out: nobody read it)\nback\n");
        for left_out in [0, 1] {
            let long = text(&[b'x'; 10_000], left_out).into_owned();
            assert!(long.len() == AT_ONCE && long.ends_with("x…\n".as_bytes()));
        }
    }
}
