//! Where the checks of an allocation's services are dialled: inside its network namespace, which their ID names.
//!
//! Nothing has to be remembered, so the first check after a restart of the agent already goes to the right place. What
//! carries the name of an allocation is never dialled from the host, where an unrelated process could answer.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use culvert_control::CheckDialer;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use crate::workload::{self, AllocId, NetworkSettings};

/// What the IDs of an allocation's services begin with; the allocation's own follows, and `-`.
const PREFIX: &str = "_culvert-task-";
/// What the IDs of their sidecars end with.
const SIDECAR: &str = "-sidecar-proxy";
/// How long a sidecar may refuse before its check says so. Its listener comes with the worker: when an agent starts after
/// both have died, checks run before the worker does, and a healthy service would be out of the mesh until the next one.
const WORKER_START: Duration = Duration::from_secs(5);
/// How often it is asked meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Digits and hyphens of an allocation's ID.
const ID_LENGTH: usize = 36;

/// Beginning of the catalog IDs of an allocation's services.
pub(super) fn service_prefix(alloc: &AllocId) -> String {
    format!("{PREFIX}{alloc}-")
}

/// Catalog ID of a service's sidecar.
pub(super) fn sidecar_id(service_id: &str) -> String {
    format!("{service_id}{SIDECAR}")
}

/// Dials the checks of services of allocations from inside, all others from the host.
#[derive(Clone, Debug)]
pub struct WorkloadDialer {
    /// Entering a namespace needs rights that the threads of the checks do not have.
    runtime: Handle,
    settings: NetworkSettings,
}

/// Where a check is dialled.
#[derive(Debug, Eq, PartialEq)]
enum Home {
    Host,
    Inside {
        netns: PathBuf,
        /// A sidecar's listener is on every address of the netns; its catalog address may be the node's.
        on_loopback: bool,
    },
}

impl WorkloadDialer {
    /// Dials on the threads of `runtime`, in the namespaces of a network of these `settings`.
    #[must_use]
    pub fn new(runtime: Handle, settings: NetworkSettings) -> Self {
        Self { runtime, settings }
    }

    fn home(&self, service_id: &str) -> io::Result<Home> {
        let Some(rest) = service_id.strip_prefix(PREFIX) else { return Ok(Home::Host) };
        let id = rest.get(..ID_LENGTH).and_then(|id| AllocId::new(id).ok());
        let id = id.ok_or_else(|| io::Error::other(format!("service {service_id:?} names no allocation")))?;
        Ok(Home::Inside { netns: self.settings.netns(&id), on_loopback: service_id.ends_with(SIDECAR) })
    }
}

impl CheckDialer for WorkloadDialer {
    fn dial(&self, service_id: &str, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>> {
        let home = self.home(service_id);
        let runtime = self.runtime.clone();
        async move {
            let Home::Inside { netns, on_loopback } = home? else { return TcpStream::connect(address).await };
            let inside = SocketAddr::from((Ipv4Addr::LOCALHOST, address.port()));
            let address = if on_loopback { inside } else { address };
            let dial = || {
                let netns = netns.clone();
                let dialled = runtime.spawn(async move { workload::dial(&netns, address).await });
                async { dialled.await.unwrap_or_else(|error| Err(io::Error::other(error))) }
            };
            if on_loopback { patiently(dial).await } else { dial().await }
        }
        .boxed()
    }
}

/// Dials again while nobody listens, for [`WORKER_START`] at most.
async fn patiently<T, F: Future<Output = io::Result<T>>>(dial: impl Fn() -> F) -> io::Result<T> {
    let until = Instant::now() + WORKER_START;
    loop {
        match dial().await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < until => {
                sleep(ASK_AGAIN).await;
            }
            dialled => return dialled,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const ID: &str = "b6d4f8c2-0000-4000-8000-00000000002a";

    fn dialer() -> WorkloadDialer {
        WorkloadDialer::new(Handle::current(), NetworkSettings::default())
    }

    #[tokio::test]
    async fn the_id_of_a_service_says_where_it_lives() {
        let alloc = AllocId::new(ID).expect("an ID");
        let service = format!("{}group-api-count-api-9001", service_prefix(&alloc));
        let netns = PathBuf::from("/run/netns/culvert-b6d4f8c2");
        let inside = |on_loopback| Home::Inside { netns: netns.clone(), on_loopback };
        assert_eq!(dialer().home(&service).expect("a home"), inside(false));
        assert_eq!(dialer().home(&sidecar_id(&service)).expect("a home"), inside(true));
        assert_eq!(dialer().home("web").expect("a home"), Home::Host);
        assert_eq!(dialer().home("").expect("checks of the node"), Home::Host);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sidecar_that_does_not_listen_yet_is_asked_again_and_not_for_ever() {
        let dials = Cell::new(0);
        let answer = |from: u32, kind: io::ErrorKind| {
            dials.set(dials.get() + 1);
            std::future::ready(if dials.get() < from { Err(io::Error::from(kind)) } else { Ok(dials.get()) })
        };
        let refused = io::ErrorKind::ConnectionRefused;
        assert_eq!(patiently(|| answer(7, refused)).await.expect("listens in the end"), 7);
        dials.set(0);
        patiently(|| answer(8, io::ErrorKind::NotFound)).await.expect_err("no namespace: no listener will come");
        assert_eq!(dials.get(), 1);
        let (started, never) = (Instant::now(), u32::MAX);
        assert_eq!(patiently(|| answer(never, refused)).await.expect_err("in vain").kind(), refused);
        assert!(started.elapsed() >= WORKER_START && started.elapsed() <= WORKER_START + ASK_AGAIN);
    }

    /// As after a restart: nobody has told the dialer anything, and a process of the host listens on the same port.
    #[tokio::test]
    async fn a_check_of_an_allocation_never_reaches_the_host() {
        let host = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = host.local_addr().expect("an address");
        let gone = service_prefix(&AllocId::random());
        for service in [format!("{gone}group-api-web-http"), format!("{PREFIX}nonsense"), PREFIX.to_owned()] {
            let dialled = dialer().dial(&service, address).await;
            assert!(dialled.is_err(), "{service}: {dialled:?}");
        }
        dialer().dial("web", address).await.expect("services of the host are dialled from the host");
    }
}
