//! `cargo xtask bench`: all paths side by side, with a real Envoy among them.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use crate::command::{self, cache, cargo, root};
use crate::setup::{IP, NFT, Setup, require_root};
use crate::test::ENVOY;

#[derive(Args)]
pub(crate) struct Options {
    /// Fewer and shorter rounds: for a look, not for publication.
    #[arg(long)]
    quick: bool,
    /// Folder for bench.json and bench.svg; without it .cache/bench.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Passed on, after `--`: `--rounds`, `--millis`, `--held`, `--flips`.
    #[arg(last = true)]
    extent: Vec<String>,
}

pub(crate) fn run(setup: &Setup, options: &Options) -> anyhow::Result<()> {
    require_root("the bench makes network namespaces, cgroups and eBPF programs", "bench")?;
    setup.programs(&[&IP, &NFT])?;
    let envoy = setup.envoy(ENVOY)?;
    command::run(cargo().args(["build", "--release", "--quiet", "-p", "culvert-agent", "-p", "culvert-bench"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let mut bench = Command::new(target.join("release/culvert-bench"));
    bench.current_dir(root()).arg("compare").arg("--envoy").arg(envoy);
    if options.quick {
        bench.args(["--rounds=4", "--millis=300", "--held=200", "--flips=20"]);
    }
    bench.args(&options.extent);
    let out = options.out.clone().unwrap_or_else(|| cache().join("bench"));
    command::run(bench.arg("--out").arg(&out))?;
    println!("wrote {}", out.join("bench.{json,svg}").display());
    Ok(())
}
