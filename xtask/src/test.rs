//! `cargo xtask test`: prerequisites, then everything, by nextest.

use clap::Args;

use crate::command::{self, cargo};
use crate::ebpf;
use crate::setup::{CHROMEDRIVER, CHROMIUM, IP, NFT, Setup, require_root};

/// Runs each test in a process of its own, so that namespaces and working directories do not mix.
const NEXTEST: &str = "0.9.143";
/// The Envoy that our xDS server is tested with.
pub(crate) const ENVOY: &str = "1.40.0";

#[derive(Args)]
pub(crate) struct Options {
    /// Build the kernel object from its sources first; always done where `CI` is set.
    #[arg(long)]
    fresh_kernel_object: bool,
    /// Passed on to nextest: a filter, `-p <crate>`, …
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    nextest: Vec<String>,
}

pub(crate) fn run(setup: &Setup, options: &Options) -> anyhow::Result<()> {
    require_root(
        "the tests (all but those that CONTRIBUTING.md names) make network namespaces, cgroups and eBPF programs",
        "test",
    )?;
    setup.programs(&[&IP, &NFT, &CHROMIUM, &CHROMEDRIVER])?;
    setup.cargo_tool("cargo-nextest", NEXTEST, "runs each test in a process of its own")?;
    let envoy = setup.envoy(ENVOY)?;
    if options.fresh_kernel_object || std::env::var_os("CI").is_some() {
        ebpf::refresh(setup)?;
    }
    // End-to-end tests start the real binaries.
    command::run(cargo().args(["build", "--workspace", "--bins", "--quiet"]))?;
    command::run(cargo().args(["nextest", "run", "--workspace"]).args(&options.nextest).env("CULVERT_ENVOY", envoy))
}
