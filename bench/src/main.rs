//! The bench: a load generator that measures one path, and the comparison of all paths with it.
//!
//! `cargo xtask bench` builds and calls it. README.md beside this folder says how to read the figures.

#![forbid(unsafe_code)]

mod compare;
mod contenders;
mod intentions;
mod load;
mod place;
mod probe;
mod report;
mod usage;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Parser, Subcommand};

use compare::{Extent, Phase, Sample};
use load::{Measured, Work};
use place::Place;
use report::Report;

#[derive(Parser)]
#[command(name = "culvert-bench", about = "Measures paths: echo, throughput, new connections, memory")]
struct Arguments {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: Command,
}

/// What the comparison needs to know.
#[derive(Args, Clone)]
struct Comparison {
    /// Envoy's binary.
    #[arg(long)]
    envoy: PathBuf,
    /// Rounds; every contender has its turn in each. A multiple of eight gives everybody every place.
    #[arg(long, default_value_t = 8)]
    rounds: usize,
    /// Length of one turn, in milliseconds.
    #[arg(long, default_value_t = 500)]
    millis: u64,
    /// Connections held open to measure memory.
    #[arg(long, default_value_t = 1000)]
    held: usize,
    /// How often an intention is turned to deny on each path of culvert.
    #[arg(long, default_value_t = 100)]
    flips: usize,
}

#[derive(Subcommand)]
enum Command {
    /// Serves echo, sink and idle connections.
    Serve {
        /// Where to listen.
        #[arg(required = true)]
        addresses: Vec<SocketAddr>,
    },
    /// Round trips of one message on one connection.
    Echo {
        target: SocketAddr,
        /// Bytes of the message.
        #[arg(long, default_value_t = 64)]
        size: usize,
        /// How long, in milliseconds.
        #[arg(long, default_value_t = 2000)]
        millis: u64,
    },
    /// Bytes one way.
    Throughput {
        target: SocketAddr,
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[arg(long, default_value_t = 2000)]
        millis: u64,
    },
    /// New connections, one byte out and back on each.
    Connect {
        target: SocketAddr,
        #[arg(long, default_value_t = 2000)]
        millis: u64,
    },
    /// Opens connections and keeps them idle for a while.
    Hold {
        target: SocketAddr,
        #[arg(long, default_value_t = 100)]
        connections: usize,
        #[arg(long, default_value_t = 10_000)]
        millis: u64,
    },
    /// Watches a live connection and new ones while an intention changes.
    Probe { target: SocketAddr },
    /// Compares all contenders, on one processor and on all; prints a table, writes JSON and a chart.
    Compare {
        #[command(flatten)]
        comparison: Comparison,
        /// Folder for `bench.json` and `bench.svg`.
        #[arg(long)]
        out: PathBuf,
    },
    /// One condition of the comparison; prints JSON.
    #[command(hide = true)]
    Phase {
        #[command(flatten)]
        comparison: Comparison,
        #[arg(long)]
        pinned: bool,
    },
}

fn main() -> anyhow::Result<()> {
    let Arguments { place, command } = Arguments::parse();
    place.enter()?;
    let mut held = Vec::new();
    let (target, work) = match command {
        Command::Serve { addresses } => return load::serve(&addresses),
        Command::Echo { target, size, millis } => (target, Work::Echo { size, millis }),
        Command::Throughput { target, connections, millis } => (target, Work::Throughput { connections, millis }),
        Command::Connect { target, millis } => (target, Work::Connect { millis }),
        Command::Hold { target, connections, millis } => {
            let measured = load::work(target, Work::Hold { connections }, &mut held)?;
            print(&measured)?;
            std::thread::sleep(Duration::from_millis(millis));
            return Ok(());
        }
        Command::Probe { target } => return probe::run(target),
        Command::Phase { comparison, pinned } => {
            let phase = compare::run(&comparison.envoy.clone(), pinned, comparison.into())?;
            return write_line(&serde_json::to_string(&phase)?);
        }
        Command::Compare { comparison, out } => {
            let phases = [true, false].map(|pinned| phase(&comparison, pinned));
            let report = Report::new(phases.into_iter().collect::<anyhow::Result<_>>()?, comparison.into());
            report.write(&out)?;
            return write_line(&report.table());
        }
    };
    print(&load::work(target, work, &mut held)?)
}

/// A phase in a process of its own: its processors and namespaces are its children's, and end with it.
fn phase(comparison: &Comparison, pinned: bool) -> anyhow::Result<Phase> {
    let Comparison { envoy, rounds, millis, held, flips } = comparison;
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.arg("phase").arg("--envoy").arg(envoy).stdout(Stdio::piped());
    command.args([format!("--rounds={rounds}"), format!("--millis={millis}")]);
    command.args([format!("--held={held}"), format!("--flips={flips}")]);
    if pinned {
        command.arg("--pinned");
    }
    let output = command.spawn()?.wait_with_output()?;
    ensure!(output.status.success(), "the comparison ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("what the comparison printed")
}

/// One JSON object: how much, how long, and quantiles in nanoseconds where single durations were measured.
fn print(measured: &Measured) -> anyhow::Result<()> {
    let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| measured.quantile(q));
    let sample = Sample { count: measured.count, nanos: measured.nanos, p50, p99, p999, cpu: 0 };
    write_line(&serde_json::to_string(&sample)?)
}

fn write_line(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("write to standard output")
}

impl From<Comparison> for Extent {
    fn from(Comparison { rounds, millis, held, flips, .. }: Comparison) -> Self {
        Self { rounds, millis, held, flips }
    }
}
