//! The load generator of the bench: an echo server, and a client that measures one path to it.
//!
//! Both run wherever they are started, for example as tasks of a job on both sides of the mesh. The contenders that take
//! turns between the same two network namespaces are not built yet.

#![forbid(unsafe_code)]

mod load;

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use load::{Measured, Work};

#[derive(Parser)]
#[command(name = "culvert-bench", about = "Measures one path: echo, throughput, new connections")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
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
}

fn main() -> anyhow::Result<()> {
    let mut held = Vec::new();
    let (target, work) = match Arguments::parse().command {
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
    };
    print(&load::work(target, work, &mut held)?)
}

/// One JSON object: how much, how long, and quantiles in nanoseconds where single durations were measured.
fn print(measured: &Measured) -> anyhow::Result<()> {
    let quantile = |q: f64| measured.quantile(q);
    let report = serde_json::json!({
        "count": measured.count, "nanos": measured.nanos,
        "p50": quantile(0.5), "p99": quantile(0.99), "p999": quantile(0.999),
    });
    writeln!(std::io::stdout(), "{report}").context("write the report")
}
