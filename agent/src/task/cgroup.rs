//! Control groups of tasks: `<hierarchy>/<parent>/<alloc id>/<task>`.
//!
//! A task is always in a cgroup2 group, because the eBPF programs attach to `<cgroup2>/<parent>`. Limits go through cgroup2
//! where it has the controller, else through the controller's v1 hierarchy under the same name; what neither offers is
//! reported in words, never silently dropped.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::task::spec::Resources;
use crate::workload::mounts;

/// How often a dying group is looked at.
const POLL: Duration = Duration::from_millis(10);
/// How often it is looked at before giving up: 10 s in all. SIGKILL works at once, but memory takes time to be freed.
const POLLS: u32 = 1_000;
/// The kernel's range of `cpu.shares` (cgroup v1).
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// Is `parent` a relative path of plain names? Returns the text when it is not.
///
/// # Errors
/// The refused text.
pub fn check_cgroup_parent(parent: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/');
    let plain = Path::new(parent).components().all(|part| matches!(part, Component::Normal(_)));
    let fits = !parent.is_empty() && parent.len() <= 255 && parent.bytes().all(allowed);
    if fits && plain { Ok(()) } else { Err(parent.to_owned()) }
}

/// A cgroup operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup2 file system: without it a task has no place that eBPF could attach to.
    #[error("no cgroup2 file system is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup)")]
    NoCgroup2,
    /// A file or directory of a hierarchy.
    #[error("{doing} {}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Processes that SIGKILL did not end.
    #[error("{} still holds processes after SIGKILL", path.display())]
    Alive {
        /// The group.
        path: PathBuf,
    },
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::File { doing, path: path.to_owned(), source }
}

/// Where the hierarchies are mounted on this host.
#[derive(Clone, Debug)]
pub struct Hierarchies {
    v2: PathBuf,
    v1: Vec<(Vec<String>, PathBuf)>,
}

impl Hierarchies {
    /// Reads the mount table.
    ///
    /// # Errors
    /// [`CgroupError::NoCgroup2`].
    pub fn find() -> Result<Self, CgroupError> {
        let mounts = mounts::all().map_err(failed("read", Path::new("/proc/thread-self/mountinfo")))?;
        let v2 = mounts.iter().find(|mount| mount.kind == "cgroup2").map(|mount| mount.point.clone());
        let v1 = mounts.into_iter().filter(|mount| mount.kind == "cgroup");
        let v1 = v1.map(|mount| (mount.super_options, mount.point)).collect();
        Ok(Self { v2: v2.ok_or(CgroupError::NoCgroup2)?, v1 })
    }

    /// The mount point of cgroup2.
    #[must_use]
    pub fn cgroup2(&self) -> &Path {
        &self.v2
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1.iter().find(|(names, _)| names.iter().any(|name| name == controller)).map(|(_, path)| path.as_path())
    }

    /// Every directory that the group `name` can have: cgroup2 first, then the v1 hierarchies culvert uses.
    fn places(&self, name: &Path) -> Vec<PathBuf> {
        let v1 = ["memory", "cpu", "pids"].into_iter().filter_map(|controller| self.v1(controller));
        let mut places: Vec<PathBuf> =
            std::iter::once(self.v2.as_path()).chain(v1).map(|root| root.join(name)).collect();
        places.dedup();
        places
    }
}

/// The group of one task, in every hierarchy it needs.
#[derive(Clone, Debug)]
pub(super) struct TaskCgroup {
    /// Directories to join; cgroup2 first.
    places: Vec<PathBuf>,
    /// Where the memory controller is, for OOM counts; true for v2.
    memory: Option<(PathBuf, bool)>,
}

impl TaskCgroup {
    /// Makes the group `name`, with `limits` when given. Returns it with sentences about limits that could not be set.
    ///
    /// # Errors
    /// [`CgroupError`] when the cgroup2 group cannot be made. A limit that cannot be set is a sentence, not an error.
    pub(super) fn create(
        hierarchies: &Hierarchies,
        name: &Path,
        limits: Option<&Resources>,
    ) -> Result<(Self, Vec<String>), CgroupError> {
        let v2 = hierarchies.v2.join(name);
        fs::create_dir_all(&v2).map_err(failed("create cgroup", &v2))?;
        let (mut group, mut missing) = (Self { places: vec![v2], memory: None }, Vec::new());
        let Some(limits) = limits else { return Ok((group, missing)) };
        for controller in ["memory", "cpu", "pids"] {
            if let Err(reason) = group.limit(hierarchies, name, controller, limits) {
                missing.push(format!("{controller} limit not enforced: {reason}"));
            }
        }
        Ok((group, missing))
    }

