//! Runs Nomad job files on this node: the embedded default scheduler of exactly one node.
//!
//! Owns jobs and allocations. A job is compared with what runs; allocations of changed groups are replaced, the rest is
//! left alone. What a job means is the business of `culvert-jobspec`; how an allocation lives is in [`allocation`].

mod allocation;
mod dialer;
mod plan;
mod ports;
mod records;
mod registration;
mod services;
mod start;
mod submission;
mod tasks;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use culvert_types::HealthStatus;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

pub use dialer::WorkloadDialer;
pub use records::{AllocationRecord, JobRecord, RecordError, Records};
pub use registration::RegistrationError;
pub use services::{NodeServices, RunError};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use submission::check;
pub use submission::{Plan, SubmitError, Submitted};
pub use tasks::{TaskEvent, TaskState, TaskView};
pub use view::{AllocationStatus, AllocationView, ServiceView};

use crate::report::chain;
use crate::workload::AllocId;
use allocation::Allocation;
use plan::AtStart;

struct Live {
    view: watch::Receiver<AllocationView>,
    stop: CancellationToken,
    /// Cancelled when everything of it is gone.
    gone: CancellationToken,
}

impl Live {
    fn view(&self) -> AllocationView {
        let mut view = self.view.borrow().clone();
        view.record.stopping |= self.stop.is_cancelled();
        view
    }
}

type Lives = Arc<Mutex<BTreeMap<String, Live>>>;

/// Marks the end of a life, also of one that ends in a panic.
struct End {
    id: String,
    lives: Lives,
    gone: CancellationToken,
}

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!(alloc = self.id, "the life of an allocation ended in a panic");
        }
        self.lives.lock().remove(&self.id);
        self.gone.cancel();
    }
}

/// A job on its way out.
struct Stopping {
    /// As it was wanted until now; `None` if it is forgotten already, and only something of it is left.
    job: Option<JobRecord>,
    running: BTreeMap<String, watch::Receiver<AllocationView>>,
    endings: Vec<CancellationToken>,
    /// Whether the next agent knows that it is stopped.
    written: Result<(), RecordError>,
}

/// The runner.
pub struct Runner {
    node: Arc<NodeServices>,
    /// One change is planned and written down at a time; nobody holds this while tasks end. `true` once the agent leaves.
    leaving: Mutex<bool>,
    jobs: Mutex<BTreeMap<String, JobRecord>>,
    /// Every allocation until it is gone.
    live: Lives,
}

impl Runner {
    /// Takes over what the records name: what lives goes on, what was being stopped is removed.
    #[must_use]
    pub fn start(node: Arc<NodeServices>) -> Arc<Self> {
        let jobs = node.records.jobs().into_iter().map(|record| (record.job.id.clone(), record)).collect();
        let runner =
            Arc::new(Self { leaving: Mutex::new(false), jobs: Mutex::new(jobs), live: Lives::default(), node });
        runner.take_over();
        runner
    }

    fn take_over(&self) {
        let jobs = self.jobs.lock().clone();
        let records = self.node.records.allocations();
        let AtStart { stop, missing } = plan::at_start(&jobs, &records);
        for record in records {
            let id = record.id.clone();
            let stopping = record.stopping || stop.contains(&id);
            self.launch(AllocationRecord { stopping, ..record }, Vec::new());
        }
        for (id, places) in missing {
            warn!(job = id, ?places, "allocations of a job are missing; making them anew");
            if let Err(error) = self.make_anew(&jobs[&id], &places, &stop) {
                error!(job = id, error = chain(&error), "a job lacks allocations until it is run again");
            }
        }
    }

    fn make_anew(&self, job: &JobRecord, places: &[plan::Place], stop: &BTreeSet<String>) -> Result<(), SubmitError> {
        let stop: Vec<String> = stop.iter().cloned().collect();
        for record in self.plan_allocations(&job.job, job.version, places, &stop)? {
            self.node.records.put_allocation(&record)?;
            self.launch(record, self.endings(&stop));
        }
        Ok(())
    }

