//! The comparison: in each round every contender does the same piece of work, one after the other, so that whatever the machine
//! does meanwhile happens to all. Ratios are formed within a round; what is reported is the median over the rounds.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use culvert_tests::World;
use serde::{Deserialize, Serialize};

use crate::contenders::{BASE, Contender, Contenders, Running};
use crate::intentions::{self, Enforcement};
use crate::usage;

/// What is measured of each contender.
const WORKS: [Task; 6] = [
    Task { name: "echo 64 B", arguments: &["echo", "--size", "64"] },
    Task { name: "echo 1 KiB", arguments: &["echo", "--size", "1024"] },
    Task { name: "echo 16 KiB", arguments: &["echo", "--size", "16384"] },
    Task { name: "throughput, 1 connection", arguments: &["throughput", "--connections", "1"] },
    Task { name: "throughput, 8 connections", arguments: &["throughput", "--connections", "8"] },
    Task { name: "new connections", arguments: &["connect"] },
];

/// A piece of work of the load generator.
struct Task {
    name: &'static str,
    arguments: &'static [&'static str],
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Rounds.
    pub(crate) rounds: usize,
    /// Length of one piece of work, in milliseconds.
    pub(crate) millis: u64,
    /// Connections that are held open to measure memory.
    pub(crate) held: usize,
    /// How often an intention is turned on each path of culvert.
    pub(crate) flips: usize,
}

/// All contenders under one condition.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Phase {
    /// Everything on one processor?
    pub(crate) pinned: bool,
    /// As measured, in the order of reports.
    pub(crate) results: Vec<Outcome>,
    /// Of those contenders that hold connections.
    pub(crate) memory: Vec<Memory>,
    /// Of culvert's paths.
    pub(crate) intentions: Vec<Enforcement>,
}

/// One contender at one piece of work: medians over the rounds.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Outcome {
    pub(crate) contender: String,
    pub(crate) work: String,
    /// Round trips, bytes or connections per second, and as a multiple of plain TCP's in the same round.
    pub(crate) rate: f64,
    pub(crate) rate_ratio: f64,
    /// Quantiles of single durations, where there are any.
    pub(crate) latency: Option<Latency>,
    /// Processor time of the proxies for each round trip, byte or connection, in nanoseconds.
    pub(crate) cpu_nanos: f64,
}

/// Microseconds, and multiples of plain TCP's in the same round.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) p50_ratio: f64,
    pub(crate) p99_ratio: f64,
    pub(crate) p999_ratio: f64,
}

/// Resident memory of those that hold a contender's connections.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Memory {
    pub(crate) contender: String,
    /// Bytes before the first connection.
    pub(crate) idle: u64,
    /// Connections held at once.
    pub(crate) connections: usize,
    /// Bytes for each of them.
    pub(crate) per_connection: f64,
}

/// What the load generator prints.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Sample {
    /// Round trips, bytes or connections.
    pub(crate) count: u64,
    /// How long it took.
    pub(crate) nanos: u64,
    /// Quantiles in nanoseconds.
    pub(crate) p50: Option<u64>,
    pub(crate) p99: Option<u64>,
    pub(crate) p999: Option<u64>,
    /// Processor time of the proxies meanwhile.
    #[serde(default)]
    pub(crate) cpu: u64,
}

/// Starts everything, measures, removes everything.
pub(crate) fn run(envoy: &Path, pinned: bool, extent: Extent) -> anyhow::Result<Phase> {
    let concurrency = if pinned {
        crate::place::pin()?;
        1
    } else {
        std::thread::available_parallelism()?.get()
    };
    let world = World::new("bench");
    let contenders = Contenders::start(&world, envoy, concurrency)?;
    // Before anything else, since memory that was used once may be kept.
    let memory = contenders.all.iter().filter(|contender| !contender.holders.is_empty());
    let memory = memory.map(|contender| hold(contender, extent.held)).collect::<anyhow::Result<Vec<_>>>()?;
    contenders.verify()?;
    let mut results = Vec::new();
    for task in &WORKS {
        let rounds = (0..extent.rounds).map(|round| take_turns(&contenders, task, round, extent.millis));
        let rounds = rounds.collect::<anyhow::Result<Vec<_>>>()?;
        results.extend(contenders.all.iter().enumerate().map(|(at, contender)| outcome(contender, task, at, &rounds)));
    }
    let intentions = contenders.all.iter().filter_map(|contender| Some((contender, contender.service?)));
    let intentions = intentions.map(|(contender, service)| intentions::measure(contender, service, extent.flips));
    let intentions = intentions.collect::<anyhow::Result<Vec<_>>>()?;
    contenders.leave();
    Ok(Phase { pinned, results, memory, intentions })
}

/// Pause before each turn: what the turn before left behind, connections that end and buffers that empty, is over by then.
const PAUSE: Duration = Duration::from_millis(200);

