//! Health checks: runs them, keeps their deadlines, follows aliases, and writes verdicts to the state.
//!
//! One supervisor compares the checks of this node in the state with the tasks that run, so that a check starts, changes
//! and ends with its row, also after a restart. TCP and HTTP checks dial through [`CheckDialer`]; TTL checks wait for
//! [`Checks::update_ttl`]; alias checks are computed. A verdict is written at once, a mere change of output at most every
//! [`OUTPUT_INTERVAL`]: in between, [`Checks::output`] knows the latest.
//!
//! Left out: how checks are registered (the catalog), and checks that run programs or speak gRPC, UDP, HTTP/2 or TLS:
//! registration refuses them.

mod alias;
mod probe;
mod threshold;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use culvert_types::HealthStatus;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use self::threshold::Thresholds;
use crate::catalog::Catalog;
use crate::metrics::Metrics;
use crate::state::blocking::jitter;
use crate::state::rows::{Check, CheckDefinition, Probe};
use crate::state::{Ledger, State, UpdateError, row_key};
use crate::store::Table;

pub use self::probe::{CheckDialer, NodeDialer};
pub(crate) use self::probe::{split_host_port, split_url};

/// Probes under way at once on a node. A check that finds no place waits for one.
const MAX_CONCURRENT_PROBES: usize = 64;
/// Longest random delay before the first run of a check, so that checks registered together do not run together.
const START_JITTER: Duration = Duration::from_millis(500);
/// Interval of a check that has not succeeded yet, if its own is longer: a service that is starting is seen soon.
const STARTUP_INTERVAL: Duration = Duration::from_secs(1);
/// Least time between two writes that change nothing but the output (Consul's `check_update_interval`).
const OUTPUT_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// How often services that have been critical for too long are looked for.
const REAP_INTERVAL: Duration = Duration::from_secs(30);

/// Why the status of a check could not be set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpdateTtlError {
    /// No such check on this node.
    #[error("Unknown check ID {0:?}. Ensure that the check ID is passed, not the check name.")]
    Unknown(String),
    /// A check of another kind: its status is not for clients to set.
    #[error("CheckID {0:?} does not have associated TTL")]
    NotTtl(String),
    /// The store.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// The checks of this node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Checks {
    inner: Arc<Inner>,
}

struct Inner {
    ledger: Ledger,
    node: String,
    dialer: Arc<dyn CheckDialer>,
    places: Semaphore,
    metrics: Metrics,
    /// Latest output by check ID, and when it was last written.
    outputs: Mutex<HashMap<String, (String, Instant)>>,
    /// Last sign of life by ID of TTL checks.
    beats: Mutex<HashMap<String, watch::Sender<Instant>>>,
}

