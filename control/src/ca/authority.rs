//! The authority: signs requests, rotates its root, forgets old ones.
//!
//! Its memory is the state store; what is kept here are a cache of it, a block of reserved serial numbers and the token bucket.
//! Every change is one guarded transaction, so several servers can share one store.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};
use uuid::Uuid;

use culvert_types::{Datacenter, ServiceIdentity, ServiceName, TrustDomain};

use super::Clock;
use super::csr::Csr;
use super::error::{ConfigureError, OpenError, RotateError, SignError};
use super::key::PrivateKey;
use super::leaf::{self, SignedLeaf, Signer};
use super::limit::RateLimit;
use super::metrics::Metrics;
use super::root::{self, CROSS_SIGNED_TTL, NewRoot};
use super::rows::{self, ConfigRow, IntermediateRow, RootRow, RowError, Rows};
use super::settings::CaSettings;
use super::view::{Root, Roots, View, ViewError};
use super::wire::ConfigurationUpdate;
use crate::state::{Ledger, State};
use crate::store::{Revision, Table};

/// Serial numbers reserved with one commit: signing a leaf then costs none.
const SERIAL_BLOCK: u64 = 64;
/// How often old roots are looked at, at least (Consul's hourly job).
const HOUSEKEEPING: Duration = Duration::from_secs(3600);
/// A root is replaced when this part of its life is over.
const ROOT_RENEWAL: f64 = 0.9;
/// Pause after a root that should have been replaced was not.
const ROOT_RETRY: Duration = Duration::from_secs(60);
/// Most roots that are trusted at a time, if rotated by hand: each goes to every proxy, and stays for twice the life of a leaf.
pub const MAX_ROOTS: usize = 16;
/// The name of roots that the API shows.
const ROOT_NAME: &str = "Consul CA Primary Cert";

/// What `GET /v1/connect/ca/configuration` shows.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// The settings in force.
    pub settings: CaSettings,
    /// As given.
    pub rotation_period: Option<String>,
    /// `CreateIndex`.
    pub created: Revision,
    /// `ModifyIndex`.
    pub modified: Revision,
}

/// The certificate authority of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Authority {
    shared: Arc<Shared>,
    roots: watch::Receiver<Arc<Roots>>,
    _keeper: Arc<AbortOnDropHandle<()>>,
}

struct Shared {
    ledger: Ledger,
    local: CaSettings,
    clock: Clock,
    trust_domain: TrustDomain,
    datacenter: Datacenter,
    view: Mutex<Arc<View>>,
    /// Held across a commit, so that two signers do not reserve a block each.
    serials: tokio::sync::Mutex<Range<u64>>,
    limit: RateLimit,
    metrics: Metrics,
}

impl Authority {
    /// Opens the authority of the store, making trust domain and first root if there is none, and starts to look after it.
    ///
    /// Settings in the store win over `settings`, which only say how a new authority is made, except for those that have no
    /// place in the store. What an operator asks for goes through [`Self::configure`].
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(
        ledger: Ledger,
        datacenter: Datacenter,
        settings: CaSettings,
        clock: Clock,
        stop: CancellationToken,
    ) -> Result<Self, OpenError> {
        settings.check()?;
        make(&ledger, &settings, &clock).await?;
        let view = View::read(&ledger.state(), &settings)?;
        let (publish, roots) = watch::channel(Arc::clone(&view.roots));
        let shared = Arc::new(Shared {
            trust_domain: view.roots.trust_domain.clone(),
            view: Mutex::new(Arc::new(view)),
            serials: tokio::sync::Mutex::new(0..0),
            limit: RateLimit::new(clock.now()),
            metrics: Metrics::default(),
            ledger,
            local: settings,
            clock,
            datacenter,
        });
        shared.metrics.show_roots(&roots.borrow());
        let keeper = Arc::clone(&shared);
        let keeper = tokio::spawn(async move {
            stop.run_until_cancelled(keeper.keep(publish)).await;
        });
        Ok(Self { shared, roots, _keeper: Arc::new(AbortOnDropHandle::new(keeper)) })
    }

