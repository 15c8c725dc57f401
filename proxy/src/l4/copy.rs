//! Carries bytes between an application's TCP connection and a TLS connection, as if nothing stood between.
//!
//! One future per connection drives both directions. Half-close passes each way (FIN ↔ close_notify and FIN), a reset on one
//! side is an error here and its caller resets the other, a TLS stream that ends without close_notify counts as a reset
//! (RFC 8446 §6.1: it may have been cut). There is no time limit of any kind.
//!
//! Buffers: what is read, decrypted or encrypted stands in a scratch of the thread and is written before the future yields.
//! Only what the receiver does not take stays with the connection, at most [`MAX_KEPT`] bytes each way, and nothing more
//! is read from the sender until it is gone. An idle connection therefore owns no buffer at all.
//!
//! A chunk costs one `recv` and one `send`: a short read tells that the socket is empty (see [`poll_read`]), so nothing is
//! asked twice.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use super::live::Live;
use crate::tls::{MAX_PLAINTEXT, MAX_RECORD, RecordError, Session};

/// Most bytes taken from a socket at once.
const CHUNK: usize = 4 * MAX_PLAINTEXT;
/// Most bytes that stay with a connection in one direction: one chunk with the overhead of its records, and part of one more.
const MAX_KEPT: usize = CHUNK + 2 * MAX_RECORD;
/// Up to this many pieces are written as they lie; more are moved together first, which is cheaper when they are small.
const MAX_PIECES: usize = 8;

/// Why a connection ended before both sides had closed it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// The application's side failed or was reset.
    #[error("application: {0}")]
    App(io::Error),
    /// The mesh side failed or was reset.
    #[error("peer: {0}")]
    Tunnel(io::Error),
    /// The mesh side ended without close_notify.
    #[error("peer: TLS stream was cut off")]
    Truncated,
    /// The mesh side broke the rules of TLS.
    #[error("peer: {0}")]
    Record(#[from] RecordError),
}

impl CopyError {
    /// The peer said that its policy denies us.
    pub(crate) fn is_denial(&self) -> bool {
        matches!(self, Self::Record(error) if error.is_denial())
    }
}

/// Payload that passed, readable at any time.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// Bytes from the application to the peer.
    pub(crate) to_tunnel: AtomicU64,
    /// Bytes from the peer to the application.
    pub(crate) to_app: AtomicU64,
}

/// Copies until both sides have closed. `early` is what was read behind the handshake. If this future is dropped while `live`
/// is revoked, the peer is told that it was denied.
///
/// Not an `async fn`: that would keep room for its arguments beside the pump that they are part of, for each connection.
pub(crate) fn copy<'a>(
    app: &'a TcpStream,
    tunnel: &'a TcpStream,
    session: Session,
    early: Vec<u8>,
    live: &'a Live,
) -> impl Future<Output = Result<(), CopyError>> {
    let mut pump = Pump::new(app, tunnel, session, early, live);
    let (mut app_broke, mut tunnel_broke) = (None, None);
    poll_fn(move |cx| {
        if let Poll::Ready(end) = pump.poll(cx) {
            return Poll::Ready(end);
        }
        // A side that nothing is read from at the moment could be reset unnoticed.
        if !pump.reads_app() && poll_broken(&mut app_broke, app, cx).is_ready() {
            return Poll::Ready(Err(CopyError::App(broken(app))));
        }
        if !pump.reads_tunnel() && poll_broken(&mut tunnel_broke, tunnel, cx).is_ready() {
            return Poll::Ready(Err(CopyError::Tunnel(broken(tunnel))));
        }
        Poll::Pending
    })
}

/// Waits for `stream` to break. Boxed, and made only for a side that holds up or has ended: most never do while they are idle.
fn poll_broken<'a>(
    waits: &mut Option<Pin<Box<dyn Future<Output = io::Result<Ready>> + Send + 'a>>>,
    stream: &'a TcpStream,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Ready>> {
    waits.get_or_insert_with(|| Box::pin(stream.ready(Interest::ERROR))).as_mut().poll(cx)
}

fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn broken(stream: &TcpStream) -> io::Error {
    stream.take_error().ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
}

/// What a thread's connections share: filled and emptied within one poll.
struct Scratch {
    plain: Box<[u8]>,
    cipher: Box<[u8]>,
    payload: Vec<Range<usize>>,
    records: Vec<Vec<u8>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        plain: vec![0; CHUNK].into(),
        cipher: vec![0; CHUNK + MAX_RECORD].into(),
        payload: Vec::new(),
        records: Vec::new(),
    });
}

