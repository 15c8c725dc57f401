//! TCP sockets as a proxy needs them: options, and how they end.

use std::io;
use std::ops::Deref;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// A connection without traffic for this long is probed by the kernel. The only thing that ever ends an idle connection is a
/// peer that no longer answers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Probes without an answer before the connection is given up.
const KEEPALIVE_PROBES: u32 = 6;

/// A TCP connection that is reset when it is closed, unless it was [finished](Self::finish). So whatever ends it early, an
/// error, a revocation, a panic or the death of the whole process, passes on as a reset and never looks like an orderly end.
#[derive(Debug)]
pub(crate) struct Connection(TcpStream);

impl Connection {
    /// Takes over a connection that was accepted on a [prepared](prepare) listener.
    pub(crate) fn accepted(stream: TcpStream) -> Self {
        Self(stream)
    }

    /// Takes over a connection that we opened.
    pub(crate) fn opened(stream: TcpStream) -> io::Result<Self> {
        prepare(SockRef::from(&stream))?;
        Ok(Self(stream))
    }

    /// Closes in order: what is queued is still sent.
    pub(crate) fn finish(self) {
        // Fails only on a socket that is already dead, and then nothing is queued.
        let _already_dead = SockRef::from(&self.0).set_linger(None);
    }
}

impl Deref for Connection {
    type Target = TcpStream;
    fn deref(&self) -> &TcpStream {
        &self.0
    }
}

/// Sets what every connection needs. On a listener: accepted connections inherit it, which saves system calls.
pub(crate) fn prepare(socket: SockRef<'_>) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_linger(Some(Duration::ZERO))?; // close(2) resets, see `Connection`
    socket.set_tcp_nodelay(true)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream as StdStream};

    use super::*;

    #[test]
    fn accepted_connections_inherit_the_options_of_their_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        prepare(SockRef::from(&listener)).expect("options");
        let mut client = StdStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (server, _) = listener.accept().expect("accept");
        let socket = SockRef::from(&server);
        assert!(socket.tcp_nodelay().expect("nodelay") && socket.keepalive().expect("keepalive"));
        assert_eq!(socket.tcp_keepalive_time().expect("time"), KEEPALIVE_IDLE);
        assert_eq!(socket.tcp_keepalive_interval().expect("interval"), KEEPALIVE_INTERVAL);
        assert_eq!(socket.tcp_keepalive_retries().expect("retries"), KEEPALIVE_PROBES);
        assert_eq!(socket.linger().expect("linger"), Some(Duration::ZERO));
        drop(server);
        assert_eq!(client.read(&mut [0]).expect_err("reset").kind(), ErrorKind::ConnectionReset);
    }
}
