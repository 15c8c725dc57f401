//! What a comparison found: as a table, as JSON, as a chart.

mod chart;
mod goals;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::compare::{Extent, Memory, Outcome, Phase, is_base};
use crate::intentions::Enforcement;

/// A whole comparison, as it is written to `bench.json`.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    /// What was compared: version of this program, revision of its sources, kernel, processors.
    pub(crate) culvert: String,
    #[serde(default)]
    pub(crate) revision: Option<String>,
    pub(crate) kernel: String,
    pub(crate) processors: usize,
    pub(crate) rounds: usize,
    /// Length of one turn.
    pub(crate) millis: u64,
    pub(crate) phases: Vec<Phase>,
}

impl Report {
    pub(crate) fn new(phases: Vec<Phase>, extent: Extent) -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        // The release's third number and what distributions add say nothing about the path.
        let kernel = kernel.split('.').take(2).collect::<Vec<_>>().join(".");
        Self {
            culvert: env!("CARGO_PKG_VERSION").to_owned(),
            revision: revision(),
            kernel,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            rounds: extent.rounds,
            millis: extent.millis,
            phases,
        }
    }

    /// Writes `bench.json` and `bench.svg` into `folder`.
    pub(crate) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        for (name, text) in [("bench.json", json), ("bench.svg", chart::draw(self))] {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }

    /// For people, in Markdown.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        for phase in &self.phases {
            write_phase(&mut text, phase, self.processors).expect("writing to a string cannot fail");
        }
        if let Some(pinned) = self.phases.iter().find(|phase| phase.pinned) {
            goals::write(&mut text, pinned).expect("writing to a string cannot fail");
        }
        let Self { culvert, revision, kernel, rounds, millis, .. } = self;
        let revision = revision.as_ref().map(|revision| format!(" ({revision})")).unwrap_or_default();
        text + &format!(
            "\nculvert {culvert}{revision}, Linux {kernel}. Medians of {rounds} rounds; in each, every contender works {millis} ms. \
             In brackets: multiple of plain TCP in the same round.\n"
        )
    }
}

/// What git calls the sources, if it knows them; of changed ones it says so.
fn revision() -> Option<String> {
    let git = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output().ok()?;
    git.status.success().then(|| String::from_utf8_lossy(&git.stdout).trim().to_owned())
}

fn write_phase(text: &mut String, phase: &Phase, processors: usize) -> std::fmt::Result {
    let place =
        if phase.pinned { "everything on one processor".to_owned() } else { format!("{processors} processors") };
    writeln!(text, "\n### {place}\n")?;
    writeln!(text, "| | | p50 µs | p99 µs | p99.9 µs | per second | proxies' CPU |")?;
    writeln!(text, "|---|---|---|---|---|---|---|")?;
    let mut last = "";
    for outcome in &phase.results {
        let work = if outcome.work == last { "" } else { &outcome.work };
        last = &outcome.work;
        let [p50, p99, p999] = latency_cells(outcome);
        let (rate, cpu) = (rate_cell(outcome), cpu_cell(outcome));
        writeln!(text, "| {work} | {} | {p50} | {p99} | {p999} | {rate} | {cpu} |", outcome.contender)?;
    }
    writeln!(text, "\n| memory | idle | per open connection |\n|---|---|---|")?;
    for Memory { contender, idle, connections, per_connection } in &phase.memory {
        let (idle, each) = (*idle as f64 / 1048576.0, per_connection / 1024.0);
        writeln!(text, "| {contender} | {idle:.1} MiB | {each:.1} KiB (of {connections}) |")?;
    }
    writeln!(text, "\n| a deny is enforced after | live connections p50, p99 | new ones p50, p99 |\n|---|---|---|")?;
    for Enforcement { contender, flips, live_p50, live_p99, new_p50, new_p99 } in &phase.intentions {
        write!(text, "| {contender}, {flips} times ")?;
        writeln!(text, "| {live_p50:.1} ms, {live_p99:.1} ms | {new_p50:.1} ms, {new_p99:.1} ms |")?;
    }
    Ok(())
}

fn latency_cells(outcome: &Outcome) -> [String; 3] {
    let Some(latency) = outcome.latency else { return ["", "", ""].map(str::to_owned) };
    let cell = |value: f64, ratio: f64| with_ratio(format!("{value:.1}"), ratio, outcome);
    [cell(latency.p50, latency.p50_ratio), cell(latency.p99, latency.p99_ratio), cell(latency.p999, latency.p999_ratio)]
}

fn rate_cell(outcome: &Outcome) -> String {
    let value =
        if is_throughput(outcome) { format!("{:.2} GB", outcome.rate / 1e9) } else { format!("{:.0}", outcome.rate) };
    with_ratio(value, outcome.rate_ratio, outcome)
}

fn cpu_cell(outcome: &Outcome) -> String {
    if outcome.cpu_nanos == 0.0 {
        return String::new();
    }
    if is_throughput(outcome) {
        return format!("{:.2} s per GB", outcome.cpu_nanos);
    }
    format!("{:.1} µs", outcome.cpu_nanos / 1000.0)
}

fn with_ratio(value: String, ratio: f64, outcome: &Outcome) -> String {
    if is_base(&outcome.contender) { value } else { format!("{value} ({ratio:.2})") }
}

/// Counted in bytes?
pub(super) fn is_throughput(outcome: &Outcome) -> bool {
    outcome.work.starts_with("throughput")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each table, paragraph and heading of the report is a block of its own.
    #[test]
    fn the_readme_shows_the_report_that_is_published() {
        let report: Report = serde_json::from_str(include_str!("../../../docs/bench/bench.json")).expect("a report");
        let readme = include_str!("../../../README.md");
        for block in report.table().trim().split("\n\n") {
            assert!(readme.contains(block), "README.md lacks:\n{block}");
        }
        assert_eq!(
            include_str!("../../../docs/bench/bench.svg"),
            chart::draw(&report),
            "the chart is of another report"
        );
    }
}
