//! The private root of an `exec` task: read-only views of the host's system directories, the task's own directories, a
//! fresh `/proc`, a minimal `/dev`, and nothing else of the host.
//!
//! Built on an in-memory root in the stage's own mount namespace, so that it vanishes with the task. Unlike Nomad, which
//! copies these directories into the task's, nothing is copied and the root itself is read-only: a task writes to `/local`,
//! `/alloc`, `/secrets` and `/tmp`.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use super::protocol::Words as _;
use crate::task::spec::TaskSpec;
use crate::workload::mounts;

/// What a sandbox sees of the host, read-only: Nomad's default `chroot_env`. What the host lacks is left out.
const HOST_DIRECTORIES: [&str; 8] = ["/bin", "/etc", "/lib", "/lib32", "/lib64", "/run/resolvconf", "/sbin", "/usr"];
/// Device nodes of the sandbox, the host's own.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// Links in `/dev`.
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];
/// Files of `/proc` about the whole host that no sandbox needs (OCI's default `maskedPaths`).
const MASKED: [&str; 8] =
    ["kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "acpi", "scsi"];
/// Parts of `/proc` through which the host could be changed (OCI's default `readonlyPaths`).
const READ_ONLY: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];
/// Size of the in-memory root: it holds mount points and links only.
const ROOT_OPTIONS: &str = "size=1m,mode=0755";
/// Flags of everything a task can write to, and of the host's directories.
const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const NONE: Option<&str> = None;

/// Builds the sandbox of `task` and makes it this process's root. The caller has a mount namespace of its own and is the
/// first process of a pid namespace.
pub(super) fn enter(task: &TaskSpec) -> Result<(), String> {
    // Nothing that happens here may reach the host's mounts.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).words("make mounts private")?;
    let root = task.dirs.task.join("root");
    match fs::DirBuilder::new().mode(0o700).create(&root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(format!("create {}: {error}", root.display()));
        }
        _ => {}
    }
    mount(Some("tmpfs"), &root, Some("tmpfs"), PLAIN, Some(ROOT_OPTIONS)).words("mount the sandbox's root")?;
    let root = fs::canonicalize(&root).words("find the sandbox's root")?;
    for directory in HOST_DIRECTORIES {
        host_directory(&root, Path::new(directory))?;
    }
    resolver_file(&root)?;
    command_file(&root, &task.command)?;
    make_read_only(&root)?;
    for (inside, host) in [
        ("alloc", &task.dirs.shared),
        ("local", &task.dirs.local),
        ("secrets", &task.dirs.secrets),
        ("tmp", &task.dirs.tmp),
    ] {
        let target = root.join(inside);
        directories(&root, &target)?;
        bind(host, &target)?;
        remount(&target, PLAIN)?;
    }
    devices(&root.join("dev"))?;
    proc(&root.join("proc"))?;
    chdir(&root).words("enter the sandbox's root")?;
    // pivot_root(2): with both the same, the old root lies on top of the new one until it is unmounted.
    pivot_root(".", ".").words("pivot_root into the sandbox")?;
    umount2(".", MntFlags::MNT_DETACH).words("let go of the host's root")?;
    chdir("/").words("enter the sandbox's root")?;
    mount(NONE, "/", NONE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | PLAIN, NONE)
        .words("make the sandbox's root read-only")
}

/// One directory of the host, or the link that stands for it (`/bin` → `usr/bin`).
fn host_directory(root: &Path, directory: &Path) -> Result<(), String> {
    let Ok(meta) = fs::symlink_metadata(directory) else { return Ok(()) };
    let target = inside(root, directory);
    if let Some(parent) = target.parent() {
        directories(root, parent)?;
    }
    if meta.is_symlink() {
        let real = fs::canonicalize(directory).words(format_args!("follow {}", directory.display()))?;
        if HOST_DIRECTORIES.iter().any(|seen| real.starts_with(seen)) {
            let link = fs::read_link(directory).words(format_args!("read {}", directory.display()))?;
            return symlink(link, &target).words(format_args!("link {}", target.display()));
        }
    }
    directories(root, &target)?;
    bind(directory, &target)
}

/// `/etc/resolv.conf` often is a link to a file that the sandbox does not see otherwise.
fn resolver_file(root: &Path) -> Result<(), String> {
    let Ok(real) = fs::canonicalize("/etc/resolv.conf") else { return Ok(()) };
    if HOST_DIRECTORIES.iter().any(|seen| real.starts_with(seen)) || !real.is_file() {
        return Ok(());
    }
    file(root, &real, &real)
}

