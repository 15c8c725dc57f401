//! TCP sockets as a proxy needs them: options, and how they end.

use std::io;
use std::ops::Deref;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// A connection without traffic for this long is probed by the kernel. The only thing that ever ends an idle connection is a
/// peer that no longer answers.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
/// Time between probes.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Probes without an answer before the connection is given up.
pub const KEEPALIVE_PROBES: u32 = 6;

/// Sets what every connection needs. On a listener: accepted connections inherit it, which saves system calls.
pub(crate) fn prepare(socket: SockRef<'_>) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_nodelay(true)
}

/// A TCP connection that is reset when dropped, unless it was [finished](Self::finish). So whatever ends a task early, an
/// error, a revocation or a panic, passes on as a reset and never looks like an orderly end.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    reset: bool,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, reset: true }
    }

    /// Closes in order: what is queued is still sent.
    pub(crate) fn finish(mut self) {
        self.reset = false;
    }
}

impl Deref for Connection {
    type Target = TcpStream;
    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.reset {
            // Fails only on a socket that is already dead, and then there is nothing to reset.
            let _already_dead = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}
