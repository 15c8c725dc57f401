//! The only entry point for developers and CI: `cargo xtask <command>`.
//!
//! Each command sets itself up: it checks what it needs, installs what is missing as root on Debian (saying what and why), and
//! with `--no-install` only checks.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command-line tool talks on standard output")]

mod arrows;
mod bench;
mod command;
mod demo;
mod ebpf;
mod fuzz;
mod lint;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, check and run culvert", disable_help_subcommand = true)]
struct Arguments {
    /// Only check what is needed; install nothing.
    #[arg(long, global = true)]
    no_install: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel object from ebpf/ and put it, with the hash of its sources, where the agent embeds it.
    Ebpf(ebpf::Options),
    /// Format, clippy, dependency policy and the direction of crate arrows.
    Lint,
    /// Everything that can fail: units, properties, network namespaces, eBPF, real Envoy, a real browser.
    Test(test::Options),
    /// The main job: two workloads, one mesh, an intention that cuts it off.
    Demo(demo::Options),
    /// Plain TCP, culvert's paths and a pair of Envoys side by side: latency, throughput, processor time, memory.
    Bench(bench::Options),
    /// Feed the parsers of outside input with random bytes.
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let setup = setup::Setup { install: !arguments.no_install };
    let result = match arguments.command {
        Command::Ebpf(options) => ebpf::run(&setup, &options),
        Command::Lint => lint::run(&setup),
        Command::Test(options) => test::run(&setup, &options),
        Command::Demo(options) => demo::run(&setup, &options),
        Command::Bench(options) => bench::run(&setup, &options),
        Command::Fuzz(options) => fuzz::run(&setup, &options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
