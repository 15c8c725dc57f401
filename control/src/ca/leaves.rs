//! The leaves of this node: keys made here, certified by the authority, renewed in time.
//!
//! One task per service whose leaf somebody watches. It publishes a new leaf while the old one is still valid, so watchers never
//! see a gap; it waits while the service is not registered; it ends, and the key is wiped, when the last watcher is gone.
//! Renewal follows Consul: at a random point between 60 % and 90 % of the life, at once beyond 90 %, and within a random half
//! minute after a change of the root.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, info_span, warn};

use culvert_types::ServiceName;

use super::NOT_BEFORE_SLACK;
use super::authority::Authority;
use super::csr;
use super::error::SignError;
use super::key::{KeyError, PrivateKey};
use super::leaf::Leaf;
use super::random;

/// Most leaves that one node keeps at a time.
pub const MAX_LEAVES: usize = 4096;
/// Renewal starts at the earliest at this part of the life.
const RENEW_FROM: f64 = 0.6;
/// And at the latest at this part.
const RENEW_UNTIL: f64 = 0.9;
/// Shortest time between two renewals in a row.
const RENEW_PAUSE: Duration = Duration::from_secs(1);
/// First pause after a failed attempt; doubles up to [`RETRY_MAX`], each drawn at random between half and full.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest pause between attempts.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Why there is no leaf.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LeafError {
    /// The authority did not sign.
    #[error(transparent)]
    Sign(#[from] Arc<SignError>),
    /// The key.
    #[error(transparent)]
    Key(#[from] Arc<KeyError>),
    /// The request.
    #[error("make the certificate request")]
    Request(#[from] Arc<rcgen::Error>),
    /// [`MAX_LEAVES`].
    #[error("this node already keeps {MAX_LEAVES} leaf certificates")]
    TooMany,
    /// The node is shutting down.
    #[error("the leaf manager is closed")]
    Closed,
}

/// What is known of a leaf.
#[derive(Clone, Debug, Default)]
struct Progress {
    leaf: Option<Arc<Leaf>>,
    error: Option<LeafError>,
}

/// Follows the leaf of one service. While one exists the leaf is kept and renewed.
#[derive(Clone)]
pub struct LeafWatch(watch::Receiver<Progress>);

impl LeafWatch {
    /// The latest leaf; `None` before the first one is signed.
    #[must_use]
    pub fn latest(&self) -> Option<Arc<Leaf>> {
        self.0.borrow().leaf.clone()
    }

    /// The latest leaf, marked as seen by [`Self::changed`].
    pub fn take_latest(&mut self) -> Option<Arc<Leaf>> {
        self.0.borrow_and_update().leaf.clone()
    }

    /// Waits for a new leaf (or a new failure). Cancel-safe.
    ///
    /// # Errors
    /// [`LeafError::Closed`] at shutdown.
    pub async fn changed(&mut self) -> Result<(), LeafError> {
        self.0.changed().await.map_err(|_| LeafError::Closed)
    }

    /// The leaf, or why the first attempt to get it failed.
    ///
    /// # Errors
    /// [`LeafError`].
    pub async fn ready(&mut self) -> Result<Arc<Leaf>, LeafError> {
        let known = |progress: &Progress| progress.leaf.is_some() || progress.error.is_some();
        let progress = self.0.wait_for(known).await.map_err(|_| LeafError::Closed)?;
        match (&progress.leaf, &progress.error) {
            (Some(leaf), _) => Ok(Arc::clone(leaf)),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => Err(LeafError::Closed),
        }
    }
}

/// The leaves that this node keeps. Cheap to clone.
#[derive(Clone)]
pub struct Leaves {
    shared: Arc<Shared>,
}

struct Shared {
    authority: Authority,
    node: String,
    kept: Mutex<HashMap<ServiceName, watch::Sender<Progress>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Leaves {
    /// The leaves of services registered by `node`; tasks end with `stop`.
    #[must_use]
    pub fn new(authority: Authority, node: &str, stop: CancellationToken) -> Self {
        let shared =
            Shared { authority, node: node.to_owned(), kept: Mutex::default(), tasks: TaskTracker::new(), stop };
        Self { shared: Arc::new(shared) }
    }

    /// The authority behind it.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.shared.authority
    }

    /// Starts to keep the leaf of `service`, or joins who does already.
    ///
    /// # Errors
    /// [`LeafError::TooMany`].
    pub fn watch(&self, service: &ServiceName) -> Result<LeafWatch, LeafError> {
        let mut kept = self.shared.kept.lock();
        if let Some(sender) = kept.get(service) {
            return Ok(LeafWatch(sender.subscribe()));
        }
        if kept.len() >= MAX_LEAVES {
            return Err(LeafError::TooMany);
        }
        let (sender, receiver) = watch::channel(Progress::default());
        kept.insert(service.clone(), sender.clone());
        let keeper = Keeper { shared: Arc::clone(&self.shared), service: service.clone(), sender };
        let stop = self.shared.stop.clone();
        let task = async move { stop.run_until_cancelled(keeper.run()).await };
        self.shared.tasks.spawn(task.instrument(info_span!("leaf", %service)));
        Ok(LeafWatch(receiver))
    }

    /// The leaf of `service` once, for a client that asks over the API.
    ///
    /// # Errors
    /// [`LeafError`].
    pub async fn get(&self, service: &ServiceName) -> Result<Arc<Leaf>, LeafError> {
        self.watch(service)?.ready().await
    }
}

/// The task behind one leaf.
struct Keeper {
    shared: Arc<Shared>,
    service: ServiceName,
    sender: watch::Sender<Progress>,
}

impl Keeper {
    async fn run(self) {
        let authority = self.shared.authority.clone();
        let mut roots = authority.watch_roots();
        let mut failures = 0;
        loop {
            let current = self.sender.borrow().leaf.clone();
            // Before the first leaf the wait is over at once.
            let due = match &current {
                _ if failures > 0 => authority.clock().now() + pause(failures),
                // A leaf that ends with its root may live for seconds only: no more than one key and push per pause.
                Some(leaf) => renewal(leaf, random::fraction()).max(authority.clock().now() + RENEW_PAUSE),
                None => SystemTime::UNIX_EPOCH,
            };
            tokio::select! {
                () = self.sender.closed() => if self.end() { return } else { continue },
                // Asking again does not register it.
                () = authority.registered(&self.shared.node, &self.service), if self.is_not_registered() => {}
                () = authority.clock().sleep_until(due), if !self.is_not_registered() => {}
                () = other_root(&mut roots, current.as_deref()), if failures == 0 => {
                    let smear = random::part_of(authority.local_settings().root_change_smear);
                    authority.clock().sleep_until(authority.clock().now() + smear).await;
                }
            }
            failures = if self.renew().await { 0 } else { failures + 1 };
        }
    }

    /// Why the last attempt failed.
    fn is_not_registered(&self) -> bool {
        let progress = self.sender.borrow();
        let Some(LeafError::Sign(error)) = &progress.error else { return false };
        matches!(**error, SignError::NotRegistered { .. })
    }

    /// One attempt.
    async fn renew(&self) -> bool {
        match self.make().await {
            Ok(leaf) => {
                debug!(serial = %leaf.certificate.serial, "new leaf certificate");
                self.shared.authority.metrics().show_leaf(&self.service, Some(leaf.certificate.valid_before));
                self.sender.send_replace(Progress { leaf: Some(Arc::new(leaf)), error: None });
                true
            }
            Err(error) => {
                warn!(%error, "no new leaf certificate");
                self.sender.send_modify(|progress| progress.error = Some(error));
                false
            }
        }
    }

    /// A new key with each certificate: what leaks of an old one is worth nothing after its end.
    async fn make(&self) -> Result<Leaf, LeafError> {
        let authority = &self.shared.authority;
        let key = PrivateKey::generate().map_err(Arc::new)?;
        let csr = csr::request(&authority.identity(&self.service), &key).map_err(Arc::new)?;
        let certificate = authority.sign(&self.shared.node, csr.as_bytes()).await.map_err(Arc::new)?;
        Ok(Leaf::new(certificate, key.to_sec1_pem().map_err(Arc::new)?))
    }

    /// Leaves the table, unless somebody joined meanwhile.
    fn end(&self) -> bool {
        let mut kept = self.shared.kept.lock();
        let unwatched = self.sender.receiver_count() == 0;
        if unwatched {
            kept.remove(&self.service);
            self.shared.authority.metrics().show_leaf(&self.service, None);
        }
        unwatched
    }
}

/// When to renew: `choice` of 0 means at 60 % of the life, 1 at 90 %. The minute before it was made does not count: most of a
/// short life would be over at its start.
fn renewal(leaf: &Leaf, choice: f64) -> SystemTime {
    let (start, end) = (leaf.certificate.valid_after + NOT_BEFORE_SLACK, leaf.certificate.valid_before);
    let life = end.duration_since(start).unwrap_or_default();
    start + life.mul_f64(RENEW_FROM + (RENEW_UNTIL - RENEW_FROM) * choice)
}

/// Pause after the `failures`-th failure in a row.
fn pause(failures: u32) -> Duration {
    let longest = RETRY_MIN.saturating_mul(1 << failures.saturating_sub(1).min(5)).min(RETRY_MAX);
    longest / 2 + random::part_of(longest / 2)
}

/// Waits until another root than that of `leaf` signs; for ever if there is no leaf or the authority is gone.
async fn other_root(roots: &mut watch::Receiver<Arc<super::Roots>>, leaf: Option<&Leaf>) {
    if let Some(leaf) = leaf
        && roots.wait_for(|roots| roots.active_id != leaf.certificate.root_id).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
