use super::super::records::Records;
use super::*;

fn job(count: u32, command: &str) -> Job {
    let text = format!(
        "job \"web\" {{\n group \"g\" {{\n count = {count}\n network {{\n mode = \"bridge\"\n }}\n task \"main\" {{\n \
         driver = \"exec\"\n config {{\n command = \"{command}\"\n }}\n }}\n }}\n}}\n"
    );
    culvert_jobspec::parse(&text, "web.nomad.hcl", &BTreeMap::new()).expect("a job")
}

fn record(job: &Job, version: u64) -> JobRecord {
    JobRecord { job: job.clone(), version, stopped: false, submitted: 7 }
}

fn allocation(id: &str, job: &Job, version: u64, index: u32) -> AllocationRecord {
    AllocationRecord {
        id: format!("{id:0>8}-0000-4000-8000-000000000000"),
        workload: 1,
        job: job.clone(),
        job_version: version,
        group: "g".to_owned(),
        index,
        ports: BTreeMap::new(),
        sidecar_ports: BTreeMap::new(),
        created: 7,
        stopping: false,
        failed: None,
    }
}

fn ids(allocations: &[AllocationRecord]) -> BTreeSet<String> {
    allocations.iter().map(|allocation| allocation.id.clone()).collect()
}

fn restarted(records: &Records) -> AtStart {
    let jobs = records.jobs().into_iter().map(|record| (record.job.id.clone(), record)).collect();
    at_start(&jobs, &records.allocations())
}

/// `kill -9` between any two writes of a submission: the next agent runs the old version or the new one, whole.
#[test]
fn a_submission_that_is_cut_off_has_happened_or_has_not() {
    let (old, new) = (job(2, "/bin/old"), job(2, "/bin/new"));
    let before = [allocation("a", &old, 0, 0), allocation("b", &old, 0, 1)];
    let after = [allocation("c", &new, 1, 0), allocation("d", &new, 1, 1)];
    for first in [true, false] {
        for writes in 0..=5 {
            let directory = tempfile::tempdir().expect("a directory");
            let records = Records::open(directory.path()).expect("records");
            if !first {
                records.submit(&record(&old, 0), &before).expect("the version before");
            }
            let new_job = record(&new, 1);
            let submission = after.iter().map(|allocation| (Some(allocation), None)).chain([(None, Some(&new_job))]);
            for (allocation, job) in submission.take(writes) {
                allocation.iter().for_each(|allocation| records.put_allocation(allocation).expect("written"));
                job.iter().for_each(|job| records.put_job(job).expect("written"));
            }
            for old in before.iter().take(if first { 0 } else { writes.saturating_sub(3) }) {
                records.put_allocation(&AllocationRecord { stopping: true, ..old.clone() }).expect("written");
            }
            let stopped = if writes < 3 { &after[..writes] } else { if first { &[][..] } else { &before[..] } };
            let expected = AtStart { stop: ids(stopped), missing: BTreeMap::new() };
            assert_eq!(restarted(&records), expected, "{writes} writes, first: {first}");
        }
    }
}

#[test]
fn a_submission_that_cannot_be_written_leaves_no_trace() {
    let (old, new) = (job(1, "/bin/old"), job(2, "/bin/new"));
    let before = [allocation("a", &old, 0, 0)];
    let after = [allocation("c", &new, 1, 0), allocation("d", &new, 1, 1)];
    for obstacle in [format!("allocations/{}.json.new", after[1].id), "jobs/776562.json.new".to_owned()] {
        let directory = tempfile::tempdir().expect("a directory");
        let records = Records::open(directory.path()).expect("records");
        records.submit(&record(&old, 0), &before).expect("the version before");
        std::fs::create_dir(directory.path().join(&obstacle)).expect("something in the way");
        let error = records.submit(&record(&new, 1), &after).expect_err("in the way").to_string();
        assert!(error.starts_with("cannot write "), "{error}");
        assert_eq!(ids(&records.allocations()), ids(&before), "{obstacle}");
        assert_eq!(records.jobs()[0].job, old, "{obstacle}");
    }
}

#[test]
fn what_is_lost_is_made_again_and_what_is_unwanted_goes() {
    let web = job(3, "/bin/web");
    let there = [
        allocation("a", &web, 4, 0),
        allocation("b", &web, 4, 0),
        AllocationRecord { created: 9, ..allocation("c", &web, 4, 0) },
        AllocationRecord { failed: Some("exit code 1".to_owned()), ..allocation("d", &web, 4, 1) },
        allocation("e", &web, 4, 3),
    ];
    let jobs: BTreeMap<_, _> = [("web".to_owned(), record(&web, 4))].into();
    let start = at_start(&jobs, &there);
    assert_eq!(start.stop, ids(&[there[0].clone(), there[1].clone(), there[4].clone()]));
    assert_eq!(start.missing, [("web".to_owned(), vec![("g".to_owned(), 2)])].into(), "a failed one keeps its place");
    let stopped = JobRecord { stopped: true, ..record(&web, 4) };
    assert_eq!(at_start(&[("web".to_owned(), stopped)].into(), &there).stop, ids(&there));
    assert_eq!(at_start(&BTreeMap::new(), &there).stop, ids(&there), "its job was purged");
}

#[test]
fn a_submission_replaces_what_has_failed_and_keeps_the_rest() {
    let web = job(2, "/bin/web");
    let failed = AllocationRecord { failed: Some("exit code 1".to_owned()), ..allocation("a", &web, 0, 0) };
    let lives = allocation("b", &web, 0, 1);
    let comparison = compare(&web, 0, &[failed.clone(), lives.clone()], Failed::Replace);
    let expected = Comparison { kept: vec![lives.id], stop: vec![failed.id], missing: vec![("g".to_owned(), 0)] };
    assert_eq!(comparison, expected);
}

/// Who stops an allocation and the allocation itself write the same record.
#[test]
fn each_side_changes_of_a_record_only_what_is_its_own() {
    let directory = tempfile::tempdir().expect("a directory");
    let records = Records::open(directory.path()).expect("records");
    let web = allocation("a", &job(1, "/bin/web"), 0, 0);
    records.put_allocation(&web).expect("written");
    std::thread::scope(|scope| {
        scope.spawn(|| records.change_allocation(&web.id, |record| record.stopping = true).expect("changed"));
        for port in 0..50 {
            let add = |record: &mut AllocationRecord| record.sidecar_ports.extend([("web".to_owned(), port)]);
            records.change_allocation(&web.id, add).expect("changed");
        }
    });
    let written = &records.allocations()[0];
    assert!(written.stopping && written.sidecar_ports["web"] == 49, "{written:?}");
    let id = crate::workload::AllocId::new(&web.id).expect("an ID");
    records.remove_allocation(&id).expect("removed");
    records.change_allocation(&web.id, |record| record.stopping = false).expect("nothing to change");
    assert!(records.allocations().is_empty(), "what is forgotten stays so");
}
