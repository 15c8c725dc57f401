//! The BPF file system: where maps and links of a generation are pinned, so that they outlive the agent.
//!
//! ```text
//! <bpf_dir>/v<layout>-<number>/maps/<MAP>
//!                             /links/<program>                 attached to the cgroup
//!                             /links/<workload>-<lookup|in|out>
//! ```
//!
//! This shape is the one thing that every layout has in common: a later agent finds and removes what an earlier one left.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use rustix::fs::statfs;

use crate::sys::bpf::{self, LinkTarget};

/// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// Where the BPF file system is mounted by convention.
const CONVENTIONAL: &str = "/sys/fs/bpf";

/// Makes `directory` exist within a BPF file system, mounting one if there is none: at the conventional place if the directory lies
/// below it, else at the directory itself.
pub(super) fn ensure_directory(directory: &Path) -> io::Result<()> {
    let root = if directory.starts_with(CONVENTIONAL) { Path::new(CONVENTIONAL) } else { directory };
    fs::create_dir_all(root)?;
    if !is_bpf_fs(root)? {
        mount(
            Some("bpf"),
            root,
            Some("bpf"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some("mode=700"),
        )?;
    }
    // Whoever may open it may lock it.
    fs::DirBuilder::new().recursive(true).mode(0o711).create(directory)?;
    if is_bpf_fs(directory)? {
        return Ok(());
    }
    Err(io::Error::other(format!("{} is not in a BPF file system", directory.display())))
}

fn is_bpf_fs(path: &Path) -> io::Result<bool> {
    // The type of the field differs between architectures.
    Ok(statfs(path)?.f_type as i64 == BPF_FS_MAGIC)
}

/// One set of maps and links.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Generation {
    /// Counts up.
    number: u64,
    /// Layout of its maps.
    layout: u32,
    directory: PathBuf,
}

impl Generation {
    /// All generations below `bpf_dir`, oldest first.
    pub(super) fn list(bpf_dir: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(bpf_dir)? {
            let entry = entry?;
            if let Some((layout, number)) = entry.file_name().to_str().and_then(parse_name) {
                found.push(Self { number, layout, directory: entry.path() });
            }
        }
        found.sort();
        Ok(found)
    }

    /// The generation to use, and those to take over from: the newest with `layout`, or a new one.
    pub(super) fn choose(bpf_dir: &Path, layout: u32) -> io::Result<(Self, Vec<Self>)> {
        let mut found = Self::list(bpf_dir)?;
        let next = found.last().map_or(1, |newest| newest.number + 1);
        let current = match found.iter().rposition(|generation| generation.layout == layout) {
            Some(at) => found.remove(at),
            None => Self { number: next, layout, directory: bpf_dir.join(format!("v{layout}-{next}")) },
        };
        fs::create_dir_all(current.directory.join("maps"))?;
        fs::create_dir_all(current.directory.join("links"))?;
        Ok((current, found))
    }

    /// Where all generations are.
    pub(super) fn bpf_dir(&self) -> &Path {
        self.directory.parent().unwrap_or(&self.directory)
    }