    /// The trust domain, fixed for the cluster's life.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.shared.trust_domain
    }

    /// The datacenter it signs for.
    #[must_use]
    pub fn datacenter(&self) -> &Datacenter {
        &self.shared.datacenter
    }

    /// The identity of `service` here.
    #[must_use]
    pub fn identity(&self, service: &ServiceName) -> ServiceIdentity {
        ServiceIdentity {
            trust_domain: self.shared.trust_domain.clone(),
            datacenter: self.shared.datacenter.clone(),
            service: service.clone(),
        }
    }

    /// All trusted roots, as of the latest state.
    ///
    /// # Errors
    /// [`ViewError`] when the stored rows cannot be read.
    pub fn roots(&self) -> Result<Arc<Roots>, ViewError> {
        Ok(Arc::clone(&self.shared.view()?.roots))
    }

    /// Follows the trusted roots.
    #[must_use]
    pub fn watch_roots(&self) -> watch::Receiver<Arc<Roots>> {
        self.roots.clone()
    }

    /// The configuration in force.
    ///
    /// # Errors
    /// [`ViewError`] when the stored rows cannot be read.
    pub fn configuration(&self) -> Result<Configuration, ViewError> {
        let view = self.shared.view()?;
        Ok(Configuration {
            settings: view.settings.clone(),
            rotation_period: view.rotation_period.clone(),
            created: view.config_created,
            modified: view.config_modified,
        })
    }

    /// Certificate counts and expiry.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// The time it goes by.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Settings that belong to this process.
    pub(crate) fn local_settings(&self) -> &CaSettings {
        &self.shared.local
    }

    /// Signs the request (PEM or DER) of `node`.
    ///
    /// # Errors
    /// [`SignError`]: the rate, the request, a service that `node` has not registered, the store.
    pub async fn sign(&self, node: &str, csr: &[u8]) -> Result<SignedLeaf, SignError> {
        let signed = self.shared.sign(node, csr).await;
        match &signed {
            Ok(_) => self.shared.metrics.signed(),
            Err(error) => self.shared.metrics.refused(error.into()),
        }
        signed
    }

    /// Waits until `node` has registered `service`; for ever when the ledger is gone. Cancel-safe.
    pub(crate) async fn registered(&self, node: &str, service: &ServiceName) {
        let mut state = self.shared.ledger.watch();
        if state.wait_for(|state| check_registered(state, node, service).is_ok()).await.is_err() {
            std::future::pending().await
        }
    }

    /// Makes a new root. The old one vouches for it (a cross-signed certificate goes out with every new leaf), stays trusted
    /// for twice the life of a leaf (and until all that it signed have ended, should the life have been longer once), and
    /// loses its private key. Runs by itself when a root nears its end.
    ///
    /// # Errors
    /// [`RotateError`]; nothing changed then.
    pub async fn rotate(&self) -> Result<Arc<Roots>, RotateError> {
        self.shared.rotate(MAX_ROOTS).await?;
        Ok(self.roots()?)
    }

    /// Changes the configuration.
    ///
    /// # Errors
    /// [`ConfigureError`]; nothing changed then.
    pub async fn configure(&self, update: &ConfigurationUpdate) -> Result<(), ConfigureError> {
        update.check()?;
        let changed = self.shared.ledger.update(|state, plan| {
            let rows = Rows::read(state)?.ok_or(ViewError::Missing)?;
            let mut row = rows.config.value.clone();
            let before = row.settings(&self.shared.local);
            let settings = update.over(before.clone());
            if settings != before {
                // What is in force is not judged again because somebody asks for nothing else.
                settings.check()?;
            }
            if settings.leaf_ttl < before.leaf_ttl {
                row.leaves_until = row.leaves_until.max(rows::seconds(self.shared.clock.now() + before.leaf_ttl));
            }
            row.take(&settings);
            row.rotation_period = update.rotation_period.clone().or(row.rotation_period);
            rows::put_config(plan, &row);
            Ok::<_, ConfigureError>((row != rows.config.value).then_some(settings))
        });
        if let Some(settings) = changed.await? {
            info!(?settings, "the authority's settings changed; they hold for what is signed from now on");
        }
        Ok(())
    }

    /// Drops roots that are no longer trusted. Runs by itself every hour.
    ///
    /// # Errors
    /// [`RotateError`] when the store fails.
    pub async fn drop_old_roots(&self) -> Result<(), RotateError> {
        self.shared.drop_old_roots().await
    }
}

