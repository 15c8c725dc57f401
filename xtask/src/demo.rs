//! `cargo xtask demo`: the main job on this node, and the proof of what it claims.

mod agent;
mod check;
mod interrupt;
/// The one of the end-to-end tests.
#[path = "../../tests/src/sniff.rs"]
#[expect(unreachable_pub, reason = "public there")]
mod sniff;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;

use crate::command::{self, cargo, root};
use crate::setup::{IP, NFT, Setup, require_root};
use agent::Demo;

/// Where the dashboard is published.
const DASHBOARD: &str = "127.0.0.1:9002";
/// Where the programs run from when the workspace lies below /tmp.
const OUTSIDE: &str = "/run/culvert-demo";
/// How long the main job may take until the first count.
const FIRST_COUNT: Duration = Duration::from_secs(90);
/// Lines of `culvert observe` that are shown: its heading, and an open and a close by each side.
const OBSERVED: usize = 5;

#[derive(Args)]
pub(crate) struct Options {
    /// Unattended: prove each claim, then remove everything.
    #[arg(long)]
    check: bool,
    /// Build with optimisation.
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(setup: &Setup, options: &Options) -> anyhow::Result<()> {
    require_root("the demo makes network namespaces, a bridge, cgroups, nftables rules and eBPF programs", "demo")?;
    setup.programs(&[&IP, &NFT])?;
    let bin = build(options.release)?;
    interrupt::remember()?;
    let demo = Demo::start(&bin)?;
    let mut processes = Vec::new();
    let job = root().join("examples/countdash.nomad.hcl");
    let result = demo.wait_served().and_then(|()| demo.run_job(&bin, &job)).and_then(|()| {
        let count = demo.wait_connected(FIRST_COUNT)?;
        println!("\nthe dashboard counts: {count}");
        processes = check::processes(&demo)?;
        explain(&demo)?;
        if options.check { check::prove(&demo) } else { demo.wait_for_interrupt() }
    });
    let left = demo.leave();
    if bin == Path::new(OUTSIDE) {
        std::fs::remove_dir_all(OUTSIDE)?;
    }
    result?;
    left?;
    check::nothing_left(&processes)?;
    if options.check {
        println!("\ndemo: every claim holds");
    }
    Ok(())
}

fn build(release: bool) -> anyhow::Result<PathBuf> {
    let mut build = cargo();
    // As `cargo xtask test` builds them: of a part alone, dependencies would be built again with other features.
    build.args(["build", "--quiet", "--workspace", "--bins"]);
    if release {
        build.arg("--release");
    }
    command::run(&mut build)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let bin = target.join(if release { "release" } else { "debug" });
    let bin = bin.canonicalize().with_context(|| format!("{}", bin.display()))?;
    if !bin.starts_with("/tmp") {
        return Ok(bin);
    }
    // A sandboxed task has a /tmp of its own and does not see the workspace's.
    let outside = PathBuf::from(OUTSIDE);
    std::fs::create_dir_all(&outside)?;
    for program in ["culvert", "counter-api", "counter-dashboard"] {
        std::fs::copy(bin.join(program), outside.join(program)).with_context(|| format!("copy {program}"))?;
    }
    Ok(outside)
}

fn explain(demo: &Demo) -> anyhow::Result<()> {
    let job = demo.culvert(&["job", "status", "countdash"])?;
    for service in ["count-api", "count-dashboard"] {
        let identity = job.lines().any(|line| line.contains("spiffe://") && line.contains(&format!("/svc/{service}")));
        ensure!(identity, "the job's status does not show the identity of {service}:\n{job}");
    }
    println!("{job}");
    println!("{}", demo.culvert(&["status"])?);
    println!("the connections of the next seconds, and the path each takes:");
    demo.observe(OBSERVED, FIRST_COUNT)?;
    let culvert = demo.binary().display();
    println!("\nopen http://{DASHBOARD} and try, in another terminal:");
    println!("  {culvert} observe");
    println!("  {culvert} intention create -deny count-dashboard count-api      # the dashboard disconnects");
    println!("  {culvert} intention create -replace -allow count-dashboard count-api   # and recovers");
    println!(
        "  echo 'encryption = \"between-nodes\"' > {} && {culvert} reload   # direct path, lower round trip",
        demo.settings().display()
    );
    println!("  {culvert} job status countdash");
    println!("Ctrl-C ends the demo and removes everything.");
    Ok(())
}

/// Does any of `names` exist below `folder`?
fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))).collect()
}
