//! Which allocations a job keeps, which must go, and which it lacks. Pure: a submission, its plan and the start of the
//! agent all ask here.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use culvert_jobspec::{Change, Job};

use super::records::{AllocationRecord, JobRecord};

/// One of the `count` instances of a group: the group's name and a number from 0.
pub(super) type Place = (String, u32);

/// What becomes of the allocations that have failed for good.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Failed {
    /// A submission replaces them.
    Replace,
    /// They stay as they are, for people to look at.
    Stay,
}

/// A job compared with what there is of it.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Comparison {
    /// Ids of allocations that stay.
    pub(super) kept: Vec<String>,
    /// Ids of those that must go; some are going already.
    pub(super) stop: Vec<String>,
    /// Places without an allocation.
    pub(super) missing: Vec<Place>,
}

/// Compares `version` of `job` with its allocations; at most one stays in each place.
pub(super) fn compare(job: &Job, version: u64, existing: &[AllocationRecord], failed: Failed) -> Comparison {
    let mut existing: Vec<&AllocationRecord> = existing.iter().collect();
    // Of two in one place, the one that works stays, then the newer one.
    existing.sort_by_key(|record| (record.failed.is_some(), Reverse(record.created), &record.id));
    let mut comparison = Comparison::default();
    let mut taken: BTreeSet<Place> = BTreeSet::new();
    for record in existing {
        let place = (record.group.clone(), record.index);
        let wanted = !record.stopping
            // Of a submission that was cut off before it was one.
            && record.job_version <= version
            && (record.failed.is_none() || failed == Failed::Stay)
            && job.group(&record.group).is_some_and(|group| record.index < group.count)
            && culvert_jobspec::group_change(&record.job, job, &record.group) == Change::Nothing;
        let ids = if wanted && taken.insert(place) { &mut comparison.kept } else { &mut comparison.stop };
        ids.push(record.id.clone());
    }
    let places = job.groups.iter().flat_map(|group| (0..group.count).map(|index| (group.name.clone(), index)));
    comparison.missing = places.filter(|place| !taken.contains(place)).collect();
    comparison
}

/// What an agent that starts has to do with the records of the one before it.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct AtStart {
    /// Ids of allocations that nobody wants, or that were being stopped.
    pub(super) stop: BTreeSet<String>,
    /// Places without an allocation, by job.
    pub(super) missing: BTreeMap<String, Vec<Place>>,
}

/// Brings `allocations` in line with `jobs`, wherever the agent before was killed.
pub(super) fn at_start(jobs: &BTreeMap<String, JobRecord>, allocations: &[AllocationRecord]) -> AtStart {
    let wanted = |record: &AllocationRecord| jobs.get(&record.job.id).is_some_and(|job| !job.stopped);
    let unwanted = allocations.iter().filter(|record| !wanted(record)).map(|record| record.id.clone());
    let mut start = AtStart { stop: unwanted.collect(), missing: BTreeMap::new() };
    for (id, record) in jobs.iter().filter(|(_, record)| !record.stopped) {
        let own: Vec<AllocationRecord> = allocations.iter().filter(|other| other.job.id == *id).cloned().collect();
        let comparison = compare(&record.job, record.version, &own, Failed::Stay);
        start.stop.extend(comparison.stop);
        if !comparison.missing.is_empty() {
            start.missing.insert(id.clone(), comparison.missing);
        }
    }
    start
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