    fn limit(
        &mut self,
        hierarchies: &Hierarchies,
        name: &Path,
        controller: &str,
        limits: &Resources,
    ) -> Result<(), String> {
        let (place, v2) = if enable(&hierarchies.v2, name, controller) {
            (hierarchies.v2.join(name), true)
        } else {
            let root = hierarchies.v1(controller).ok_or_else(|| format!("the host has no {controller} controller"))?;
            (root.join(name), false)
        };
        fs::create_dir_all(&place).map_err(|error| format!("create {}: {error}", place.display()))?;
        for Knob { file, value, optional } in knobs(controller, v2, limits) {
            let path = place.join(file);
            match write(&path, &value) {
                Err(error) if optional && error.kind() == io::ErrorKind::NotFound => {}
                written => written.map_err(|error| format!("write {value} to {}: {error}", path.display()))?,
            }
        }
        if controller == "memory" {
            self.memory = Some((place.clone(), v2));
        }
        if !self.places.contains(&place) {
            self.places.push(place);
        }
        Ok(())
    }

    /// The files into which a process writes `0` to join.
    pub(super) fn procs_files(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.places.iter().map(|place| place.join("cgroup.procs"))
    }

    /// Has the kernel killed a process of this group for its memory?
    #[must_use]
    pub(super) fn oom_killed(&self) -> bool {
        let Some((place, v2)) = &self.memory else { return false };
        let path = place.join(if *v2 { "memory.events" } else { "memory.oom_control" });
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count.trim() != "0"))
    }
}

/// Turns `controller` on for every group from the root to the parent of `name`. False when cgroup2 does not have it.
fn enable(root: &Path, name: &Path, controller: &str) -> bool {
    let mut group = root.to_owned();
    for part in name.components() {
        let has = |file: &str| {
            let text = fs::read_to_string(group.join(file)).unwrap_or_default();
            text.split_whitespace().any(|word| word == controller)
        };
        if !has("cgroup.controllers") {
            return false;
        }
        if !has("cgroup.subtree_control")
            && write(&group.join("cgroup.subtree_control"), &format!("+{controller}")).is_err()
        {
            return false;
        }
        group.push(part);
    }
    true
}

/// A file of a group, and what is written there.
#[derive(Debug, Eq, PartialEq)]
struct Knob {
    file: &'static str,
    value: String,
    /// Some kernels do not have the file, and nothing is lost then.
    optional: bool,
}