/// Makes trust domain, configuration and first root, unless somebody has.
async fn make(ledger: &Ledger, settings: &CaSettings, clock: &Clock) -> Result<(), OpenError> {
    ledger
        .update(|state, plan| {
            if Rows::read(state)?.is_some() {
                return Ok(());
            }
            let trust_domain =
                TrustDomain::new(&format!("{}.consul", Uuid::new_v4())).expect("a UUID is a trust domain");
            let new = root::generate(&trust_domain, rows::FIRST_SERIAL, clock.now(), settings.root_ttl)?;
            info!(%trust_domain, root = %new.id, "made the certificate authority");
            rows::put_config(plan, &ConfigRow::new(&trust_domain, settings));
            rows::put_serial(plan, rows::FIRST_SERIAL + 1);
            rows::put_root(plan, &active_row(&new, Vec::new()));
            Ok(())
        })
        .await
}

fn active_row(new: &NewRoot, intermediates: Vec<IntermediateRow>) -> RootRow {
    RootRow {
        id: new.id.clone(),
        name: ROOT_NAME.to_owned(),
        common_name: new.common_name.clone(),
        serial: new.serial,
        signing_key_id: root::signing_key_id(&new.key),
        not_before: rows::seconds(new.not_before),
        not_after: rows::seconds(new.not_after),
        certificate: new.certificate.clone(),
        intermediates,
        active: true,
        trusted_until: None,
        private_key: Some(new.key.to_pkcs8_pem().as_str().to_owned()),
    }
}

impl Shared {
    /// What the latest state says, read again only when it changed.
    fn view(&self) -> Result<Arc<View>, ViewError> {
        let state = self.ledger.state();
        let mut view = self.view.lock();
        if view.revision < state.index(Table::Authority) {
            *view = Arc::new(View::read(&state, &self.local)?);
        }
        Ok(Arc::clone(&view))
    }

    async fn sign(&self, node: &str, csr: &[u8]) -> Result<SignedLeaf, SignError> {
        let view = self.view()?;
        let now = self.clock.now();
        if !self.limit.take(now, view.settings.csr_max_per_second) {
            return Err(SignError::RateLimit);
        }
        if view.roots.active().is_none_or(|root| root.not_after <= now) {
            return Err(SignError::RootExpired);
        }
        let csr = Csr::parse(csr)?;
        csr.check_authority(&self.trust_domain, &self.datacenter)?;
        check_registered(&self.ledger.state(), node, &csr.identity().service)?;
        let serial = self.next_serial().await?;
        // Reserving may have waited for a commit, even for one that changed the root.
        let view = self.view()?;
        let active = view.roots.active().ok_or(RowError::NoActiveRoot)?;
        let valid = |(certificate, end): &(String, SystemTime)| (*end > now).then(|| certificate.clone());
        let intermediates: Vec<String> = view.intermediates.iter().filter_map(valid).collect();
        let signer = Signer {
            root_id: &active.id,
            certificate: &active.certificate,
            not_after: active.not_after,
            intermediates: &intermediates,
            key: &view.key,
        };
        Ok(leaf::sign(&signer, &csr, serial, now, view.settings.leaf_ttl)?)
    }

    async fn next_serial(&self) -> Result<u64, SignError> {
        let mut block = self.serials.lock().await;
        if block.is_empty() {
            *block = self
                .ledger
                .update(|state, plan| {
                    let rows = Rows::read(state)?.ok_or(ViewError::Missing)?;
                    let end = rows.next_serial + SERIAL_BLOCK;
                    rows::put_serial(plan, end);
                    Ok::<_, SignError>(rows.next_serial..end)
                })
                .await?;
        }
        Ok(block.next().expect("the block was filled"))
    }

    /// `most`: roots that may be trusted afterwards.
    async fn rotate(&self, most: usize) -> Result<(), RotateError> {
        let (serial, cross_serial) = (self.next_serial().await?, self.next_serial().await?);
        let now = self.clock.now();
        let id = self
            .ledger
            .update(|state, plan| {
                let rows = Rows::read(state)?.ok_or(ViewError::Missing)?;
                if rows.roots.len() >= most {
                    return Err(RotateError::TooMany);
                }
                let settings = rows.config.settings(&self.local);
                let new = root::generate(&self.trust_domain, serial, now, settings.root_ttl)?;
                let mut old = rows.active()?.value.clone();
                let old_key = old.private_key.take().ok_or(RowError::NoActiveRoot)?;
                let old_key = PrivateKey::from_pkcs8_pem(&old_key)?;
                let cross = root::cross_sign(&self.trust_domain, &new, &old.certificate, &old_key, cross_serial, now)?;
                let not_after = rows::seconds(new.not_after.min(now + CROSS_SIGNED_TTL));
                old.active = false;
                let trusted_until = rows::seconds(now + 2 * settings.leaf_ttl);
                old.trusted_until = Some(trusted_until.max(rows.config.value.leaves_until));
                rows::put_root(plan, &old);
                rows::put_root(plan, &active_row(&new, vec![IntermediateRow { certificate: cross, not_after }]));
                Ok::<_, RotateError>(new.id)
            })
            .await?;
        info!(root = %id, "a new root signs; the old one stays trusted for twice the life of a leaf");
        Ok(())
    }