/// How far one direction is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flow {
    /// More may come.
    Open,
    /// The sender closed; what is kept has to go out yet.
    Ending,
    /// Everything went out, and so did the end.
    Ended,
}

struct Pump<'a> {
    app: &'a TcpStream,
    tunnel: &'a TcpStream,
    session: Session,
    live: &'a Live,
    traffic: &'a Traffic,
    up: Flow,
    down: Flow,
    /// Records that the tunnel did not take yet.
    to_tunnel: Kept,
    /// Payload that the application did not take yet.
    to_app: Kept,
    /// Start of a record whose rest has not come yet.
    partial: Vec<u8>,
    /// `partial` has not been looked at yet.
    fresh: bool,
    /// The tunnel was reset when it was written to; what it said before may tell why.
    reset: Option<io::Error>,
}

impl<'a> Pump<'a> {
    fn new(app: &'a TcpStream, tunnel: &'a TcpStream, session: Session, early: Vec<u8>, live: &'a Live) -> Self {
        Self {
            app,
            tunnel,
            session,
            live,
            traffic: &live.traffic,
            up: Flow::Open,
            down: Flow::Open,
            to_tunnel: Kept::default(),
            to_app: Kept::default(),
            fresh: !early.is_empty(),
            partial: early,
            reset: None,
        }
    }

    /// After a poll that returned `Pending`: is the application's side being read?
    fn reads_app(&self) -> bool {
        self.up == Flow::Open && self.to_tunnel.is_empty()
    }