/// What one controller is told, in this order.
fn knobs(controller: &str, v2: bool, limits: &Resources) -> Vec<Knob> {
    let megabytes = |value: u32| (u64::from(value) << 20).to_string();
    let hard = megabytes(limits.memory_max_mb.unwrap_or(0).max(limits.memory_mb));
    let soft = megabytes(limits.memory_mb);
    let shares = u64::from(limits.cpu_mhz).clamp(*SHARES.start(), *SHARES.end());
    let knob = |file, value| Knob { file, value, optional: false };
    // Memory that is swapped out is not limited by the others. Without swap accounting the files are not there.
    let swap = |file, value| Knob { optional: true, ..knob(file, value) };
    match (controller, v2) {
        ("memory", true) => {
            vec![knob("memory.max", hard), swap("memory.swap.max", "0".into()), knob("memory.low", soft)]
        }
        // Memory and swap together: never below the limit of memory alone, so it comes after.
        ("memory", false) => vec![
            knob("memory.limit_in_bytes", hard.clone()),
            swap("memory.memsw.limit_in_bytes", hard),
            knob("memory.soft_limit_in_bytes", soft),
        ],
        // The kernel's documented mapping of 2…262144 shares to the weights 1…10000.
        ("cpu", true) => vec![knob("cpu.weight", (1 + (shares - 2) * 9_999 / 262_142).to_string())],
        ("cpu", false) => vec![knob("cpu.shares", shares.to_string())],
        _ => vec![knob("pids.max", limits.pids_max.to_string())],
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// Sends SIGKILL to every process of the group `name` and the groups below it, waits until they are gone, and removes
/// the groups from every hierarchy. A group that does not exist is already removed.
///
/// # Errors
/// [`CgroupError::Alive`] after ten seconds, [`CgroupError::File`] when a group cannot be removed.
pub fn kill_and_remove(hierarchies: &Hierarchies, name: &Path) -> Result<(), CgroupError> {
    kill_all(hierarchies, name)?;
    for place in hierarchies.places(name) {
        remove_tree(&place)?;
    }
    Ok(())
}

/// Sends SIGKILL to every process of the group and waits until none is left.
///
/// # Errors
/// [`CgroupError::Alive`].
pub fn kill_all(hierarchies: &Hierarchies, name: &Path) -> Result<(), CgroupError> {
    let group = hierarchies.v2.join(name);
    for _ in 0..POLLS {
        let tree = tree(&group);
        let processes: Vec<Pid> = tree.iter().flat_map(|group| processes(group)).collect();
        if processes.is_empty() {
            return Ok(());
        }
        // cgroup.kill (Linux 5.14) is atomic; without it a fork may escape one round and meets the next.
        if write(&group.join("cgroup.kill"), "1").is_err() {
            for process in processes {
                // Already gone is what we want.
                let _gone = kill(process, Signal::SIGKILL);
            }
        }
        std::thread::sleep(POLL);
    }
    Err(CgroupError::Alive { path: group })
}

/// Names of the groups directly below `name`, in any hierarchy.
#[must_use]
pub fn children(hierarchies: &Hierarchies, name: &Path) -> Vec<String> {
    let entries = hierarchies.places(name).into_iter().flat_map(|place| subgroups(&place));
    let mut names: Vec<String> =
        entries.filter_map(|path| path.file_name().map(|name| name.to_string_lossy().into_owned())).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Removes the group `name` itself where it holds nothing; what is in use stays.
pub fn remove_if_empty(hierarchies: &Hierarchies, name: &Path) {
    for place in hierarchies.places(name) {
        if let Err(error) = fs::remove_dir(&place) {
            tracing::debug!(path = %place.display(), %error, "cgroup stays");
        }
    }
}

fn subgroups(group: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(group) else { return Vec::new() };
    let directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.flatten().filter(directory).map(|entry| entry.path()).collect()
}

/// `group` and everything below it, parents first.
fn tree(group: &Path) -> Vec<PathBuf> {
    let mut all = vec![group.to_owned()];
    let mut next = 0;
    while next < all.len() {
        let below = subgroups(&all[next]);
        all.extend(below);
        next += 1;
    }
    all
}

fn processes(group: &Path) -> Vec<Pid> {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    // 0 is a process of another pid namespace, which this one cannot name; cgroup.kill reaches it all the same.
    text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw).collect()
}

fn remove_tree(group: &Path) -> Result<(), CgroupError> {
    for place in tree(group).into_iter().rev() {
        let mut last = None;
        for _ in 0..POLLS {
            match fs::remove_dir(&place) {
                Ok(()) => last = None,
                Err(error) if error.kind() == io::ErrorKind::NotFound => last = None,
                // EBUSY until the kernel has buried the last process.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    last = Some(error);
                    std::thread::sleep(POLL);
                    continue;
                }
                Err(error) => last = Some(error),
            }
            break;
        }
        if let Some(error) = last {
            return Err(failed("remove cgroup", &place)(error));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_a_plain_relative_path() {
        for good in ["culvert", "culvert-test.1/inner"] {
            assert_eq!(check_cgroup_parent(good), Ok(()));
        }
        for bad in ["", "/", "/culvert", "..", "a/../b", "a b", "./a"] {
            assert!(check_cgroup_parent(bad).is_err(), "{bad:?}");
        }
    }

    const LIMITS: Resources = Resources { cpu_mhz: 1024, memory_mb: 64, memory_max_mb: Some(128), pids_max: 7 };
    const NAME: &str = "culvert/alloc/task";

    #[test]
    fn limits_are_translated_for_both_versions() {
        let get = |controller, v2| -> Vec<(&str, String)> {
            knobs(controller, v2, &LIMITS).into_iter().map(|knob| (knob.file, knob.value)).collect()
        };
        let (soft, hard) = ("67108864".to_owned(), "134217728".to_owned());
        let v2 = [("memory.max", hard.clone()), ("memory.swap.max", "0".into()), ("memory.low", soft.clone())];
        assert_eq!(get("memory", true), v2);
        let v1 = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes"];
        assert_eq!(get("memory", false), v1.into_iter().zip([hard.clone(), hard, soft]).collect::<Vec<_>>());
        assert_eq!(get("cpu", true), [("cpu.weight", "39".into())]);
        assert_eq!(get("cpu", false), [("cpu.shares", "1024".into())]);
        assert_eq!((get("pids", true), get("pids", false)), (get("pids", false), vec![("pids.max", "7".into())]));
        let tiny = Resources { cpu_mhz: 1, ..LIMITS };
        assert_eq!(knobs("cpu", true, &tiny)[0].value, "1", "the kernel refuses a weight of zero");
    }

    /// Files as a host with `controller` in cgroup2 has them, and `knobs` in the task's group.
    fn cgroup2(controller: &str, knobs: &[&str]) -> (tempfile::TempDir, Hierarchies) {
        let root = tempfile::tempdir().expect("a directory");
        let group = root.path().join(NAME);
        fs::create_dir_all(&group).expect("made");
        for place in group.ancestors().skip(1).take_while(|place| place.starts_with(root.path())) {
            fs::write(place.join("cgroup.controllers"), format!("cpuset {controller}\n")).expect("written");
            fs::write(place.join("cgroup.subtree_control"), "").expect("written");
        }
        for knob in knobs {
            fs::write(group.join(knob), "").expect("written");
        }
        let hierarchies = Hierarchies { v2: root.path().to_owned(), v1: Vec::new() };
        (root, hierarchies)
    }

    #[test]
    fn cgroup2_is_told_of_every_limit_once_the_groups_above_hand_the_controller_down() {
        for (controller, files) in [
            ("memory", &[("memory.max", "134217728"), ("memory.swap.max", "0"), ("memory.low", "67108864")][..]),
            ("cpu", &[("cpu.weight", "39")]),
            ("pids", &[("pids.max", "7")]),
        ] {
            let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
            let (root, hierarchies) = cgroup2(controller, &names);
            let read = |path: &str| fs::read_to_string(root.path().join(path)).expect("readable");
            let (group, missing) = TaskCgroup::create(&hierarchies, Path::new(NAME), Some(&LIMITS)).expect("made");
            for above in ["", "culvert/", "culvert/alloc/"] {
                assert_eq!(read(&format!("{above}cgroup.subtree_control")), format!("+{controller}"), "{above}");
            }
            for (file, value) in files {
                assert_eq!(read(&format!("{NAME}/{file}")), *value, "{file}");
            }
            let told = |other: &str| format!("{other} limit not enforced: the host has no {other} controller");
            let others = ["memory", "cpu", "pids"].into_iter().filter(|other| *other != controller);
            assert_eq!(missing, others.map(told).collect::<Vec<_>>());
            assert_eq!(group.places, [root.path().join(NAME)], "there is one group to join");
        }
    }

    #[test]
    fn a_limit_that_cgroup2_refuses_is_told_and_swap_without_accounting_is_not() {
        let create = |files: &[&str]| {
            let (_root, hierarchies) = cgroup2("memory", files);
            let (_, missing) = TaskCgroup::create(&hierarchies, Path::new(NAME), Some(&LIMITS)).expect("made");
            missing.into_iter().filter(|sentence| sentence.starts_with("memory")).collect::<Vec<_>>()
        };
        assert_eq!(create(&["memory.max", "memory.low"]), [] as [&str; 0]);
        let refused = create(&["memory.swap.max", "memory.low"]);
        assert!(refused.len() == 1 && refused[0].contains("/memory.max: No such file"), "{refused:?}");
    }

    #[test]
    fn cgroup2_tells_who_was_killed_for_its_memory() {
        let (root, hierarchies) = cgroup2("memory", &["memory.max", "memory.low"]);
        let (group, _) = TaskCgroup::create(&hierarchies, Path::new(NAME), Some(&LIMITS)).expect("made");
        assert!(!group.oom_killed(), "nothing is known");
        for (count, killed) in [(0, false), (2, true)] {
            let events = format!("low 0\nhigh 0\nmax 31\noom 1\noom_kill {count}\noom_group_kill 0\n");
            fs::write(root.path().join(NAME).join("memory.events"), events).expect("written");
            assert_eq!(group.oom_killed(), killed);
        }
    }
}