/// A command outside the directories above: this one file of the host appears at its own path, and nothing beside it.
fn command_file(root: &Path, command: &str) -> Result<(), String> {
    let path = Path::new(command);
    let own = ["/alloc", "/local", "/secrets", "/tmp", "/dev", "/proc", "/sys"];
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let outside = path.is_absolute() && !HOST_DIRECTORIES.iter().chain(&own).any(|seen| path.starts_with(seen));
    if !plain || !outside {
        return Ok(());
    }
    let Ok(real) = fs::canonicalize(path) else { return Ok(()) }; // reported when the program is looked up
    let is_file = fs::metadata(&real).is_ok_and(|meta| meta.is_file());
    let hidden = own[4..].iter().any(|place| real.starts_with(place));
    if is_file && !hidden { file(root, &real, path) } else { Ok(()) }
}

/// Binds the file `host` at `path` below `root`.
fn file(root: &Path, host: &Path, path: &Path) -> Result<(), String> {
    let target = inside(root, path);
    if let Some(parent) = target.parent() {
        directories(root, parent)?;
    }
    fs::File::create(&target).words(format_args!("create {}", target.display()))?;
    bind(host, &target)
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Makes `target` and its parents, all below `root`, readable by everybody.
fn directories(root: &Path, target: &Path) -> Result<(), String> {
    debug_assert!(target.starts_with(root), "only the sandbox is written to");
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(target);
    made.words(format_args!("create {}", target.display()))
}

/// Shows `host` at `target`, with the mounts below it.
fn bind(host: &Path, target: &Path) -> Result<(), String> {
    mount(Some(host), target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .words(format_args!("bind {} into the sandbox", host.display()))
}

/// A bind mount takes its flags only by a second call. Flags that are already set must be repeated.
fn remount(target: &Path, flags: MsFlags) -> Result<(), String> {
    mount(NONE, target, NONE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, NONE)
        .words(format_args!("restrict {}", target.display()))
}

/// Everything mounted below `root` so far, each mount by itself: a bind mount's flags do not reach the mounts below it.
fn make_read_only(root: &Path) -> Result<(), String> {
    let mounts = mounts::all().words("read the mount table")?;
    for mount in mounts.into_iter().filter(|mount| mount.point.starts_with(root) && mount.point != root) {
        let has =
            |option: &str, flag| if mount.options.iter().any(|set| set == option) { flag } else { MsFlags::empty() };
        remount(&mount.point, MsFlags::MS_RDONLY | PLAIN | has("noexec", MsFlags::MS_NOEXEC))?;
    }
    Ok(())
}

fn devices(dev: &Path) -> Result<(), String> {
    fs::create_dir(dev).words("create /dev")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), dev, Some("tmpfs"), flags, Some("size=64k,mode=0755")).words("mount /dev")?;
    for name in DEVICES {
        let (host, target) = (Path::new("/dev").join(name), dev.join(name));
        if host.exists() {
            fs::File::create(&target).words(format_args!("create {}", target.display()))?;
            bind(&host, &target)?;
        }
    }
    let (shm, pts) = (dev.join("shm"), dev.join("pts"));
    fs::create_dir(&shm).words("create /dev/shm")?;
    mount(Some("tmpfs"), &shm, Some("tmpfs"), flags | MsFlags::MS_NODEV, Some("size=64m,mode=1777"))
        .words("mount /dev/shm")?;
    fs::create_dir(&pts).words("create /dev/pts")?;
    mount(Some("devpts"), &pts, Some("devpts"), flags, Some("newinstance,ptmxmode=0666,mode=0620"))
        .words("mount /dev/pts")?;
    for (target, name) in DEVICE_LINKS {
        symlink(target, dev.join(name)).words(format_args!("link /dev/{name}"))?;
    }
    mount(NONE, dev, NONE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags, NONE)
        .words("make /dev read-only")
}

fn proc(target: &Path) -> Result<(), String> {
    fs::create_dir(target).words("create /proc")?;
    mount(Some("proc"), target, Some("proc"), PLAIN | MsFlags::MS_NOEXEC, NONE).words("mount /proc")?;
    for name in READ_ONLY {
        let path = target.join(name);
        if path.exists() {
            bind(&path, &path)?;
            remount(&path, MsFlags::MS_RDONLY | PLAIN | MsFlags::MS_NOEXEC)?;
        }
    }
    for name in MASKED {
        let path = target.join(name);
        if path.is_dir() {
            let flags = MsFlags::MS_RDONLY | PLAIN | MsFlags::MS_NOEXEC;
            mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some("size=0"))
                .words(format_args!("hide /proc/{name}"))?;
        } else if path.exists() {
            bind(Path::new("/dev/null"), &path)?;
        }
    }
    Ok(())
}