    /// Stops every allocation of a job; returns when everything of them is gone. `purge` forgets the job as well.
    ///
    /// # Errors
    /// [`SubmitError::UnknownJob`]; [`SubmitError::Left`] when something could not be removed; [`SubmitError::Record`] when
    /// the next agent would run the job again.
    pub async fn stop(&self, id: &str, purge: bool) -> Result<Vec<String>, SubmitError> {
        let Stopping { job, running, endings, written } = self.begin_stop(id, purge)?;
        wait(endings).await;
        if let (Some(job), Err(error)) = (job, written) {
            warn!(job = id, error = chain(&error), "that a job is stopped is not written down; trying again");
            self.stop_again(&job, purge)?;
        }
        let left = running.iter().filter(|(id, _)| self.node.records.has_allocation(id)).map(|(id, view)| {
            let why = view.borrow().error.clone().unwrap_or_else(|| "the agent's log says why".to_owned());
            format!("allocation {id}: {why}")
        });
        let left = left.collect::<Vec<_>>().join("; ");
        if !left.is_empty() {
            return Err(SubmitError::Left { job: id.to_owned(), left });
        }
        Ok(running.into_keys().collect())
    }

    fn begin_stop(&self, id: &str, purge: bool) -> Result<Stopping, SubmitError> {
        let _one_at_a_time = self.leaving.lock();
        self.remove_leftovers(|allocation| allocation.job.id == id);
        let running: BTreeMap<String, watch::Receiver<AllocationView>> = {
            let live = self.live.lock();
            let own = live.iter().filter(|(_, live)| live.view.borrow().record.job.id == id);
            own.map(|(id, live)| (id.clone(), live.view.clone())).collect()
        };
        let job = self.job(id);
        if job.is_none() && running.is_empty() {
            return Err(SubmitError::UnknownJob(id.to_owned()));
        }
        // First of all: a task that filled the disk must end, whether that can be written down or not.
        running.keys().for_each(|id| self.stop_allocation(id));
        let endings = self.endings(&running.keys().cloned().collect::<Vec<_>>());
        let written = job.as_ref().map_or(Ok(()), |job| self.write_stop(job, purge));
        Ok(Stopping { job, running, endings, written })
    }

    /// As [`Runner::write_stop`], once the allocations are gone, which makes room.
    fn stop_again(&self, job: &JobRecord, purge: bool) -> Result<(), RecordError> {
        let _one_at_a_time = self.leaving.lock();
        let id = &job.job.id;
        let same = self.job(id).is_some_and(|now| now.version == job.version && now.submitted == job.submitted);
        let runs = |view: AllocationView| view.record.job.id == *id && !view.record.stopping;
        // Whoever submitted it meanwhile wants it to run.
        if same && !self.views().into_iter().any(runs) { self.write_stop(job, purge) } else { Ok(()) }
    }

    fn write_stop(&self, job: &JobRecord, purge: bool) -> Result<(), RecordError> {
        let id = &job.job.id;
        if purge {
            self.node.records.remove_job(id)?;
            self.jobs.lock().remove(id);
        } else {
            let record = JobRecord { stopped: true, ..job.clone() };
            self.node.records.put_job(&record)?;
            self.jobs.lock().insert(id.clone(), record);
        }
        Ok(())
    }

    /// Begins anew to remove allocations that could not be removed when they were stopped: on a full disk, say.
    fn remove_leftovers(&self, of: impl Fn(&AllocationRecord) -> bool) {
        for record in self.node.records.allocations().into_iter().filter(of) {
            if !self.live.lock().contains_key(&record.id) {
                self.launch(AllocationRecord { stopping: true, ..record }, Vec::new());
            }
        }
    }