    async fn drop_old_roots(&self) -> Result<(), RotateError> {
        let now = rows::seconds(self.clock.now());
        self.ledger
            .update(|state, plan| {
                let rows = Rows::read(state)?.ok_or(ViewError::Missing)?;
                let mut config = rows.config.value.clone();
                for root in rows.roots.values().filter(|root| !root.active) {
                    if root.trusted_until.is_none_or(|until| until <= now) || root.not_after <= now {
                        info!(root = %root.id, "an old root is no longer trusted");
                        rows::delete_root(plan, &root.id);
                        config.dropped_roots += 1;
                    }
                }
                rows::put_config(plan, &config);
                Ok::<_, RotateError>(())
            })
            .await
    }

    /// Publishes changes of the roots, drops old ones, replaces one that nears its end.
    async fn keep(&self, publish: watch::Sender<Arc<Roots>>) {
        let mut state = self.ledger.watch();
        // First thing: the root may have neared its end while nothing ran.
        self.housekeep().await;
        let mut next = self.next_housekeeping();
        loop {
            // Before the look: what changes after it is waited for.
            let seen = state.borrow_and_update().index(Table::Authority);
            match self.view() {
                Ok(view) => {
                    self.metrics.show_roots(&view.roots);
                    publish.send_if_modified(|roots| {
                        let changed = **roots != *view.roots;
                        *roots = Arc::clone(&view.roots);
                        changed
                    });
                }
                Err(err) => error!(%err, "the authority's rows cannot be read; it signs nothing new"),
            }
            tokio::select! {
                // What changed may be due sooner: another root, shorter lives.
                alive = changed_after(&mut state, seen) => if alive {
                    next = next.min(self.next_housekeeping());
                } else {
                    return;
                },
                () = self.clock.sleep_until(next) => {
                    self.housekeep().await;
                    next = self.next_housekeeping();
                }
            }
        }
    }

    /// Within the hour, sooner when lives are short, and when the root is to be replaced.
    fn next_housekeeping(&self) -> SystemTime {
        let view = self.view().unwrap_or_else(|_| Arc::clone(&self.view.lock()));
        let now = self.clock.now();
        let latest = now + HOUSEKEEPING.min(view.settings.leaf_ttl);
        // Overdue means that the attempt has failed.
        view.roots.active().map_or(latest, |root| latest.min(replacement(root).max(now + ROOT_RETRY)))
    }

    async fn housekeep(&self) {
        if let Err(err) = self.drop_old_roots().await {
            warn!(%err, "old roots were not dropped, trying again later");
        }
        let view = self.view();
        let ending =
            view.is_ok_and(|view| view.roots.active().is_some_and(|root| replacement(root) <= self.clock.now()));
        // However many there are: the limit is for hands, and a mesh without a root that signs stands still.
        if ending && let Err(err) = self.rotate(usize::MAX).await {
            warn!(%err, "the root nears its end and was not rotated, trying again in a minute");
        }
    }
}

/// When another root is to take over from `root`.
fn replacement(root: &Root) -> SystemTime {
    root.not_before + root.not_after.duration_since(root.not_before).unwrap_or_default().mul_f64(ROOT_RENEWAL)
}

/// Waits for a change of the authority; `false` when the ledger is gone.
async fn changed_after(state: &mut watch::Receiver<Arc<State>>, seen: Revision) -> bool {
    state.wait_for(|state| state.index(Table::Authority) > seen).await.is_ok()
}

/// Did `node` register `service`, or a sidecar for it?
pub(crate) fn check_registered(state: &State, node: &str, service: &ServiceName) -> Result<(), SignError> {
    let named = |row: &crate::state::rows::Service| match &row.proxy {
        Some(proxy) => proxy.destination_service_name == service.as_str(),
        None => row.name == service.as_str(),
    };
    if state.services_of(node).any(|row| named(row)) {
        return Ok(());
    }
    Err(SignError::NotRegistered { node: node.to_owned(), service: service.clone() })
}
