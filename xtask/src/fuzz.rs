//! `cargo xtask fuzz`: random bytes for the parsers of outside input.

use std::process::Command;

use anyhow::Context as _;
use clap::Args;

use crate::command::{self, cache, root};
use crate::setup::Setup;

/// Drives libFuzzer; on stable, without a sanitizer: a panic, a hang or a runaway allocation is what is looked for.
const CARGO_FUZZ: &str = "0.13.2";

#[derive(Args)]
pub(crate) struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this target.
    target: Option<String>,
}

pub(crate) fn run(setup: &Setup, options: &Options) -> anyhow::Result<()> {
    let tool = setup.cargo_tool("cargo-fuzz", CARGO_FUZZ, "drives libFuzzer")?;
    let targets = match &options.target {
        Some(target) => vec![target.clone()],
        None => targets()?,
    };
    for target in targets {
        let corpus = cache().join("fuzz").join(&target);
        std::fs::create_dir_all(&corpus).with_context(|| format!("create {}", corpus.display()))?;
        let seeds = root().join("tests/fuzz/seeds").join(&target);
        let mut fuzz = Command::new(&tool);
        fuzz.current_dir(root()).args(["fuzz", "run", "-s", "none", "--fuzz-dir", "tests/fuzz", &target]).arg(corpus);
        if seeds.is_dir() {
            fuzz.arg(seeds);
        }
        let limit = format!("-max_total_time={}", options.seconds);
        command::run(fuzz.args(["--", &limit, "-timeout=10", "-rss_limit_mb=2048", "-max_len=65536", "-verbosity=0"]))?;
    }
    Ok(())
}

/// Every file of `tests/fuzz/fuzz_targets` is a target.
fn targets() -> anyhow::Result<Vec<String>> {
    let folder = root().join("tests/fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut targets: Vec<String> =
        entries.flatten().filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned())).collect();
    targets.sort();
    Ok(targets)
}