    /// After a poll that returned `Pending`: is the tunnel being read?
    fn reads_tunnel(&self) -> bool {
        self.down == Flow::Open && self.to_app.is_empty()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CopyError>> {
        SCRATCH.with_borrow_mut(|scratch| {
            if self.up != Flow::Ended
                && let Poll::Ready(Err(error)) = self.poll_up(cx, scratch)
            {
                match error {
                    CopyError::Tunnel(error) if is_reset(&error) && self.reads_tunnel() => {
                        (self.up, self.reset) = (Flow::Ended, Some(error));
                    }
                    error => return Poll::Ready(Err(error)),
                }
            }
            if self.down != Flow::Ended {
                let down = self.poll_down(cx, scratch);
                if self.reset.is_some() {
                    return self.why_reset(down);
                }
                if let Poll::Ready(result) = down {
                    result?;
                }
            }
            if self.up == Flow::Ended && self.down == Flow::Ended { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
    }

    /// A reset fails the next write before the alert in front of it is read. What was received can be read yet, and an end or an
    /// error follows it.
    fn why_reset(&mut self, down: Poll<Result<(), CopyError>>) -> Poll<Result<(), CopyError>> {
        match down {
            Poll::Ready(Err(why)) if why.is_denial() => Poll::Ready(Err(why)),
            Poll::Pending if self.reads_tunnel() => Poll::Pending,
            _ => Poll::Ready(self.reset.take().map_or(Ok(()), |error| Err(CopyError::Tunnel(error)))),
        }
    }

    /// From the application to the tunnel, until one of them makes us wait or the direction has ended.
    fn poll_up(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Result<(), CopyError>> {
        loop {
            ready!(self.to_tunnel.poll_send(self.tunnel, cx)).map_err(CopyError::Tunnel)?;
            if self.up == Flow::Ending {
                SockRef::from(self.tunnel).shutdown(Shutdown::Write).map_err(CopyError::Tunnel)?;
                self.up = Flow::Ended;
                return Poll::Ready(Ok(()));
            }
            let read = ready!(poll_read(self.app, cx, &mut scratch.plain)).map_err(CopyError::App)?;
            scratch.records.clear();
            if read == 0 {
                self.up = Flow::Ending;
                scratch.records.push(self.session.seal_close()?);
            } else {
                add(&self.traffic.to_tunnel, read);
                self.session.seal(&scratch.plain[..read], &mut scratch.records)?;
            }
            let kept = &mut self.to_tunnel;
            send(self.tunnel, scratch.records.iter().map(Vec::as_slice), kept).map_err(CopyError::Tunnel)?;
        }
    }

    /// From the tunnel to the application, until one of them makes us wait or the direction has ended.
    fn poll_down(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Poll<Result<(), CopyError>> {
        let Scratch { cipher, payload, .. } = scratch;
        loop {
            ready!(self.to_app.poll_send(self.app, cx)).map_err(CopyError::App)?;
            if self.down == Flow::Ending {
                SockRef::from(self.app).shutdown(Shutdown::Write).map_err(CopyError::App)?;
                self.down = Flow::Ended;
                return Poll::Ready(Ok(()));
            }
            let kept = self.partial.len();
            let mut end = kept;
            if !std::mem::take(&mut self.fresh) {
                let read = ready!(poll_read(self.tunnel, cx, &mut cipher[kept..])).map_err(CopyError::Tunnel)?;
                if read == 0 {
                    return Poll::Ready(Err(CopyError::Truncated));
                }
                end += read;
            }
            cipher[..kept].copy_from_slice(&self.partial);
            payload.clear();
            let opened = self.session.open(&mut cipher[..end], payload)?;
            if opened.closed {
                self.down = Flow::Ending;
            }
            self.keep_partial(&cipher[opened.consumed..end]);
            add(&self.traffic.to_app, payload.iter().map(Range::len).sum());
            if payload.len() > MAX_PIECES {
                let end = move_together(cipher, payload);
                payload.clear();
                payload.push(0..end);
            }
            let pieces = payload.iter().map(|range| &cipher[range.clone()]);
            send(self.app, pieces, &mut self.to_app).map_err(CopyError::App)?;
        }
    }

    fn keep_partial(&mut self, rest: &[u8]) {
        if rest.is_empty() || self.down != Flow::Open {
            self.partial = Vec::new(); // bytes behind close_notify are ignored (RFC 8446 §6.1)
        } else {
            self.partial.clear();
            self.partial.extend_from_slice(rest);
        }
    }
}

impl Drop for Pump<'_> {
    fn drop(&mut self) {
        // Behind part of a record an alert would make no sense.
        if self.live.is_revoked() && self.up == Flow::Open && self.to_tunnel.is_empty() {
            deny(self.tunnel, &mut self.session);
        }
    }
}

/// Tells the peer that policy denies it, if that can be said at once. Without it the reset that follows says nothing of why.
pub(super) fn deny(tunnel: &TcpStream, session: &mut Session) {
    if let Ok(record) = session.seal_denial() {
        let _peer_may_be_gone = tunnel.try_write(&record);
    }
}

fn add(counter: &AtomicU64, bytes: usize) {
    // Only this connection's task writes, so no read-modify-write is needed.
    counter.store(counter.load(Relaxed) + bytes as u64, Relaxed);
}

/// Moves ranges of `buffer`, which ascend, to its start; returns where they end.
fn move_together(buffer: &mut [u8], ranges: &[Range<usize>]) -> usize {
    let mut end = 0;
    for range in ranges {
        buffer.copy_within(range.clone(), end);
        end += range.len();
    }
    end
}

/// Reads what is there. A read that does not fill the buffer has emptied the socket; tokio is told so, and the next call waits
/// without asking the kernel. (An end or an error that follows comes with an event of its own.)
fn poll_read(stream: &TcpStream, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_read_ready(cx))?;
        let mut short = None;
        let full = stream.try_io(Interest::READABLE, || {
            let (read, _) = rustix::net::recv(stream, &mut *buffer, rustix::net::RecvFlags::empty())?;
            if read == 0 || read == buffer.len() {
                return Ok(read);
            }
            short = Some(read);
            Err(io::ErrorKind::WouldBlock.into())
        });
        match (full, short) {
            (Ok(read), _) | (_, Some(read)) => return Poll::Ready(Ok(read)),
            (Err(error), None) if error.kind() == io::ErrorKind::WouldBlock => {}
            (Err(error), None) if error.kind() == io::ErrorKind::Interrupted => {}
            (Err(error), None) => return Poll::Ready(Err(error)),
        }
    }
}

/// Writes `pieces` in order, as far as the socket takes them; the rest is kept.
fn send<'p>(stream: &TcpStream, pieces: impl Iterator<Item = &'p [u8]>, kept: &mut Kept) -> io::Result<()> {
    let mut slices = [IoSlice::new(&[]); MAX_PIECES + 1];
    let mut count = 0;
    for piece in pieces {
        slices[count] = IoSlice::new(piece);
        count += 1;
    }
    let mut slices = &mut slices[..count];
    while !slices.is_empty() {
        let written = match &*slices {
            [one] => stream.try_write(one),
            many => stream.try_write_vectored(many),
        };
        match written {
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                for slice in &*slices {
                    kept.bytes.extend_from_slice(slice);
                }
                debug_assert!(kept.bytes.len() <= MAX_KEPT, "{} bytes kept", kept.bytes.len());
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Bytes that a socket did not take yet.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    sent: usize,
}

impl Kept {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn poll_send(&mut self, stream: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            ready!(stream.poll_write_ready(cx))?;
            match stream.try_write(&self.bytes[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        if !self.bytes.is_empty() {
            *self = Self::default();
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
