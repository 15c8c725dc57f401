//! What a submission does, worked out before anything is done: the same for a plan, which stops there.

use std::collections::BTreeMap;

use culvert_jobspec::{Diagnostics, Job, JobDiff, NodeContext, Updates};
use tracing::info;

use super::plan::{self, Comparison, Failed};
use super::{
    AllocationRecord, AllocationStatus, AllocationView, JobRecord, RecordError, RunError, Runner, now, ports,
    registration,
};
use crate::workload::AllocId;

/// Why a job was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The job cannot run here; positions included.
    #[error("{0}")]
    NotRunnable(Diagnostics),
    /// `datacenters` of the job leaves this node out.
    #[error("job {job:?} is for datacenters {datacenters:?}; this node is in {here:?}")]
    Datacenter {
        /// The job.
        job: String,
        /// Its patterns.
        datacenters: Vec<String>,
        /// Ours.
        here: String,
    },
    /// A service of the job can never be registered.
    #[error("job {job:?}")]
    Services {
        /// The job.
        job: String,
        /// What is wrong.
        #[source]
        source: Box<RunError>,
    },
    /// A port of the job is taken.
    #[error(transparent)]
    Port(#[from] ports::PortError),
    /// The record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The agent is leaving.
    #[error("the agent is leaving this node; no job is run any more")]
    Leaving,
    /// A job is stopped, but its allocations are not all removed.
    #[error("job {job:?} is stopped, but not everything of it could be removed ({left}); mend that and stop it again")]
    Left {
        /// The job.
        job: String,
        /// The allocations, with the reasons.
        left: String,
    },
    /// No such job.
    #[error("no job {0:?}")]
    UnknownJob(String),
}

/// What a submission did.
#[derive(Clone, Debug, Default)]
pub struct Submitted {
    /// Version of the job.
    pub version: u64,
    /// Allocations made.
    pub created: Vec<String>,
    /// Allocations that are being stopped.
    pub stopped: Vec<String>,
    /// Allocations left alone.
    pub kept: Vec<String>,
}

/// What a submission would do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The difference to the job that runs, with what happens to the allocations.
    pub diff: JobDiff,
    /// Would anything change?
    pub changes: bool,
}

/// A submission that can be written down.
struct Prepared {
    /// The job that is wanted so far.
    before: Option<Job>,
    record: JobRecord,
    comparison: Comparison,
    created: Vec<AllocationRecord>,
}

/// Can `job` ever run on `node`?
pub(crate) fn check(job: &Job, node: &NodeContext) -> Result<(), SubmitError> {
    culvert_jobspec::check_runnable(job).map_err(SubmitError::NotRunnable)?;
    if !job.runs_in(&node.datacenter) {
        let (job, datacenters) = (job.id.clone(), job.datacenters.clone());
        return Err(SubmitError::Datacenter { job, datacenters, here: node.datacenter.clone() });
    }
    registration::check(job, node)
        .map_err(|source| SubmitError::Services { job: job.id.clone(), source: Box::new(source) })
}

impl Runner {
    /// Runs `job`, or brings what runs of it up to date: what has to go is told to, what is new starts when that is gone.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has changed then, but that leftovers of an earlier stop are being removed.
    pub fn submit(&self, job: Job) -> Result<Submitted, SubmitError> {
        let leaving = self.leaving.lock();
        if *leaving {
            return Err(SubmitError::Leaving);
        }
        // What an earlier stop could not remove may still be in the catalog, or hold a port.
        self.remove_leftovers(|allocation| allocation.job.id == job.id);
        let Prepared { record, comparison, created: planned, .. } = self.prepare(job)?;
        let Comparison { kept, stop, .. } = comparison;
        self.node.records.submit(&record, &planned)?;
        let (id, version) = (record.job.id.clone(), record.version);
        self.jobs.lock().insert(id.clone(), record);
        stop.iter().for_each(|id| self.stop_allocation(id));
        let created = planned.iter().map(|allocation| allocation.id.clone()).collect();
        info!(job = id, version, created = planned.len(), stopped = stop.len(), "job submitted");
        for allocation in planned {
            // The old ones first: they may hold a port that the new ones need.
            self.launch(allocation, self.endings(&stop));
        }
        Ok(Submitted { version, created, stopped: stop, kept })
    }

