//! The hash that ties the object in the tree to its sources.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::command::root;

/// Everything that the object is made from, relative to the workspace's root.
const INPUTS: [&str; 5] = [
    "ebpf/common/Cargo.toml",
    "ebpf/common/src",
    "ebpf/programs/Cargo.lock",
    "ebpf/programs/Cargo.toml",
    "ebpf/programs/src",
];

/// Where the object is kept.
pub(crate) fn object_path() -> PathBuf {
    root().join("agent/src/datapath/culvert.bpf.o")
}

fn record_path() -> PathBuf {
    object_path().with_extension("o.sha256")
}

/// What is written beside the object.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Record {
    /// SHA-256 over the sources, in hexadecimal.
    pub(crate) sources: String,
    /// SHA-256 of the object.
    pub(crate) object: String,
    /// What built it.
    pub(crate) toolchain: String,
}

impl Record {
    /// Reads the record in the tree.
    pub(crate) fn read() -> Result<Self> {
        let path = record_path();
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text)
            .with_context(|| format!("{}: expected three lines, `<value>  <sources|object|toolchain>`", path.display()))
    }

    /// Writes the record into the tree.
    pub(crate) fn write(&self) -> Result<()> {
        let path = record_path();
        fs::write(&path, self.to_text()).with_context(|| format!("write {}", path.display()))
    }

    fn belongs_to(&self, sources: &str, object: &str) -> Result<()> {
        ensure!(
            self.sources == sources,
            "ebpf/ has changed since the object was built: run `cargo xtask ebpf` and commit the result"
        );
        ensure!(self.object == object, "the object was changed by something else than `cargo xtask ebpf`");
        Ok(())
    }

    fn to_text(&self) -> String {
        format!("{}  sources\n{}  object\n{}  toolchain\n", self.sources, self.object, self.toolchain)
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.rsplit_once("  ").filter(|(_, key)| *key == name))
                .map(|(value, _)| value.to_owned())
        };
        Some(Self { sources: field("sources")?, object: field("object")?, toolchain: field("toolchain")? })
    }
}

/// Fails when the object in the tree was built from other sources than those in the tree, or is not the one recorded.
pub(crate) fn verify() -> Result<()> {
    let path = object_path();
    let object = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    Record::read()?.belongs_to(&hash()?, &hash_bytes(&object))
}

/// SHA-256 over names and contents of the sources, in the order of their names.
pub(crate) fn hash() -> Result<String> {
    let mut files = Vec::new();
    for input in INPUTS {
        collect(&root().join(input), &mut files)?;
    }
    files.sort();
    let mut hasher = Sha256::new();
    for path in files {
        let contents = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let name = path.strip_prefix(root()).expect("collected below the root").to_string_lossy().into_owned();
        // Lengths first: no two trees give the same bytes.
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update((contents.len() as u64).to_le_bytes());
        hasher.update(&contents);
    }
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of `bytes`, in hexadecimal.
pub(crate) fn hash_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        collect(&entry.with_context(|| format!("list {}", path.display()))?.path(), files)?;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_in_the_tree_belongs_to_the_sources_in_the_tree() {
        verify().expect("sources, object and record belong together");
    }

    #[test]
    fn a_record_of_other_sources_or_of_another_object_is_refused() {
        let record = |sources: &str, object: &str| Record {
            sources: sources.to_owned(),
            object: object.to_owned(),
            toolchain: "rustc".to_owned(),
        };
        record("ab", "cd").belongs_to("ab", "cd").expect("the same");
        for (sources, object) in [("abc", "cd"), ("ab", "cde")] {
            let error = record("ab", "cd").belongs_to(sources, object).expect_err("another").to_string();
            assert!(error.contains("cargo xtask ebpf"), "{error}");
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let record = Record { sources: "ab".into(), object: "cd".into(), toolchain: "rustc 1.96.0,  with LLVM".into() };
        assert_eq!(Record::parse(&record.to_text()), Some(record));
        assert_eq!(Record::parse("ab  sources\n"), None);
    }

    #[test]
    fn a_hash_is_written_in_hexadecimal() {
        assert_eq!(hash_bytes(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