/// One round: a sample of each contender, in the order of `contenders.all`. Each round begins with another one, and every other
/// one goes backwards, so that nobody always follows the same neighbour.
fn take_turns(contenders: &Contenders, task: &Task, round: usize, millis: u64) -> anyhow::Result<Vec<Sample>> {
    let count = contenders.all.len();
    let mut samples = vec![None; count];
    for turn in 0..count {
        let turn = if round.is_multiple_of(2) { turn } else { count - 1 - turn };
        let at = (round + turn) % count;
        std::thread::sleep(PAUSE);
        samples[at] = Some(sample(&contenders.all[at], task, millis)?);
    }
    Ok(samples.into_iter().flatten().collect())
}

fn sample(contender: &Contender, task: &Task, millis: u64) -> anyhow::Result<Sample> {
    let (target, millis) = (contender.target.to_string(), millis.to_string());
    let arguments = [task.arguments, &["--millis", &millis, &target]].concat();
    let before = usage::cpu_nanos(&contender.processes)?;
    let output = Running::own_command(&contender.place, &arguments)?.stderr(Stdio::inherit()).output()?;
    let cpu = usage::cpu_nanos(&contender.processes)?.saturating_sub(before);
    ensure!(output.status.success(), "{} through {} failed: {}", task.name, contender.name, output.status);
    let sample: Sample = serde_json::from_slice(&output.stdout).context("what the load generator printed")?;
    ensure!(sample.count > 0, "{} through {}: nothing came through", task.name, contender.name);
    Ok(Sample { cpu, ..sample })
}

/// Holds connections open and looks at the memory.
fn hold(contender: &Contender, connections: usize) -> anyhow::Result<Memory> {
    let idle = usage::resident(&contender.holders)?;
    let (target, count) = (contender.target.to_string(), connections.to_string());
    let arguments = ["hold", &target, "--connections", &count, "--millis", "600000"];
    let mut command = Running::own_command(&contender.place, &arguments)?;
    let mut holder = command.stdout(Stdio::piped()).spawn().context("start the load generator")?;
    let mut line = String::new();
    let output = holder.stdout.take().context("its output")?;
    BufReader::new(output).read_line(&mut line)?;
    // The far end of the last connections may still be at work.
    std::thread::sleep(Duration::from_millis(500));
    let busy = usage::resident(&contender.holders);
    holder.kill()?;
    holder.wait()?;
    let sample: Sample =
        serde_json::from_str(&line).with_context(|| format!("{connections} connections through {}", contender.name))?;
    ensure!(sample.count == connections as u64, "{} of {connections} connections are open", sample.count);
    let per_connection = busy?.saturating_sub(idle) as f64 / connections as f64;
    Ok(Memory { contender: contender.name.to_owned(), idle, connections, per_connection })
}

fn outcome(contender: &Contender, task: &Task, at: usize, rounds: &[Vec<Sample>]) -> Outcome {
    let own = |of: &dyn Fn(&Sample) -> f64| median(rounds.iter().map(|round| of(&round[at])));
    let ratio = |of: &dyn Fn(&Sample) -> f64| median(rounds.iter().map(|round| of(&round[at]) / of(&round[0])));
    let rate = |sample: &Sample| sample.count as f64 * 1e9 / sample.nanos as f64;
    let (p50, p99, p999) =
        (quantile(|sample| sample.p50), quantile(|sample| sample.p99), quantile(|sample| sample.p999));
    let latency = rounds.iter().all(|round| round[at].p50.is_some()).then(|| Latency {
        p50: own(&p50),
        p99: own(&p99),
        p999: own(&p999),
        p50_ratio: ratio(&p50),
        p99_ratio: ratio(&p99),
        p999_ratio: ratio(&p999),
    });
    Outcome {
        contender: contender.name.to_owned(),
        work: task.name.to_owned(),
        rate: own(&rate),
        rate_ratio: ratio(&rate),
        latency,
        cpu_nanos: own(&|sample| sample.cpu as f64 / sample.count as f64),
    }
}

/// A quantile in microseconds; never 0, which would make a ratio of it senseless.
fn quantile(of: impl Fn(&Sample) -> Option<u64>) -> impl Fn(&Sample) -> f64 {
    move |sample| of(sample).unwrap_or_default().max(1) as f64 / 1000.0
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    percentile(&mut values.collect::<Vec<_>>(), 0.5)
}

/// The value that a share `q` of `values` does not exceed; 0 of none.
pub(crate) fn percentile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * q).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// The contender that ratios refer to stands first in every round.
pub(crate) fn is_base(contender: &str) -> bool {
    contender == BASE
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn a_share_of_the_values_does_not_exceed_its_percentile() {
        let mut values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let of =
            |values: &mut [f64], q, expected: f64| assert!((percentile(values, q) - expected).abs() < f64::EPSILON);
        of(&mut values, 0.5, 50.0);
        of(&mut values, 0.99, 99.0);
        of(&mut values[..1], 0.99, 1.0);
        of(&mut [], 0.5, 0.0);
    }
}
