//! `cargo xtask ebpf`: the kernel object, from `ebpf/programs` to `agent/src/datapath/culvert.bpf.o`.
//!
//! The built object is kept in the tree beside the hash of its sources, so that whoever only uses culvert needs neither of the
//! toolchains that build it. `--check` builds without touching the tree and says whether the two still belong together.

mod sources;
mod strip;
mod toolchain;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use self::sources::Record;
pub(crate) use self::sources::verify;
use self::toolchain::Toolchain;
use crate::command::root;
use crate::setup::Setup;

/// Target triple of the kernel's virtual machine, little endian.
const TARGET: &str = "bpfel-unknown-none";

/// Options of `cargo xtask ebpf`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Build aside, and compare with what is in the tree.
    #[arg(long)]
    check: bool,
}

/// Builds the object and puts it into the tree: what is tested then is fresh. Whether the tree's own belonged to its
/// sources cannot be seen afterwards: [`verify`] looks before, as a part of `lint`.
pub(crate) fn refresh(setup: &Setup) -> Result<()> {
    run(setup, &Options { check: false })
}

/// Builds the object.
pub(crate) fn run(setup: &Setup, options: &Options) -> Result<()> {
    let toolchain = toolchain::find_or_install(setup)?;
    println!("toolchain: {toolchain}");
    let fresh = build(&toolchain)?;
    let record =
        Record { sources: sources::hash()?, object: sources::hash_bytes(&fresh), toolchain: toolchain.to_string() };
    if options.check { check(&fresh, &record) } else { install(&fresh, &record) }
}

/// Runs cargo for the kernel's target and returns the object without its debugging sections.
fn build(toolchain: &Toolchain) -> Result<Vec<u8>> {
    let programs = root().join("ebpf/programs");
    let target = root().join("target/bpf");
    let mut cargo: Command = toolchain.cargo();
    cargo
        .current_dir(&programs)
        .args(["build", "--release", "--locked", "--target", TARGET, "-Zbuild-std=core", "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(toolchain).join("\u{1f}"));
    let status = cargo.status().with_context(|| format!("run {cargo:?}"))?;
    ensure!(status.success(), "the kernel programs are not built ({status}){}", toolchain.advice());
    let built = target.join(TARGET).join("release/culvert-ebpf");
    let object = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    strip::strip_debug(&object).with_context(|| format!("strip {}", built.display()))
}

/// Type information for the kernel (BTF) is made from debug information; its paths must not depend on the machine.
fn rustflags(toolchain: &Toolchain) -> Vec<String> {
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let mut flags = vec!["-Cdebuginfo=2".to_owned(), "-Clink-arg=--btf".to_owned(), remap(&root(), "culvert")];
    flags.extend(cargo_home.iter().map(|home| remap(home, "cargo")));
    // Each registry's folder is named after its host; the last matching prefix wins.
    let registries =
        cargo_home.into_iter().flat_map(|home| fs::read_dir(home.join("registry/src")).into_iter().flatten());
    flags.extend(registries.flatten().map(|registry| remap(&registry.path(), "crates")));
    flags.push(remap(toolchain.sysroot(), "rust"));
    flags
}

/// Puts object and record into the tree.
fn install(object: &[u8], record: &Record) -> Result<()> {
    let path = sources::object_path();
    fs::write(&path, object).with_context(|| format!("write {}", path.display()))?;
    record.write()?;
    println!("wrote {} ({} bytes) and its hashes", path.display(), object.len());
    Ok(())
}

/// Compares a fresh build with the tree.
fn check(fresh: &[u8], record: &Record) -> Result<()> {
    let aside = root().join("target/bpf/culvert.bpf.o");
    fs::write(&aside, fresh).with_context(|| format!("write {}", aside.display()))?;
    println!("built {} ({} bytes)", aside.display(), fresh.len());
    let kept = Record::read()?;
    if kept.sources != record.sources {
        bail!("the object in the tree was built from other sources; run `cargo xtask ebpf` and commit the result");
    }
    println!("sources: same as those of the object in the tree");
    let tree = fs::read(sources::object_path()).context("read the object in the tree")?;
    match (without_hash(&tree) == without_hash(fresh), kept.toolchain == record.toolchain) {
        (true, _) => println!("object: identical"),
        (false, false) => println!("object: differs, as the toolchain does (the tree's: {})", kept.toolchain),
        (false, true) => bail!(
            "the same toolchain makes another object from the same sources: the object in the tree is not what it claims to be; \
             run `cargo xtask ebpf` and commit the result"
        ),
    }
    Ok(())
}

/// The object without what the compiler makes of the folder that the crate lies in: the hash that stands before the crate's
/// name in a symbol (`Cs<hash>_12culvert_ebpf`).
fn without_hash(object: &[u8]) -> Vec<u8> {
    const NAME: &[u8] = b"_12culvert_ebpf";
    let mut object = object.to_vec();
    let ends: Vec<usize> =
        object.windows(NAME.len()).enumerate().filter_map(|(at, name)| (name == NAME).then_some(at)).collect();
    for end in ends {
        let hash = object[..end].iter().rposition(|byte| !byte.is_ascii_alphanumeric()).map_or(0, |at| at + 1);
        object[hash..end].fill(b'.');
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_makes_no_other_object() {
        let [here, there] =
            [b"\0_RNvCsbIvo31yj04Y_12culvert_ebpf7connect\0", b"\0_RNvCs9q2SdMCnF4Y_12culvert_ebpf7connect\0"];
        assert_eq!(without_hash(here), without_hash(there));
        assert_ne!(without_hash(here), without_hash(b"\0_RNvCs9q2SdMCnF4Y_12culvert_ebpf7connecT\0"));
    }
}
