//! `culvert job validate|plan|run|stop`: Nomad's verbs over the agent's own endpoints.
//!
//! Job files are parsed here first, so that errors show their line even when no agent runs; the agent parses the same text
//! again, because it cannot trust its callers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use culvert_api::client::Client;
use culvert_api::{AllocationStatus, JobPlan, JobStatus, JobStopped, JobSubmission, JobSubmitted};
use culvert_jobspec::MAX_SOURCE;
use hyper::Method;
use tokio::time::{Instant, sleep};

use super::args::{JobCommand, JobFileArgs, JobPlanArgs, JobRunArgs, JobStopArgs};
use super::connection::{Target, client};
use super::job_status::short_id;
use super::output::{Colour, Output};
use super::{FAILED, OK, Session, job_logs, job_status, key_value, wait};

/// Exit code of `plan` when something would change.
const CHANGES: u8 = 1;
/// How often `run` looks at the job.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long `run` waits for the job to become healthy; Nomad's healthy deadline.
const HEALTHY_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Events of an ordinary start: not worth a line.
const ORDINARY_EVENTS: [&str; 3] = ["Received", "Task Setup", "Started"];

const JOBS: &str = "/v1/culvert/jobs";

/// Flags that Nomad's commands of the same names take and culvert does not honour.
const NOMAD_FLAGS: [&str; 25] = [
    "all-allocs",
    "check-index",
    "consul-namespace",
    "consul-token",
    "detach",
    "eval-priority",
    "evals",
    "force-color",
    "global",
    "hcl2-strict",
    "job",
    "json",
    "no-shutdown-delay",
    "output",
    "policy-override",
    "preserve-counts",
    "preserve-resources",
    "region",
    "short",
    "t",
    "ui",
    "var-file",
    "vault-namespace",
    "vault-token",
    "verbose",
];

/// What to say of a flag of Nomad's that clap did not know.
pub(super) fn refused_flag(error: &clap::Error) -> Option<String> {
    let (ErrorKind::UnknownArgument, Some(ContextValue::String(flag))) =
        (error.kind(), error.get(ContextKind::InvalidArg))
    else {
        return None;
    };
    let name = flag.trim_start_matches('-');
    let name = name.split_once('=').map_or(name, |(name, _)| name);
    NOMAD_FLAGS
        .contains(&name)
        .then(|| format!("-{name} of Nomad's command is not supported by culvert yet: leave it out"))
}

pub(super) fn run(command: JobCommand, session: &mut Session<'_>) -> anyhow::Result<u8> {
    if let JobCommand::Plan(JobPlanArgs { file, .. }) | JobCommand::Run(JobRunArgs { file, .. }) = &command
        && file.no_color
    {
        session.output.without_colour();
    }
    match command {
        JobCommand::Validate(args) => {
            read_job(&args)?;
            session.output.line("Job validation successful")?;
            Ok(OK)
        }
        JobCommand::Plan(args) => {
            let submission = read_job(&args.file)?;
            wait(plan(&args, &submission, session))
        }
        JobCommand::Run(args) => {
            let submission = read_job(&args.file)?;
            wait(submit(&args, &submission, session))
        }
        JobCommand::Status(args) => wait(job_status::run(&args, session)),
        JobCommand::Stop(args) => wait(stop(&args, session)),
        JobCommand::Logs(args) => wait(job_logs::run(&args, session)),
    }
}

/// Path of one job below the API.
pub(super) fn job_path(id: &str) -> Target {
    Target::new("/v1/culvert/job").segment(id)
}

/// Reads and checks a job file.
fn read_job(args: &JobFileArgs) -> anyhow::Result<JobSubmission> {
    if !args.var_file.is_empty() {
        bail!("-var-file is not supported by culvert yet: use -var key=value");
    }
    if args.hcl1 {
        bail!("-hcl1 is not supported by culvert: job files are HCL2");
    }
    let mut variables = BTreeMap::new();
    for pair in &args.variables {
        let (key, value) = key_value("var", pair)?;
        variables.insert(key.to_owned(), value.to_owned());
    }
    let (file, source) = read_source(&args.file)?;
    if source.trim_start().starts_with('{') {
        bail!("{file}: job files in JSON are not supported by culvert yet: write HCL");
    }
    let job = culvert_jobspec::parse(&source, &file, &variables).and_then(|job| culvert_jobspec::check_runnable(&job));
    job.map_err(|errors| anyhow!("{}", errors.to_string().trim_end()))?;
    Ok(JobSubmission { source, file, variables })
}

