//! Two toolchains can build for the kernel: Debian's `rustc-web`, which carries the standard library's source, and a nightly
//! of rustup with `rust-src`. Both need `bpf-linker`. Whichever is complete is used, Debian's first; as root on Debian what
//! is missing is installed.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::command::{cache, cargo, run};
use crate::setup::{Setup, is_root};

/// Debian's packages: the compiler with its source, and what `bpf-linker` links.
const PACKAGES: [&str; 10] = [
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
    "libxml2-dev",
    "g++",
    "ca-certificates",
];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_SOURCE: &str = "/usr/lib/rustlib/src/rust/library/core";
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22";
/// Version of `bpf-linker` that matches LLVM 22.
const LINKER: &str = "bpf-linker@0.13.0";

/// Nightlies that are looked for, in this order. The first is as old as the linker's LLVM; a newer one needs a newer linker.
const NIGHTLIES: [&str; 2] = ["nightly-2026-05-19", "nightly"];

/// Which compiler.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Flavour {
    Debian,
    /// By its name in rustup.
    Nightly(&'static str),
}

/// A complete toolchain.
#[derive(Debug)]
pub(crate) struct Toolchain {
    flavour: Flavour,
    linker: PathBuf,
    sysroot: PathBuf,
    compiler_version: String,
    linker_version: String,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.compiler_version, self.linker_version)
    }
}

impl Toolchain {
    /// What to look at when it does not link, for people.
    pub(crate) fn advice(&self) -> String {
        match self.flavour {
            Flavour::Debian => String::new(),
            Flavour::Nightly(name) => format!(
                "; {} has to be built for the LLVM of that compiler (rustup run {name} rustc -vV)",
                self.linker.display()
            ),
        }
    }

    /// The compiler's root: paths below it are the same on no two machines.
    pub(crate) fn sysroot(&self) -> &Path {
        &self.sysroot
    }

    /// cargo of this toolchain, with the linker in its path and without what the calling cargo has set.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = match self.flavour {
            Flavour::Debian => {
                let mut command = Command::new(DEBIAN_CARGO);
                // The library's source can only be built with features that a stable compiler guards.
                command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
                command
            }
            Flavour::Nightly(name) => {
                let mut command = Command::new("rustup");
                command.args(["run", name, "cargo"]).env_remove("RUSTC");
                command
            }
        };
        for name in
            ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO", "CARGO_TARGET_DIR"]
        {
            command.env_remove(name);
        }
        command.env("CARGO_RESOLVER_INCOMPATIBLE_RUST_VERSIONS", "fallback").env("PATH", self.path());
        command
    }

    fn path(&self) -> OsString {
        let linker = self.linker.parent().unwrap_or(Path::new("/usr/bin"));
        let mut path = linker.as_os_str().to_owned();
        if self.flavour == Flavour::Debian {
            path.push(":/usr/bin");
        }
        if let Some(inherited) = std::env::var_os("PATH") {
            path.push(":");
            path.push(inherited);
        }
        path
    }
}

/// Finds a complete toolchain; without one installs Debian's, if that is possible and allowed.
pub(crate) fn find_or_install(setup: &Setup) -> Result<Toolchain> {
    let missing = match find() {
        Ok(toolchain) => return Ok(toolchain),
        Err(missing) => missing,
    };
    let debian = Path::new("/etc/debian_version").exists();
    if !setup.install || !debian || !is_root() {
        bail!("{missing}");
    }
    println!("{missing}\n");
    install(setup)?;
    find().map_err(|missing| anyhow::anyhow!("after the installation:\n{missing}"))
}

/// What a machine lacks, in words that can be pasted into a shell.
#[derive(Debug)]
struct Missing {
    debian: Vec<String>,
    nightly: Vec<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "no toolchain that builds for the kernel is complete. Either, as root on Debian:")?;
        for line in &self.debian {
            writeln!(f, "    {line}")?;
        }
        writeln!(f, "or, with rustup:")?;
        for line in &self.nightly {
            writeln!(f, "    {line}")?;
        }
        write!(f, "(As root on Debian, `cargo xtask ebpf` does the former by itself.)")
    }
}

fn find() -> Result<Toolchain, Missing> {
    let linker = find_linker();
    let nightly = || NIGHTLIES.into_iter().find_map(|name| Some((Flavour::Nightly(name), nightly_compiler(name)?)));
    let compiler = debian_compiler().map(|compiler| (Flavour::Debian, compiler)).or_else(nightly);
    let flavour = compiler.as_ref().map(|(flavour, _)| *flavour);
    if let (Some((flavour, (compiler_version, sysroot))), Some((linker, linker_version))) = (compiler, linker.clone()) {
        return Ok(Toolchain { flavour, linker, sysroot, compiler_version, linker_version });
    }
    let mut missing = Missing { debian: Vec::new(), nightly: Vec::new() };
    missing.debian.push(format!("apt-get install -y {}", PACKAGES.join(" ")));
    if !matches!(flavour, Some(Flavour::Nightly(_))) {
        missing.nightly.push(format!("rustup toolchain install {} --component rust-src", NIGHTLIES[0]));
    }
    if linker.is_none() {
        let build = format!("cargo install {LINKER} --no-default-features --features llvm-22");
        let root = cache().join("tools");
        missing.debian.push(format!("LLVM_PREFIX={DEBIAN_LLVM} {build} --root {}", root.display()));
        missing.nightly.push(format!("LLVM_PREFIX=<folder of LLVM 22> {build} --root {}", root.display()));
    }
    Err(missing)
}

fn debian_compiler() -> Option<(String, PathBuf)> {
    if !Path::new(DEBIAN_SOURCE).exists() || !Path::new(DEBIAN_CARGO).exists() {
        return None;
    }
    Some((output(Command::new(DEBIAN_RUSTC).arg("--version"))?, PathBuf::from("/usr/lib/rustlib/src/rust")))
}

fn nightly_compiler(name: &str) -> Option<(String, PathBuf)> {
    let rustc = |arguments: &[&str]| {
        output(Command::new("rustup").args(["run", name, "rustc"]).args(arguments).env_remove("RUSTUP_TOOLCHAIN"))
    };
    let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?);
    sysroot.join("lib/rustlib/src/rust/library/core").exists().then_some(())?;
    Some((rustc(&["--version"])?, sysroot))
}

/// The linker of our own first, then the path's.
fn find_linker() -> Option<(PathBuf, String)> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cargo_bin = std::env::home_dir().map(|home| home.join(".cargo/bin"));
    std::iter::once(cache().join("tools").join("bin"))
        .chain(std::env::split_paths(&path))
        .chain(cargo_bin)
        .map(|directory| directory.join("bpf-linker"))
        .find_map(|linker| output(Command::new(&linker).arg("--version")).map(|version| (linker, version)))
}

fn install(setup: &Setup) -> Result<()> {
    setup.packages(&PACKAGES)?;
    if find_linker().is_some() {
        return Ok(());
    }
    let mut install = cargo();
    install.args(["install", "--locked", LINKER, "--no-default-features", "--features", "llvm-22", "--root"]);
    run(install.arg(cache().join("tools")).env("LLVM_PREFIX", DEBIAN_LLVM).env_remove("CARGO_TARGET_DIR"))
}

/// What a command prints, if it can be run and succeeds.
fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_as_commands() {
        let missing =
            Missing { debian: vec!["apt-get install -y a b".into()], nightly: vec!["cargo install bpf-linker".into()] };
        let text = missing.to_string();
        assert!(text.contains("    apt-get install -y a b\n"), "{text}");
        assert!(text.contains("    cargo install bpf-linker\n"), "{text}");
    }
}