    /// What [`Runner::submit`] would do with `job` now.
    ///
    /// # Errors
    /// [`SubmitError`], as a submission.
    pub fn plan(&self, job: Job) -> Result<Plan, SubmitError> {
        let _one_at_a_time = self.leaving.lock();
        let going: Vec<String> =
            self.views().into_iter().filter(|view| view.record.stopping).map(|view| view.record.id).collect();
        let Prepared { before, record, comparison, created } = self.prepare(job)?;
        let mut diff = culvert_jobspec::diff(before.as_ref(), &record.job);
        let stop: Vec<&String> = comparison.stop.iter().filter(|id| !going.contains(id)).collect();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        for group in &mut diff.groups {
            let is_of = |id: &str| self.allocation(id).is_some_and(|view| view.record.group == group.name);
            let new = created.iter().filter(|allocation| allocation.group == group.name).count();
            let old = stop.iter().filter(|id| is_of(id)).count();
            let kept = comparison.kept.iter().filter(|id| is_of(id)).count();
            let replace = new.min(old);
            group.updates = Updates {
                create: count(new - replace),
                destroy: count(old - replace),
                replace: count(replace),
                ignore: count(kept),
            };
        }
        let changes = before.as_ref() != Some(&record.job) || !created.is_empty() || !stop.is_empty();
        Ok(Plan { diff, changes })
    }

    fn prepare(&self, job: Job) -> Result<Prepared, SubmitError> {
        check(&job, &self.node.context)?;
        let before = self.job(&job.id);
        let changed = before.as_ref().is_none_or(|before| before.stopped || before.job != job);
        let version = before.as_ref().map_or(0, |before| before.version + u64::from(changed));
        let comparison = self.compare(&job, version);
        let created = self.plan_allocations(&job, version, &comparison.missing, &comparison.stop)?;
        let before = before.filter(|before| !before.stopped).map(|before| before.job);
        let record = JobRecord { job, version, stopped: false, submitted: now() };
        Ok(Prepared { before, record, comparison, created })
    }

    /// Compares `job` with what runs of it.
    fn compare(&self, job: &Job, version: u64) -> Comparison {
        let own = self.views().into_iter().filter(|view| view.record.job.id == job.id);
        let as_it_is = |view: AllocationView| {
            let failed = (view.status == AllocationStatus::Failed).then(String::new);
            AllocationRecord { failed: view.record.failed.or(failed), ..view.record }
        };
        let own: Vec<AllocationRecord> = own.map(as_it_is).collect();
        plan::compare(job, version, &own, Failed::Replace)
    }

    /// Records of new allocations for the `places` of `job`; `stop` are those that are gone before the new ones start.
    pub(super) fn plan_allocations(
        &self,
        job: &Job,
        job_version: u64,
        places: &[plan::Place],
        stop: &[String],
    ) -> Result<Vec<AllocationRecord>, SubmitError> {
        let mut others: Vec<AllocationRecord> = self.views().into_iter().map(|view| view.record).collect();
        // A number is free when the record is gone, which goes last. Ports of stopping ones are free before they are needed.
        let mut numbers: Vec<u32> = others.iter().map(|record| record.workload).collect();
        numbers.extend(self.node.records.allocations().iter().map(|record| record.workload));
        let mut planned = Vec::new();
        for (group, index) in places {
            let Some(group) = job.group(group) else { continue };
            let used = others.iter().filter(|record| !stop.contains(&record.id));
            let record = AllocationRecord {
                id: AllocId::random().to_string(),
                workload: free_number(&numbers),
                ports: ports::bind(&group.network, ports::used(used))?,
                job: job.clone(),
                job_version,
                group: group.name.clone(),
                index: *index,
                sidecar_ports: BTreeMap::new(),
                created: now(),
                stopping: false,
                failed: None,
            };
            numbers.push(record.workload);
            others.push(record.clone());
            planned.push(record);
        }
        Ok(planned)
    }
}

/// The smallest number from 1 that is not taken.
fn free_number(taken: &[u32]) -> u32 {
    (1..).find(|number| !taken.contains(number)).unwrap_or(u32::MAX)
}
