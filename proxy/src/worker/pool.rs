//! Sockets of a workload's network namespace: listeners as the agent hands them over, and a stock of unconnected ones.
//!
//! The stock is filled up in batches before it is empty, so that a connection seldom waits for the agent; when it does, the
//! wait is bounded. Without an agent a connection waits for the next one, which is asked once it has named the proxy; when none
//! has come for [`ORPHAN_LIFE`], what the stock does not serve is refused at once.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::net::TcpSocket;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::ORPHAN_LIFE;
use super::link::Link;
use crate::handoff::{Family, MAX_APP_SOCKETS, ToAgent};
use crate::sockets::Sockets;

/// When fewer are left, more are asked for.
pub const LOW_WATER: usize = 16;
/// How many are asked for at once; all that a message carries if none is left.
pub const BATCH: u16 = 32;
/// Longest wait of a connection for a socket: time for an agent to be replaced.
pub const APP_SOCKET_WAIT: Duration = Duration::from_secs(10);

/// One proxy's stock.
#[derive(Debug, Default)]
pub(super) struct Pool {
    v4: Mutex<Stock>,
    v6: Mutex<Stock>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Stock {
    sockets: Vec<OwnedFd>,
    /// Asked for, not come yet.
    asked: bool,
    /// Nobody can be asked.
    away: bool,
    /// Counts refusals, so that who waits learns of one that came after it asked.
    refusals: u64,
    refusal: String,
}

impl Pool {
    fn stock(&self, family: Family) -> &Mutex<Stock> {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// What the agent sent.
    pub(super) fn fill(&self, family: Family, sockets: Vec<OwnedFd>, error: Option<String>) {
        let mut stock = self.stock(family).lock();
        stock.asked = false;
        if sockets.is_empty() {
            stock.refusals += 1;
            stock.refusal = error.unwrap_or_else(|| "the agent sent none".to_owned());
        }
        stock.sockets.extend(sockets);
        drop(stock);
        self.changed.notify_waiters();
    }

    /// What the agent sent may be lost. Who waits for it is refused: asked again at once, the same might happen, and again.
    pub(super) fn missed(&self, reason: &str) {
        for family in [Family::V4, Family::V6] {
            let mut stock = self.stock(family).lock();
            if std::mem::take(&mut stock.asked) {
                stock.refusals += 1;
                reason.clone_into(&mut stock.refusal);
            }
        }
        self.changed.notify_waiters();
    }

    /// The agent is gone, and what it was asked for will not come; or the next one serves this proxy.
    pub(super) fn set_away(&self, away: bool) {
        for family in [Family::V4, Family::V6] {
            let mut stock = self.stock(family).lock();
            (stock.away, stock.asked) = (away, false);
        }
        self.changed.notify_waiters();
    }

    async fn take(&self, link: &Link, proxy: &str, family: Family) -> io::Result<OwnedFd> {
        let first = self.stock(family).lock().refusals;
        loop {
            let changed = self.changed.notified();
            {
                let mut stock = self.stock(family).lock();
                let socket = stock.sockets.pop();
                if socket.is_none() && stock.refusals != first {
                    return Err(io::Error::other(stock.refusal.clone()));
                }
                if stock.sockets.len() < LOW_WATER && !stock.asked && !stock.away {
                    let count = if socket.is_none() { MAX_APP_SOCKETS } else { BATCH };
                    match link.ask_app_sockets(proxy, family, count) {
                        Ok(()) => stock.asked = true,
                        Err(error) if socket.is_none() && error.kind() != io::ErrorKind::NotConnected => {
                            return Err(error);
                        }
                        Err(_) => {} // the stock lasts for now and the next connection asks again, or the next agent is awaited
                    }
                }
                if let Some(socket) = socket {
                    return Ok(socket);
                }
            }
            changed.await;
        }
    }
}

/// [`Sockets`] for one proxy, from the agent.
#[derive(Debug)]
pub(super) struct HandedSockets {
    pub(super) proxy: String,
    pub(super) link: Arc<Link>,
    pub(super) pool: Arc<Pool>,
}

impl Sockets for HandedSockets {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpListener>> {
        let (link, proxy) = (Arc::clone(&self.link), self.proxy.clone());
        async move {
            let key = (proxy.clone(), address);
            if let Some(held) = link.held.lock().get(&key) {
                return held.try_clone();
            }
            let handed = link.request(|request| ToAgent::OpenListener { request, proxy, address }).await?;
            let handed = TcpListener::from(handed);
            link.held.lock().insert(key, handed.try_clone()?);
            Ok(handed)
        }
        .boxed()
    }

    fn forget(&self, address: SocketAddr) {
        self.link.held.lock().remove(&(self.proxy.clone(), address));
    }

    fn app_socket(&self, family: Family) -> BoxFuture<'static, io::Result<TcpSocket>> {
        let (link, pool, proxy) = (Arc::clone(&self.link), Arc::clone(&self.pool), self.proxy.clone());
        async move {
            // Nobody expects an agent any more that has been away for so long: let callers try another instance.
            let wait = if link.away_for() < ORPHAN_LIFE { APP_SOCKET_WAIT } else { Duration::ZERO };
            let taken = timeout(wait, pool.take(&link, &proxy, family)).await;
            let socket =
                taken.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no socket from the agent in time"))??;
            rustix::io::ioctl_fionbio(&socket, true)?;
            // A type for connected sockets, which tokio takes apart again: it is about the descriptor only.
            Ok(TcpSocket::from_std_stream(socket.into()))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connections_wait_for_an_agent_only_while_one_is_expected() {
        let (link, _messages) = Link::new();
        let pool = Arc::new(Pool::default());
        link.connected();
        link.pools.lock().insert("web".to_owned(), Arc::clone(&pool));
        link.disconnected();
        let sockets = HandedSockets { proxy: "web".to_owned(), link: Arc::clone(&link), pool: Arc::clone(&pool) };
        let waits = async || {
            let start = Instant::now();
            let error = sockets.app_socket(Family::V4).await.expect_err("nobody makes sockets");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            start.elapsed()
        };
        assert!(waits().await >= APP_SOCKET_WAIT, "an agent that is replaced is back in time");
        tokio::time::sleep(ORPHAN_LIFE).await;
        assert!(waits().await < Duration::from_secs(1));
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
        pool.fill(Family::V4, vec![socket.into()], None);
        sockets.app_socket(Family::V4).await.expect("the stock still serves");
    }
}
