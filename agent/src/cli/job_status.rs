//! `culvert job status`: all jobs, or one with its allocations, tasks, services and identities.

use std::collections::BTreeMap;

use anyhow::Context as _;
use culvert_api::{AllocationStatus, JobListEntry, JobStatus};

use super::args::JobStatusArgs;
use super::connection::client;
use super::job::job_path;
use super::output::{Output, Table, ago, pairs};
use super::{OK, Session};

/// Digits of an ID that tables show.
const SHORT: usize = 8;

/// The beginning of an allocation's ID, as Nomad shows it, or all of it.
pub(super) fn short_id(id: &str, verbose: bool) -> &str {
    if verbose { id } else { id.get(..SHORT).unwrap_or(id) }
}

pub(super) async fn run(args: &JobStatusArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client = client(&args.http, &session.env)?;
    let Some(job) = &args.job else {
        let jobs = client.get::<Vec<JobListEntry>>("/v1/culvert/jobs").await.context("Error querying jobs")?;
        return list(&jobs, args, session);
    };
    let status = client.get::<JobStatus>(job_path(job).as_str()).await.context("Error querying job")?;
    if args.json {
        session.output.json(&status)?;
    } else {
        detail(&status, args.verbose, session)?;
    }
    Ok(OK)
}

fn list(jobs: &[JobListEntry], args: &JobStatusArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    if args.json {
        session.output.json(&jobs)?;
        return Ok(OK);
    }
    if jobs.is_empty() {
        session.output.line("No running jobs")?;
        return Ok(OK);
    }
    let mut table = Table::new(&["ID", "Type", "Priority", "Status", "Submit Date"]);
    for job in jobs {
        table.row([&job.id, &job.job_type, &job.priority, &job.status, &job.submitted]);
    }
    table.print(&mut session.output)?;
    Ok(OK)
}

fn detail(status: &JobStatus, verbose: bool, session: &mut Session<'_>) -> std::io::Result<()> {
    let now = session.now;
    let output = &mut session.output;
    let rows = [
        ("ID", status.id.clone()),
        ("Submit Date", status.submitted.to_string()),
        ("Version", status.version.to_string()),
        ("Datacenters", status.datacenters.join(",")),
        ("Status", if status.stopped { format!("{} (stopped)", status.status) } else { status.status.clone() }),
    ];
    pairs(output, " = ", &rows)?;
    summary(&status.allocations, output)?;
    let short = |allocation: &AllocationStatus| short_id(&allocation.id, verbose).to_owned();

    let mut table = Table::new(&["ID", "Task Group", "Version", "Status", "Created", "Address"]);
    for allocation in &status.allocations {
        let AllocationStatus { group, version, status, .. } = allocation;
        let created = ago(allocation.created.0, now);
        let status = if allocation.stopping { &format!("{status}, stopping") } else { status };
        table.row([&short(allocation), group, version, status, &created, &allocation.addresses.join(", ")]);
    }
    section("Allocations", &table, output)?;

    let mut table = Table::new(&["Allocation", "Task", "State", "Restarts", "Exit Code", "Last Event"]);
    for (allocation, task) in each(&status.allocations, |allocation| &allocation.tasks) {
        let exit = task.exit_code.map_or_else(|| "-".to_owned(), |code| code.to_string());
        let event = task.events.last().map(|event| format!("{} {}", event.kind, event.message)).unwrap_or_default();
        let state = if task.failed { "failed" } else { &task.state };
        table.row([&short(allocation), &task.name, &state, &task.restarts, &exit, &event.trim()]);
    }
    section("Tasks", &table, output)?;

    let mut table = Table::new(&["Allocation", "Service", "Health", "Sidecar Port", "Identity"]);
    for (allocation, service) in each(&status.allocations, |allocation| &allocation.services) {
        let port = service.sidecar_port.map_or_else(|| "-".to_owned(), |port| port.to_string());
        let health = service.health.as_deref().unwrap_or("-");
        let identity = service.identity.as_deref().unwrap_or("-");
        table.row([&short(allocation), &service.service, &health, &port, &identity]);
    }
    section("Services", &table, output)?;

    let mut table = Table::new(&["Allocation", "Label", "Host Port", "Port"]);
    for allocation in &status.allocations {
        for (label, (host, inside)) in &allocation.ports {
            table.row([&short(allocation), label, host, inside]);
        }
    }
    section("Ports", &table, output)?;

    for allocation in &status.allocations {
        if let Some(error) = &allocation.error {
            output.line(format_args!("\nAllocation {} ({}): {error}", short(allocation), allocation.group))?;
        }
    }
    Ok(())
}

fn each<'a, T: 'a>(
    allocations: &'a [AllocationStatus],
    parts: impl Fn(&'a AllocationStatus) -> &'a Vec<T>,
) -> impl Iterator<Item = (&'a AllocationStatus, &'a T)> {
    allocations.iter().flat_map(move |allocation| parts(allocation).iter().map(move |part| (allocation, part)))
}

fn section(title: &str, table: &Table, output: &mut Output<'_>) -> std::io::Result<()> {
    if table.is_empty() {
        return Ok(());
    }
    output.line(format_args!("\n{title}"))?;
    table.print(output)
}

/// How many allocations of each group are in which state.
fn summary(allocations: &[AllocationStatus], output: &mut Output<'_>) -> std::io::Result<()> {
    let mut groups: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    for allocation in allocations {
        let counts = groups.entry(&allocation.group).or_default();
        let column = match allocation.status.as_str() {
            "pending" => 0,
            "running" => 1,
            "failed" => 2,
            _ => 3,
        };
        counts[column] += 1;
    }
    let mut table = Table::new(&["Task Group", "Starting", "Running", "Failed", "Complete"]);
    for (group, [starting, running, failed, complete]) in groups {
        table.row([&group, &starting, &running, &failed, &complete]);
    }
    section("Summary", &table, output)
}
