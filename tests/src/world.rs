//! Namespaces of a test's own.

use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// The calling thread is in namespaces of its own from now on; they end with the last process in them.
#[derive(Debug)]
pub struct World {
    name: String,
}

impl World {
    /// Leaves the host behind. `name` is the test's, for the cgroup that the kernel programs are attached to.
    ///
    /// # Panics
    /// Without root: these tests cannot be skipped unseen.
    #[must_use]
    pub fn new(name: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "end-to-end tests need root; run `sudo -E cargo xtask test`");
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces of our own");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("a private mount namespace");
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).expect("a /run of our own");
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).expect("a BPF file system of our own");
        let world = Self { name: name.to_owned() };
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
}
