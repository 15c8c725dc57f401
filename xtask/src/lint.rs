//! `cargo xtask lint`.

use std::process::Command;

use crate::command::{self, cargo, root};
use crate::setup::Setup;
use crate::{arrows, ebpf};

/// Checks licences and sources of dependencies.
const CARGO_DENY: &str = "0.20.2";

pub(crate) fn run(setup: &Setup) -> anyhow::Result<()> {
    run_fmt()?;
    arrows::check()?;
    ebpf::verify()?;
    let deny = setup.cargo_tool("cargo-deny", CARGO_DENY, "licences and sources of dependencies")?;
    // Advisories need a database from elsewhere; what is checked here works offline.
    command::run(Command::new(deny).current_dir(root()).args([
        "--log-level=error",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    command::run(cargo().args(clippy))
}

fn run_fmt() -> anyhow::Result<()> {
    command::run(cargo().args(["fmt", "--all", "--check"]))?;
    for outside in ["ebpf/programs", "tests/fuzz"] {
        let manifest = root().join(outside).join("Cargo.toml");
        command::run(cargo().args(["fmt", "--check", "--manifest-path"]).arg(manifest))?;
    }
    Ok(())
}
