//! `culvert job logs`: what a task prints, found by job or by allocation.

use anyhow::{Context as _, bail};
use culvert_api::client::{Client, ClientError};
use culvert_api::{AllocationStatus, JobListEntry, JobStatus};
use hyper::Method;

use super::args::JobLogsArgs;
use super::connection::{Target, client};
use super::job::job_path;
use super::job_status::short_id;
use super::{OK, Session};

/// Lines that `-tail` shows unless told otherwise (Nomad's number).
const DEFAULT_LINES: usize = 10;
/// Bytes of the end in which lines are counted: `-n` shows fewer lines when they are longer than this together.
const LINES_WITHIN: u64 = 1024 * 1024;

pub(super) async fn run(args: &JobLogsArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client = client(&args.http, &session.env)?;
    let task = args.task.as_deref().or(args.task_flag.as_deref());
    let (allocation, task) = find(&client, &args.target, task).await?;
    let kind = if args.stderr { "stderr" } else { "stdout" };
    let logs =
        Target::new("/v1/culvert/allocation").segment(&allocation).path("/logs").segment(&task).with("type", kind);
    let tail = match (args.bytes, args.lines) {
        (Some(bytes), _) => Some(bytes),
        (None, Some(lines)) => Some(end_of_lines(&client, &logs, lines).await?),
        (None, None) if args.tail => Some(end_of_lines(&client, &logs, DEFAULT_LINES).await?),
        (None, None) => None,
    };
    let mut logs = logs;
    if let Some(bytes) = tail {
        logs = logs.with("tail", &bytes.to_string());
    }
    if args.follow {
        logs = logs.with("follow", "true");
    }
    let mut stream = client.stream(logs.as_str()).await.context("Error reading the log")?;
    while let Some(piece) = stream.next().await.context("Error reading the log")? {
        session.output.bytes(&piece)?;
    }
    Ok(OK)
}

/// How many bytes the last `lines` lines take.
async fn end_of_lines(client: &Client, logs: &Target, lines: usize) -> anyhow::Result<u64> {
    let target = logs.clone().with("tail", &LINES_WITHIN.to_string());
    let text = client.bytes(Method::GET, target.as_str(), None::<&()>).await.context("Error reading the log")?;
    Ok(last_lines(&text, lines))
}

fn last_lines(text: &[u8], lines: usize) -> u64 {
    if lines == 0 {
        return 0;
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let starts = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    let start = starts.take(lines).nth(lines - 1).unwrap_or(0);
    u64::try_from(text.len() - start).unwrap_or(u64::MAX)
}

/// The allocation and the task that the arguments mean.
async fn find(client: &Client, target: &str, task: Option<&str>) -> anyhow::Result<(String, String)> {
    let candidates = match client.get::<JobStatus>(job_path(target).as_str()).await {
        Ok(job) => job.allocations,
        Err(ClientError::Status { status: 404, .. }) => by_prefix(client, target).await?,
        Err(error) => return Err(error).context("Error querying job"),
    };
    if candidates.is_empty() {
        bail!("no job and no allocation is called {target:?}");
    }
    choose(&candidates, target, task)
}

/// Allocations whose ID begins with `prefix`.
async fn by_prefix(client: &Client, prefix: &str) -> anyhow::Result<Vec<AllocationStatus>> {
    let jobs = client.get::<Vec<JobListEntry>>("/v1/culvert/jobs").await.context("Error querying jobs")?;
    let mut found = Vec::new();
    for job in jobs {
        let job = client.get::<JobStatus>(job_path(&job.id).as_str()).await.context("Error querying job")?;
        found.extend(job.allocations.into_iter().filter(|allocation| allocation.id.starts_with(prefix)));
    }
    Ok(found)
}

fn choose(candidates: &[AllocationStatus], target: &str, task: Option<&str>) -> anyhow::Result<(String, String)> {
    let lives = |allocation: &AllocationStatus| allocation.status == "running" && !allocation.stopping;
    let some = candidates.iter().any(lives);
    let live = |allocation: &&AllocationStatus| !some || lives(allocation);
    let mut found = Vec::new();
    for allocation in candidates.iter().filter(live) {
        let tasks = allocation.tasks.iter().filter(|one| task.is_none_or(|task| one.name == task));
        found.extend(tasks.map(|task| (allocation, task)));
    }
    match &found[..] {
        [(allocation, task)] => Ok((allocation.id.clone(), task.name.clone())),
        [] => bail!("{target:?} has no task {}", task.map_or_else(|| "at all".to_owned(), |task| format!("{task:?}"))),
        several => {
            let lines = several.iter().map(|(allocation, task)| {
                format!("  culvert job logs {} {}", short_id(&allocation.id, false), task.name)
            });
            bail!("{target:?} has several tasks; say which one:\n{}", lines.collect::<Vec<_>>().join("\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_api::TaskStatus;

    fn allocation(id: &str, status: &str, tasks: &[&str]) -> AllocationStatus {
        let tasks = tasks.iter().map(|name| TaskStatus { name: (*name).to_owned(), ..TaskStatus::default() }).collect();
        AllocationStatus { id: id.to_owned(), status: status.to_owned(), tasks, ..AllocationStatus::default() }
    }

    #[test]
    fn the_only_live_task_needs_no_name() {
        let ending = AllocationStatus { stopping: true, ..allocation("ending", "running", &["web"]) };
        let old = allocation("old", "complete", &["web"]);
        let candidates = [ending, old, allocation("new", "running", &["web"])];
        assert_eq!(choose(&candidates, "x", None).expect("one"), ("new".to_owned(), "web".to_owned()));
        let dead = [allocation("old", "failed", &["web"])];
        assert_eq!(choose(&dead, "x", None).expect("one").0, "old");
    }

    #[test]
    fn several_tasks_are_listed() {
        let candidates = [allocation("0123456789", "running", &["web", "db"])];
        let error = choose(&candidates, "x", None).expect_err("two").to_string();
        assert!(error.contains("culvert job logs 01234567 web") && error.contains("01234567 db"), "{error}");
        assert_eq!(choose(&candidates, "x", Some("db")).expect("one").1, "db");
        assert!(choose(&candidates, "x", Some("no")).is_err());
    }

    #[test]
    fn the_last_lines_are_counted_with_and_without_a_final_newline() {
        for (text, lines, bytes) in
            [("a\nbb\nccc\n", 2, 7), ("a\nbb\nccc", 2, 6), ("a\nbb", 9, 4), ("", 3, 0), ("a\n", 0, 0), ("\n\n\n", 2, 2)]
        {
            assert_eq!(last_lines(text.as_bytes(), lines), bytes, "{text:?}");
        }
    }
}