fn read_source(path: &Path) -> anyhow::Result<(String, String)> {
    let name = path.display().to_string();
    if name.starts_with("http://") || name.starts_with("https://") {
        bail!("job file {name}: only local files are read");
    }
    let (name, reader): (String, Box<dyn Read>) = if path == Path::new("-") {
        ("<stdin>".to_owned(), Box::new(std::io::stdin()))
    } else {
        let file = File::open(path).with_context(|| format!("Error reading job file {name}"))?;
        (name, Box::new(file))
    };
    let mut source = String::new();
    let limit = u64::try_from(MAX_SOURCE).unwrap_or(u64::MAX).saturating_add(1);
    reader.take(limit).read_to_string(&mut source).with_context(|| format!("Error reading job file {name}"))?;
    Ok((name, source)) // a text over the limit is refused by the parser, with its words
}

async fn plan(args: &JobPlanArgs, submission: &JobSubmission, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client = client(&args.http, &session.env)?;
    let plan = client.call::<JobPlan>(Method::POST, "/v1/culvert/jobs/plan", Some(submission)).await;
    let plan = plan.context("Error during plan")?;
    if args.json {
        session.output.json(&plan)?;
    } else {
        if args.diff {
            for line in plan.diff.lines() {
                let painted = paint_diff(line, &session.output);
                session.output.line(painted)?;
            }
            session.output.line("")?;
        }
        let next = match plan.changes {
            true => format!("To submit the job run:\n\nculvert job run {}", submission.file),
            false => "Nothing would change.".to_owned(),
        };
        session.output.line(next)?;
    }
    Ok(if plan.changes { CHANGES } else { OK })
}

fn paint_diff(line: &str, output: &Output<'_>) -> String {
    match line.trim_start() {
        text if text.starts_with("+/-") => output.paint(Colour::Yellow, line),
        text if text.starts_with('+') => output.paint(Colour::Green, line),
        text if text.starts_with('-') => output.paint(Colour::Red, line),
        _ => line.to_owned(),
    }
}

async fn submit(args: &JobRunArgs, submission: &JobSubmission, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client = client(&args.http, &session.env)?;
    let submitted = client.call::<JobSubmitted>(Method::PUT, JOBS, Some(submission)).await;
    let submitted = submitted.context("Error submitting job")?;
    if args.json {
        session.output.json(&submitted)?;
        return Ok(OK);
    }
    let JobSubmitted { id, version, created, stopped, kept } = &submitted;
    session.output.line(format_args!(
        "==> Job {id:?} version {version} submitted: {} allocations created, {} stopped, {} unchanged",
        created.len(),
        stopped.len(),
        kept.len()
    ))?;
    if args.detach {
        return Ok(OK);
    }
    session.output.flush()?;
    let mut monitor = Monitor::new(&submitted, args.verbose);
    let deadline = Instant::now() + HEALTHY_WITHIN;
    loop {
        let status = client.get::<JobStatus>(job_path(id).as_str()).await.context("Error monitoring the job")?;
        monitor.tell(&status, &mut session.output)?;
        match monitor.outcome(&status) {
            Outcome::Healthy => {
                session.output.line(format_args!("==> Job {id:?} is running and healthy"))?;
                return Ok(OK);
            }
            Outcome::Failed(why) => {
                session.output.error(format_args!("==> Job {id:?} failed: {why}; see `culvert job status {id}`"));
                return Ok(FAILED);
            }
            Outcome::Pending if Instant::now() >= deadline => {
                let waited = culvert_types::format_go_duration(HEALTHY_WITHIN);
                bail!("==> Job {id:?} is not healthy after {waited}; see `culvert job status {id}`");
            }
            Outcome::Pending => sleep(LOOK_EVERY).await,
        }
    }
}

enum Outcome {
    Pending,
    Healthy,
    Failed(String),
}