    /// Where the map `name` is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    fn link(&self, name: &str) -> PathBuf {
        self.directory.join("links").join(name)
    }

    /// Workloads that have links here, whether or not they still live.
    pub(super) fn workloads(&self) -> io::Result<Vec<u32>> {
        let mut found: Vec<u32> =
            self.link_names()?.iter().filter_map(|name| name.split_once('-')?.0.parse().ok()).collect();
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    fn link_names(&self) -> io::Result<Vec<String>> {
        match fs::read_dir(self.directory.join("links")) {
            Ok(entries) => Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Makes the link `name` run `program` on `target`: the pinned link is pointed at the program if it lives and is attached to
    /// `target`; otherwise a new one takes its place, attached before the old one goes.
    pub(super) fn attach(
        &self,
        name: &str,
        target: LinkTarget,
        program: impl AsFd,
        make: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<()> {
        let path = self.link(name);
        match bpf::open_pinned(&path) {
            Ok(link) => {
                if bpf::link_target(&link)? == target && bpf::update(&link, program).is_ok() {
                    return Ok(());
                }
                let new = make()?;
                fs::remove_file(&path)?;
                bpf::pin(&new, &path)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => bpf::pin(make()?, &path),
            Err(error) => Err(error),
        }
    }

    /// Removes the link `name`, and with it the program from what it is attached to.
    pub(super) fn remove_link(&self, name: &str) -> io::Result<()> {
        unpin(&self.link(name))
    }

    /// Removes every link whose name begins with `prefix`.
    pub(super) fn remove_links(&self, prefix: &str) -> io::Result<()> {
        self.link_names()?.iter().filter(|name| name.starts_with(prefix)).try_for_each(|name| self.remove_link(name))
    }

    /// Takes away what lets connections through; what keeps packets out stays. Nobody keeps the tables of another layout in line
    /// with policy.
    pub(super) fn void(&self) -> io::Result<()> {
        match bpf::open_pinned(&self.map(culvert_ebpf_common::map::UPSTREAM)) {
            Ok(map) => bpf::empty_map(map),
            Err(error) => absent_is_fine(Err(error)),
        }
    }

    /// Removes everything of this generation, links first.
    pub(super) fn remove(&self) -> io::Result<()> {
        for part in ["links", "maps"] {
            let directory = self.directory.join(part);
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            for entry in entries {
                unpin(&entry?.path())?;
            }
            absent_is_fine(fs::remove_dir(&directory))?;
        }
        absent_is_fine(fs::remove_dir(&self.directory))
    }
}

/// Removes `bpf_dir` itself unless something is in it, or it is a mount.
pub(super) fn remove_directory_if_empty(bpf_dir: &Path) -> io::Result<()> {
    match fs::remove_dir(bpf_dir) {
        Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) => Ok(()),
        other => absent_is_fine(other),
    }
}

/// Reads `v<layout>-<number>`.
fn parse_name(name: &str) -> Option<(u32, u64)> {
    let (layout, number) = name.strip_prefix('v')?.split_once('-')?;
    Some((layout.parse().ok()?, number.parse().ok()?))
}

/// Removes a pin. A link is detached first, or its program would go on for a moment.
fn unpin(path: &Path) -> io::Result<()> {
    // A map is none, and a dead link has nothing to be detached from.
    bpf::open_pinned(path).and_then(bpf::detach).ok();
    absent_is_fine(fs::remove_file(path))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_generation_of_the_layout_is_chosen_and_the_others_are_taken_over() {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["v1-1", "v2-2", "v1-3", "v3-4", "other", "v1", "vx-1"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        let (current, old) = Generation::choose(directory.path(), 1).expect("readable");
        assert_eq!(current.directory, directory.path().join("v1-3"));
        let old: Vec<_> = old.iter().map(|generation| generation.number).collect();
        assert_eq!(old, [1, 2, 4]);

        let (fresh, old) = Generation::choose(directory.path(), 9).expect("readable");
        assert_eq!(fresh.directory, directory.path().join("v9-5"));
        assert_eq!(old.len(), 4);
    }

    #[test]
    fn the_directory_goes_when_it_is_empty() {
        let directory = tempfile::tempdir().expect("a directory");
        let bpf_dir = directory.path().join("culvert");
        fs::create_dir_all(bpf_dir.join("other")).expect("a directory");
        remove_directory_if_empty(&bpf_dir).expect("something of others is in it");
        fs::remove_dir(bpf_dir.join("other")).expect("a directory");
        remove_directory_if_empty(&bpf_dir).expect("removed");
        assert!(!bpf_dir.exists());
        remove_directory_if_empty(&bpf_dir).expect("nothing to do");
    }

    #[test]
    fn names_of_generations_are_read_strictly() {
        assert_eq!(parse_name("v1-7"), Some((1, 7)));
        for name in ["1-7", "v-7", "v1-", "v1-7x", "v1", ""] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }
}
