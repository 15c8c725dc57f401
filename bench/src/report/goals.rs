//! What culvert promises (README.md, "How fast"), held against what was measured on one processor.

use std::fmt::Write as _;

use crate::compare::{Latency, Memory, Outcome, Phase};
use crate::contenders::{DIRECT, ENVOY, PROXIED};

/// One promise and what became of it.
struct Goal {
    promise: String,
    measured: String,
    holds: bool,
}

/// Direct echo: at most this multiple of plain TCP at p50.
const DIRECT_P50: f64 = 1.05;
/// A deny ends live connections within, and lets no new one begin after, so many milliseconds, p99.
const LIVE_MILLIS: f64 = 500.0;
const NEW_MILLIS: f64 = 100.0;
/// Memory of the worker: idle, and for each open connection, both its sides.
const IDLE_MEBIBYTES: f64 = 12.0;
const CONNECTION_KIBIBYTES: f64 = 8.0;

/// As a table.
pub(super) fn write(text: &mut String, phase: &Phase) -> std::fmt::Result {
    writeln!(text, "\n| goal (on one processor) | measured | |\n|---|---|---|")?;
    for Goal { promise, measured, holds } in of(phase) {
        writeln!(text, "| {promise} | {measured} | {} |", if holds { "holds" } else { "**missed**" })?;
    }
    Ok(())
}

fn of(phase: &Phase) -> Vec<Goal> {
    let mut goals = Vec::new();
    for work in ["echo 64 B", "echo 1 KiB", "echo 16 KiB"] {
        let find = |contender: &str| {
            phase.results.iter().find(|outcome| outcome.work == work && outcome.contender == contender)
        };
        if let (Some(direct), Some(proxied), Some(envoy)) = (find(DIRECT), find(PROXIED), find(ENVOY)) {
            goals.extend(direct.latency.map(|latency| near_plain(work, latency)));
            goals.extend(ahead(work, proxied, envoy));
        }
    }
    for work in ["throughput, 1 connection", "throughput, 8 connections", "new connections"] {
        let cpu = |contender: &str| {
            let outcome = phase.results.iter().find(|outcome| outcome.work == work && outcome.contender == contender);
            outcome.map(|outcome| outcome.cpu_nanos)
        };
        if let (Some(ours), Some(theirs)) = (cpu(PROXIED), cpu(ENVOY)) {
            goals.push(below(work, "for each second of CPU", ours, theirs));
        }
    }
    for Memory { idle, per_connection, .. } in phase.memory.iter().filter(|memory| memory.contender == PROXIED) {
        let (idle, each) = (*idle as f64 / 1_048_576.0, per_connection / 1024.0);
        goals.push(at_most("the worker, idle", idle, IDLE_MEBIBYTES, "MiB"));
        goals.push(at_most("the worker, for each open connection", each, CONNECTION_KIBIBYTES, "KiB"));
    }
    goals.extend(phase.intentions.iter().flat_map(|enforced| {
        let name = &enforced.contender;
        [
            within(format!("{name}: a deny ends live connections"), enforced.live_p99, LIVE_MILLIS),
            within(format!("{name}: a deny lets no new one begin"), enforced.new_p99, NEW_MILLIS),
        ]
    }));
    goals
}

fn near_plain(work: &str, latency: Latency) -> Goal {
    Goal {
        promise: format!("{DIRECT}, {work}, p50 ≤ {DIRECT_P50} × plain TCP"),
        measured: format!("{:.2}", latency.p50_ratio),
        holds: latency.p50_ratio <= DIRECT_P50,
    }
}

fn ahead(work: &str, proxied: &Outcome, envoy: &Outcome) -> Vec<Goal> {
    let goal = |what: &str, ours: f64, theirs: f64| below(work, what, ours, theirs);
    let mut goals = vec![goal("CPU for each echo", proxied.cpu_nanos, envoy.cpu_nanos)];
    if let (Some(ours), Some(theirs)) = (proxied.latency, envoy.latency) {
        // Ratios to plain TCP of the same round: what slowed a round down slowed both.
        goals.push(goal("p50", ours.p50_ratio, theirs.p50_ratio));
        goals.push(goal("p99", ours.p99_ratio, theirs.p99_ratio));
    }
    goals
}

/// The proxied path needs less of something than the pair of Envoys.
fn below(work: &str, what: &str, ours: f64, theirs: f64) -> Goal {
    Goal {
        promise: format!("{PROXIED}, {work}, {what} ahead of Envoy's"),
        measured: format!("{:.2} × what Envoy's needs", ours / theirs),
        holds: ours < theirs,
    }
}

fn at_most(what: &str, value: f64, limit: f64, unit: &str) -> Goal {
    Goal {
        promise: format!("memory of {what} ≤ {limit} {unit}"),
        measured: format!("{value:.1} {unit}"),
        holds: value <= limit,
    }
}

fn within(promise: String, millis: f64, limit: f64) -> Goal {
    Goal {
        promise: format!("{promise} after {limit} ms, p99"),
        measured: format!("{millis:.1} ms"),
        holds: millis <= limit,
    }
}
