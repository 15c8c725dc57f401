//! Namespaces of a test's own, and the proof that a node left nothing in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::{Node, eventually};

/// The data directory of every node in a world.
pub const DATA_DIR: &str = "/run/culvert";

/// The calling thread is in namespaces of its own from now on; they end with the last process in them.
#[derive(Debug)]
pub struct World {
    name: String,
    unified: PathBuf,
    home: PathBuf,
}

impl World {
    /// Leaves the host behind. `name` is the test's, for the cgroup that the kernel programs are attached to.
    ///
    /// # Panics
    /// Without root: these tests cannot be skipped unseen.
    #[must_use]
    pub fn new(name: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "end-to-end tests need root; run `cargo xtask test` as root");
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of our own");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("a private mount namespace");
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).expect("a /run of our own");
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).expect("a BPF file system of our own");
        let unified = mounts().into_iter().find(|mount| mount.kind == "cgroup2").expect("cgroup2 is mounted").point;
        let groups = fs::read_to_string("/proc/self/cgroup").expect("our cgroups");
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).expect("our cgroup of version 2");
        let world = Self { name: name.to_owned(), home: unified.join(own), unified };
        world.run("ip", &["link", "set", "lo", "up"]);
        world
    }

    /// Name of the test.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cgroup parent of this world's node.
    #[must_use]
    pub fn cgroup_parent(&self) -> String {
        format!("culvert-test-{}", self.name)
    }

    /// Where cgroup2 is mounted.
    #[must_use]
    pub fn unified(&self) -> &Path {
        &self.unified
    }

    /// The cgroup that the test was started in: agents belong there.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Runs a command and returns what it prints.
    ///
    /// # Panics
    /// When it fails, with what it said.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {}: {}: {error}", arguments.join(" "), output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// After `leave`: nothing that carries our names is left, and nobody of `people`.
    ///
    /// # Panics
    /// When something is.
    pub fn assert_nothing_left(&self, people: &[Process]) {
        let left = |folder: &str, prefix: &str| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.filter(|name| name.starts_with(prefix)).collect::<Vec<_>>()
        };
        assert!(!people.is_empty(), "nobody was noted: this proves nothing");
        // The kernel ends some of it a moment after the last process.
        eventually("the processes are gone", || !people.iter().any(Process::lives));
        assert_eq!(left("/run/netns", "culvert-"), [""; 0], "network namespaces");
        assert!(!Path::new("/sys/fs/bpf/culvert").exists(), "pins: {:?}", left("/sys/fs/bpf/culvert", ""));
        assert!(!Path::new("/run/culvert.lock").exists(), "the lock file");
        assert_eq!(left(&format!("{DATA_DIR}/alloc"), ""), [""; 0], "directories of allocations");
        assert_eq!(left(&format!("{DATA_DIR}/allocations"), ""), [""; 0], "records of allocations");
        let links = self.run("ip", &["-o", "link"]);
        assert!(!links.contains("culvert0") && !links.contains(": cv"), "interfaces: {links}");
        assert_eq!(self.run("nft", &["list", "tables"]), "", "nftables");
        let (mut hierarchies, mut below) = (0, Vec::new());
        for mount in mounts() {
            if mount.kind.starts_with("cgroup") {
                hierarchies += 1;
                assert!(!mount.point.join(self.cgroup_parent()).exists(), "cgroup in {}", mount.point.display());
            } else if mount.point.starts_with(DATA_DIR) || mount.point.starts_with("/run/netns") {
                below.push(mount.point);
            }
        }
        assert!(hierarchies > 0, "no cgroups are mounted: this proves nothing");
        // `ip netns` and culvert keep a mount of the folder itself.
        below.retain(|point| point != Path::new("/run/netns"));
        assert!(below.is_empty(), "mounts: {below:?}");
    }
}

/// A process that a node started.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Ids are used again; together with the time of its start one means one process.
    start: String,
}

impl Process {
    /// The process that has this id now.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        // The name in parentheses may hold anything, also blanks and parentheses.
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
        // A zombie has ended; only its parent has not looked yet.
        if fields.first() == Some(&"Z") {
            return None;
        }
        Some(Self { pid, start: (*fields.get(19)?).to_owned() })
    }

    /// Does it still run?
    #[must_use]
    pub fn lives(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    fn parent(&self) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        Self::of(text.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?)
    }

    fn is_executor(&self) -> bool {
        let command = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        command.split(|byte| *byte == 0).nth(1) == Some(b"executor")
    }
}

impl Node {
    /// The worker, all tasks, and their executors.
    ///
    /// # Panics
    /// When the node has none of a kind.
    #[must_use]
    pub fn people(&self) -> Vec<Process> {
        let worker = self.worker().and_then(Process::of).expect("a worker");
        let mut people = vec![worker];
        for task in self.tasks() {
            let mut process = Process::of(task).expect("the task runs");
            let mut executors = 0;
            while let Some(parent) = process.parent().filter(Process::is_executor) {
                people.push(std::mem::replace(&mut process, parent));
                executors += 1;
            }
            assert!(executors > 0, "task {task} has no executor");
            people.push(process);
        }
        assert!(people.len() > 1, "the node runs no task");
        people.sort();
        people.dedup();
        people
    }
}

struct Mount {
    point: PathBuf,
    kind: String,
}

/// The mounts of the calling thread's namespace (proc(5), mountinfo).
fn mounts() -> Vec<Mount> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").expect("our mounts");
    let mount = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let point = PathBuf::from(place.split(' ').nth(4)?);
        Some(Mount { point, kind: kind.split(' ').next()?.to_owned() })
    };
    text.lines().filter_map(mount).collect()
}