/// What was told already of the allocations of a submission.
struct Monitor {
    wanted: BTreeSet<String>,
    verbose: bool,
    /// Last word by subject.
    words: BTreeMap<String, String>,
    /// Last word on why it does not get on, by allocation.
    errors: BTreeMap<String, String>,
    /// Events told, by allocation and task.
    events: BTreeMap<(String, String), usize>,
}

impl Monitor {
    fn new(submitted: &JobSubmitted, verbose: bool) -> Self {
        let wanted = submitted.created.iter().chain(&submitted.kept).cloned().collect();
        Self { wanted, verbose, words: BTreeMap::new(), errors: BTreeMap::new(), events: BTreeMap::new() }
    }

    /// Prints what is new since the last call.
    fn tell(&mut self, status: &JobStatus, output: &mut Output<'_>) -> std::io::Result<()> {
        for allocation in status.allocations.iter().filter(|allocation| self.wanted.contains(&allocation.id)) {
            let short = short_id(&allocation.id, self.verbose);
            word(&mut self.words, format!("Allocation {short} ({})", allocation.group), &allocation.status, output)?;
            let error = allocation.error.as_ref().filter(|_| allocation.status != "failed");
            let told = self.errors.get(&allocation.id);
            if let Some(error) = error.filter(|error| told != Some(*error)) {
                let text = format!("    Allocation {short} ({}): {error}", allocation.group);
                output.line(output.paint(Colour::Yellow, text))?;
                self.errors.insert(allocation.id.clone(), error.clone());
            }
            for service in &allocation.services {
                if let Some(health) = &service.health {
                    word(&mut self.words, format!("Service {} ({short})", service.service), health, output)?;
                }
            }
            for task in &allocation.tasks {
                let told = self.events.entry((allocation.id.clone(), task.name.clone())).or_default();
                for event in task.events.iter().skip(*told) {
                    if !ORDINARY_EVENTS.contains(&event.kind.as_str()) {
                        let text = format!("    Task {} ({short}): {} {}", task.name, event.kind, event.message);
                        output.line(output.paint(Colour::Yellow, text.trim_end()))?;
                    }
                }
                *told = task.events.len();
            }
        }
        output.flush()
    }

    fn outcome(&self, status: &JobStatus) -> Outcome {
        let own: Vec<&AllocationStatus> =
            status.allocations.iter().filter(|allocation| self.wanted.contains(&allocation.id)).collect();
        if let Some(failed) = own.iter().find(|allocation| allocation.status == "failed") {
            let why = failed.error.as_deref().unwrap_or("a task failed");
            return Outcome::Failed(format!(
                "allocation {} ({}): {why}",
                short_id(&failed.id, self.verbose),
                failed.group
            ));
        }
        if status.stopped {
            return Outcome::Failed("it was stopped".to_owned());
        }
        let healthy = own.len() == self.wanted.len() && own.iter().all(|allocation| is_healthy(allocation));
        if healthy { Outcome::Healthy } else { Outcome::Pending }
    }
}

/// Tells the state of a subject when it is not what was told last.
fn word(
    told: &mut BTreeMap<String, String>,
    subject: String,
    word: &str,
    output: &mut Output<'_>,
) -> std::io::Result<()> {
    match told.get(&subject) {
        Some(before) if before == word => return Ok(()),
        Some(before) => output.line(format_args!("    {subject}: {before} -> {word}"))?,
        None => output.line(format_args!("    {subject}: {word}"))?,
    }
    told.insert(subject, word.to_owned());
    Ok(())
}

/// Everything runs, and every service passes its checks.
fn is_healthy(allocation: &AllocationStatus) -> bool {
    allocation.status == "running"
        && allocation.tasks.iter().all(|task| task.state == "running" || (task.state == "dead" && !task.failed))
        && allocation.services.iter().all(|service| service.health.as_deref() == Some("passing"))
}

async fn stop(args: &JobStopArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client: Client = client(&args.http, &session.env)?;
    let mut target = job_path(&args.job);
    if args.purge {
        target = target.with("purge", "true");
    }
    let stopped = client.call::<JobStopped>(Method::DELETE, target.as_str(), None::<&()>).await;
    let stopped = stopped.context("Error stopping job")?.stopped;
    session.output.line(format_args!("==> Job {:?} stopped: {} allocations ended", args.job, stopped.len()))?;
    Ok(OK)
}