impl Checks {
    /// The checks of `node`. Nothing runs before [`Checks::supervise`].
    pub(crate) fn new(ledger: Ledger, node: &str, dialer: Arc<dyn CheckDialer>, metrics: Metrics) -> Self {
        let inner = Inner {
            ledger,
            node: node.to_owned(),
            dialer,
            places: Semaphore::new(MAX_CONCURRENT_PROBES),
            metrics,
            outputs: Mutex::default(),
            beats: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The latest output of a check of this node: newer than its row's, if there is one.
    #[must_use]
    pub(crate) fn output(&self, id: &str) -> Option<String> {
        self.inner.latest(id)
    }

    /// Takes a client's word for the status of a TTL check and starts its time anew.
    ///
    /// # Errors
    /// [`UpdateTtlError`].
    pub(crate) async fn update_ttl(
        &self,
        id: &str,
        status: HealthStatus,
        output: String,
    ) -> Result<(), UpdateTtlError> {
        let state = self.inner.ledger.state();
        let check = state.check(&self.inner.node, id).ok_or_else(|| UpdateTtlError::Unknown(id.to_owned()))?;
        if !matches!(check.definition.probe, Probe::Ttl(_)) {
            return Err(UpdateTtlError::NotTtl(id.to_owned()));
        }
        self.inner.beat(id).send_replace(Instant::now());
        Ok(self.inner.write(id, &check.definition, Some(status), output).await?)
    }

    /// Runs what the state says until `stop`, or until the ledger closes.
    pub(crate) async fn supervise(self, catalog: Catalog, stop: CancellationToken) {
        let supervisor = Supervisor { checks: self.inner, catalog, running: HashMap::new(), critical: HashMap::new() };
        stop.run_until_cancelled(supervisor.run()).await;
    }
}

impl Inner {
    fn latest(&self, id: &str) -> Option<String> {
        self.outputs.lock().get(id).map(|(output, _)| output.clone())
    }

    fn beat(&self, id: &str) -> watch::Sender<Instant> {
        self.beats.lock().entry(id.to_owned()).or_insert_with(|| watch::Sender::new(Instant::now())).clone()
    }

    /// Writes a verdict of a run of `definition`; nothing if the check has been changed or removed since.
    async fn write(
        &self,
        id: &str,
        definition: &CheckDefinition,
        verdict: Option<HealthStatus>,
        mut output: String,
    ) -> Result<(), UpdateError> {
        truncate(&mut output, definition.output_max_size);
        let now = Instant::now();
        let due = {
            let mut outputs = self.outputs.lock();
            let entry = outputs.entry(id.to_owned()).or_insert_with(|| (String::new(), now));
            entry.0.clone_from(&output);
            now.duration_since(entry.1) >= OUTPUT_INTERVAL
        };
        let written = self.ledger.update::<_, UpdateError>(|state, plan| {
            let Some(check) = state.check(&self.node, id) else { return Ok(None) };
            let status = verdict.unwrap_or(check.status);
            let changed = status != check.status || check.output.is_empty();
            if check.definition != *definition || !(changed || due) {
                return Ok(None);
            }
            let after = Check { status, output: output.clone(), ..check.value.clone() };
            plan.put(Table::Checks, row_key(&self.node, id), &after);
            Ok(Some((check.status, status)))
        });
        if let Some((before, after)) = written.await? {
            self.outputs.lock().insert(id.to_owned(), (output, now));
            if before != after {
                info!(check = id, %before, %after, "check changed");
                self.metrics.check_changed(after);
            }
        }
        Ok(())
    }

    /// As [`Inner::write`], for tasks that nobody waits for.
    async fn report(&self, id: &str, definition: &CheckDefinition, verdict: Option<HealthStatus>, output: String) {
        if let Err(err) = self.write(id, definition, verdict, output).await {
            warn!(check = id, %err, "verdict not stored; the next run tries again");
        }
    }

    /// Runs a TCP or HTTP check at its interval.
    async fn poll(&self, check: &Check) {
        let definition = &check.definition;
        let mut thresholds = Thresholds::default();
        let mut started = check.status != HealthStatus::Critical;
        tokio::time::sleep(jitter(definition.interval.min(START_JITTER))).await;
        loop {
            let next = Instant::now() + definition.interval;
            let outcome = {
                // The semaphore is never closed.
                let _place = self.places.acquire().await;
                probe::run(&self.dialer, &check.service_id, definition).await
            };
            self.metrics.check_ran(&definition.probe, outcome.status);
            let verdict = thresholds.verdict(definition, outcome.status);
            started |= thresholds.succeeding();
            self.report(&check.id, definition, verdict, outcome.output).await;
            let early = Instant::now() + STARTUP_INTERVAL;
            tokio::time::sleep_until(if started { next } else { next.min(early) }).await;
        }
    }

    /// Turns a TTL check critical when nobody has spoken for it in time.
    async fn expire(&self, check: &Check, ttl: Duration) {
        let beat = self.beat(&check.id);
        beat.send_replace(Instant::now());
        let mut beats = beat.subscribe();
        loop {
            let last = *beats.borrow_and_update();
            tokio::select! {
                biased;
                _ = beats.changed() => {}
                () = tokio::time::sleep_until(last + ttl) => {
                    let last = self.latest(&check.id).unwrap_or_else(|| check.output.clone());
                    let output = if last.is_empty() || last.starts_with(TTL_EXPIRED) {
                        TTL_EXPIRED.to_owned()
                    } else {
                        format!("{TTL_EXPIRED} (last output before timeout follows): {last}")
                    };
                    self.report(&check.id, &check.definition, Some(HealthStatus::Critical), output).await;
                    if beats.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

const TTL_EXPIRED: &str = "TTL expired";

/// Cuts `text` to at most `limit` bytes, between characters.
fn truncate(text: &mut String, limit: usize) {
    text.truncate(text.floor_char_boundary(limit));
}

/// A task and what it was started for.
struct Running {
    definition: CheckDefinition,
    service_id: String,
    _task: AbortOnDropHandle<()>,
}

struct Supervisor {
    checks: Arc<Inner>,
    catalog: Catalog,
    running: HashMap<String, Running>,
    /// Checks whose service leaves when they stay critical, and since when they are.
    critical: HashMap<String, Instant>,
}

impl Supervisor {
    async fn run(mut self) {
        let mut states = self.checks.ledger.watch();
        let mut reaper = tokio::time::interval(REAP_INTERVAL);
        reaper.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let state = Arc::clone(&states.borrow_and_update());
            self.reconcile(&state);
            self.follow_aliases(&state).await;
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                _ = reaper.tick() => self.reap().await,
            }
        }
    }

    /// Starts, restarts and ends tasks so that they are those of `state`.
    fn reconcile(&mut self, state: &State) {
        let inner = &self.checks;
        self.running.retain(|id, running| {
            let kept = state
                .check(&inner.node, id)
                .is_some_and(|check| check.definition == running.definition && check.service_id == running.service_id);
            if !kept {
                inner.beats.lock().remove(id);
                inner.outputs.lock().remove(id);
            }
            kept
        });
        let mut critical = HashMap::new();
        for check in state.checks_on(&inner.node) {
            if check.status == HealthStatus::Critical && !check.definition.deregister_critical_service_after.is_zero() {
                let since = self.critical.get(&check.id).copied().unwrap_or_else(Instant::now);
                critical.insert(check.id.clone(), since);
            }
            if !self.running.contains_key(&check.id)
                && let Some(task) = start(inner, &check.value)
            {
                let (definition, service_id) = (check.definition.clone(), check.service_id.clone());
                self.running.insert(check.id.clone(), Running { definition, service_id, _task: task });
            }
        }
        self.critical = critical;
        // A run that ended just after its check was removed may have left its output.
        inner.outputs.lock().retain(|id, _| state.check(&inner.node, id).is_some());
    }

    async fn follow_aliases(&self, state: &State) {
        for (check, outcome) in alias::changed(state, &self.checks.node) {
            self.checks.report(&check.id, &check.definition, Some(outcome.status), outcome.output).await;
        }
    }

    /// Deregisters services whose check has been critical for longer than it may.
    async fn reap(&mut self) {
        let state = self.checks.ledger.state();
        for (id, since) in &self.critical {
            let Some(check) = state.check(&self.checks.node, id) else { continue };
            let after = check.definition.deregister_critical_service_after;
            if since.elapsed() < after || check.service_id.is_empty() {
                continue;
            }
            info!(service = check.service_id, check = id, ?after, "critical for too long: deregistering the service");
            if let Err(err) = self.catalog.deregister_service(&check.service_id).await {
                warn!(service = check.service_id, %err, "not deregistered; trying again at the next look");
            }
        }
    }
}

/// The task of a check, if its kind has one.
fn start(inner: &Arc<Inner>, check: &Check) -> Option<AbortOnDropHandle<()>> {
    let (inner, check) = (Arc::clone(inner), check.clone());
    let task = match check.definition.probe {
        Probe::Tcp { .. } | Probe::Http { .. } => tokio::spawn(async move { inner.poll(&check).await }),
        Probe::Ttl(ttl) => tokio::spawn(async move { inner.expire(&check, ttl).await }),
        Probe::Fixed | Probe::Alias { .. } => return None,
    };
    Some(AbortOnDropHandle::new(task))
}

#[cfg(test)]
mod tests;