    /// Stops everything on this node; returns when everything is gone, with the allocations of which something is left.
    pub async fn stop_all(&self) -> Vec<String> {
        let all: Vec<String> = {
            let mut leaving = self.leaving.lock();
            *leaving = true;
            self.remove_leftovers(|_| true);
            self.live.lock().keys().cloned().collect()
        };
        all.iter().for_each(|id| self.stop_allocation(id));
        wait(self.endings(&all)).await;
        for id in self.jobs.lock().keys() {
            if let Err(error) = self.node.records.remove_job(id) {
                warn!(%error, "a job's record stays");
            }
        }
        // The record goes last.
        let listed = self.node.records.allocations().into_iter().map(|record| record.id);
        let stopped = all.into_iter().filter(|id| self.node.records.has_allocation(id));
        listed.chain(stopped).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Gives tasks that are being ended no more time, now and from now on.
    pub fn hurry(&self) {
        self.node.hurry.cancel();
    }

    /// Threads with the rights that allocations need.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.node.runtime
    }

    /// Every job.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobRecord> {
        self.jobs.lock().values().cloned().collect()
    }

    /// One job.
    #[must_use]
    pub fn job(&self, id: &str) -> Option<JobRecord> {
        self.jobs.lock().get(id).cloned()
    }

    /// Health of a service of an allocation; `None` while it is not in the catalog.
    #[must_use]
    pub fn health(&self, service: &ServiceView) -> Option<HealthStatus> {
        self.node.health(&service.service_id)
    }

    /// Every allocation that is not gone.
    #[must_use]
    pub fn views(&self) -> Vec<AllocationView> {
        self.live.lock().values().map(Live::view).collect()
    }

    /// The allocation whose id starts with `prefix`, if exactly one does.
    #[must_use]
    pub fn allocation(&self, prefix: &str) -> Option<AllocationView> {
        self.only(prefix, Live::view)
    }

    /// As [`Runner::allocation`], as it changes; nothing more comes when it is gone.
    #[must_use]
    pub fn follow(&self, prefix: &str) -> Option<watch::Receiver<AllocationView>> {
        self.only(prefix, |live| live.view.clone())
    }

    fn only<T>(&self, prefix: &str, of: impl FnOnce(&Live) -> T) -> Option<T> {
        let live = self.live.lock();
        let mut matching = live.iter().filter(|(id, _)| id.starts_with(prefix));
        let (_, one) = matching.next()?;
        matching.next().is_none().then(|| of(one))
    }

    /// Starts the life of an allocation, once those that it replaces are gone.
    fn launch(&self, record: AllocationRecord, after: Vec<CancellationToken>) {
        let Ok(id) = AllocId::new(&record.id) else {
            return warn!(id = record.id, "a record names no allocation; ignored");
        };
        let (publish, view) = watch::channel(AllocationView {
            record: record.clone(),
            status: if record.failed.is_some() { AllocationStatus::Failed } else { AllocationStatus::Pending },
            error: record.failed.clone(),
            addresses: Vec::new(),
            services: Vec::new(),
            tasks: BTreeMap::new(),
        });
        let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
        if record.stopping {
            stop.cancel();
        }
        let end = End { id: record.id.clone(), lives: Arc::clone(&self.live), gone: gone.clone() };
        self.live.lock().insert(record.id.clone(), Live { view, stop: stop.clone(), gone });
        let allocation = Allocation { id, record, node: Arc::clone(&self.node), view: publish };
        self.node.runtime.spawn(async move {
            let _end = end;
            allocation.run(stop, after).await;
        });
    }

    fn stop_allocation(&self, id: &str) {
        let stop = self.live.lock().get(id).map(|live| live.stop.clone());
        let Some(stop) = stop.filter(|stop| !stop.is_cancelled()) else { return };
        // If this does not reach the disk, the next agent takes the allocation over and is told to stop it again.
        if let Err(error) = self.node.records.change_allocation(id, |record| record.stopping = true) {
            warn!(%error, "cannot write down that an allocation is stopping");
        }
        stop.cancel();
    }

    /// What is cancelled when each of `ids` is gone; those that are gone already have none.
    fn endings(&self, ids: &[String]) -> Vec<CancellationToken> {
        let live = self.live.lock();
        ids.iter().filter_map(|id| live.get(id)).map(|live| live.gone.clone()).collect()
    }
}

async fn wait(endings: Vec<CancellationToken>) {
    for gone in endings {
        gone.cancelled().await;
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
