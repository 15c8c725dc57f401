//! The listening sockets of every workload, and the answers to the worker's requests for sockets.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use culvert_proxy::handoff::{Family, MAX_APP_SOCKETS};

use super::Served;
use crate::sys::netns_cookie;
use crate::workload;

/// Why the worker does not get a socket.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketRefused {
    #[error("proxy {0} is not served here")]
    UnknownProxy(String),
    #[error("{address} is no listener of proxy {proxy}")]
    Address { proxy: String, address: SocketAddr },
    #[error("{0} sockets are more than the limit of {MAX_APP_SOCKETS}")]
    TooMany(u16),
    #[error("{what} in {}", netns.display())]
    Socket {
        what: String,
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Every served proxy with its open listeners.
#[derive(Default)]
pub(super) struct Sockets {
    proxies: BTreeMap<String, Entry>,
}

struct Entry {
    served: Served,
    listeners: BTreeMap<SocketAddr, Arc<OwnedFd>>,
}

impl Sockets {
    /// Takes over `served`; listeners that it no longer names are closed.
    pub(super) fn serve(&mut self, served: Served) {
        let listeners = self.proxies.remove(&served.proxy).map(|entry| entry.listeners).unwrap_or_default();
        let mut entry = Entry { served, listeners: BTreeMap::new() };
        entry.listeners = listeners.into_iter().filter(|(address, _)| entry.may_listen(*address)).collect();
        self.proxies.insert(entry.served.proxy.clone(), entry);
    }

    /// Closes the listeners of a proxy that is no longer served.
    pub(super) fn remove(&mut self, proxy: &str) {
        self.proxies.remove(proxy);
    }

    pub(super) fn get(&self, proxy: &str) -> Option<&Served> {
        self.proxies.get(proxy).map(|entry| &entry.served)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Served> {
        self.proxies.values().map(|entry| &entry.served)
    }

    /// Keeps a listener that a re-adopted worker already holds, if the proxy may have it once it is served.
    pub(super) fn adopt(&mut self, proxy: &str, address: SocketAddr, listener: OwnedFd) {
        if let Some(entry) = self.proxies.get_mut(proxy).filter(|entry| entry.may_listen(address)) {
            entry.listeners.insert(address, Arc::new(listener));
        }
    }

    /// Was `listener` made in the network namespace that the workload of `proxy` has now? One that was made again after it had
    /// been removed has the name of the former, in which nobody calls any more.
    pub(super) async fn is_at_home(&self, proxy: &str, listener: &OwnedFd) -> bool {
        let Some(served) = self.get(proxy) else { return true };
        match (netns_cookie(listener), workload::netns_cookie(&served.netns).await) {
            (Ok(made_in), Ok(home)) => made_in == home,
            // Kernels before 5.14 do not tell.
            _ => true,
        }
    }

    /// The listener of `proxy` at `address`: the one that is open, or a new one.
    pub(super) async fn listener(&mut self, proxy: &str, address: SocketAddr) -> Result<Arc<OwnedFd>, SocketRefused> {
        let entry = self.proxies.get_mut(proxy).ok_or_else(|| SocketRefused::UnknownProxy(proxy.to_owned()))?;
        if let Some(open) = entry.listeners.get(&address) {
            return Ok(Arc::clone(open));
        }
        if !entry.may_listen(address) {
            return Err(SocketRefused::Address { proxy: proxy.to_owned(), address });
        }
        let netns = entry.served.netns.clone();
        let opened = workload::listen(&netns, address).await;
        let opened =
            opened.map_err(|source| SocketRefused::Socket { what: format!("listen on {address}"), netns, source })?;
        let opened = Arc::new(opened);
        entry.listeners.insert(address, Arc::clone(&opened));
        Ok(opened)
    }

    /// Unconnected sockets in the netns of the proxy's workload.
    pub(super) async fn app_sockets(
        &self,
        proxy: &str,
        family: Family,
        count: u16,
    ) -> Result<Vec<OwnedFd>, SocketRefused> {
        let entry = self.proxies.get(proxy).ok_or_else(|| SocketRefused::UnknownProxy(proxy.to_owned()))?;
        if count > MAX_APP_SOCKETS {
            return Err(SocketRefused::TooMany(count));
        }
        let netns = entry.served.netns.clone();
        let made = workload::app_sockets(&netns, family == Family::V6, count).await;
        made.map_err(|source| SocketRefused::Socket { what: format!("make {count} sockets"), netns, source })
    }
}

impl Entry {
    /// The inbound port on all addresses at once, an upstream at exactly its own.
    fn may_listen(&self, address: SocketAddr) -> bool {
        (address.port() == self.served.inbound_port && address.ip().is_unspecified())
            || self.served.upstreams.iter().any(|bind| same_listener(*bind, address))
    }
}

/// An upstream bound to 127.0.0.1 is offered on ::1 as well.
fn same_listener(bind: SocketAddr, address: SocketAddr) -> bool {
    let default_v6 =
        bind.ip() == IpAddr::from([127, 0, 0, 1]) && address.ip() == IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]);
    bind == address || (default_v6 && bind.port() == address.port())
}
