//! Named network namespaces, compatible with `ip netns`, and work done inside one.
//!
//! A thread that entered another netns must never go back to a pool: whoever ran on it next would open sockets in the wrong
//! one. So every visit is a fresh thread that ends with it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

const NONE: Option<&str> = None;

/// Runs `work` on a thread of its own inside the netns at `path` and waits for it. Blocks: `work` should be a few system
/// calls. Descriptors it makes stay in that netns, whoever uses them later.
///
/// # Errors
/// When the netns cannot be entered, or what `work` returned.
pub fn open_in_netns<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let visit = || {
            enter(path)?;
            work()
        };
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, visit)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("panic on a thread inside a netns")))
    })
}

/// As [`open_in_netns`], for callers on a runtime: nothing blocks.
///
/// # Errors
/// As [`open_in_netns`].
pub async fn run_in_netns<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let path = path.to_owned();
    let (send, receive) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
        let result = enter(&path).and_then(|()| work());
        // Nobody waits any more: the caller was cancelled, the result is dropped and with it its descriptors.
        drop(send.send(result));
    })?;
    receive.await.map_err(|_| io::Error::other("panic on a thread inside a netns"))?
}

/// Moves the calling thread. Only for threads that end afterwards.
fn enter(path: &Path) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("enter netns {}: {error}", path.display()));
    let netns = fs::OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path).map_err(named)?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| named(errno.into()))
}

/// Is a netns mounted at `path`? A plain file is what a crash between its two steps leaves.
#[must_use]
pub fn is_netns(path: &Path) -> bool {
    statfs(path).is_ok_and(|about| about.filesystem_type() == NSFS_MAGIC)
}

/// The cookie by which eBPF programs know the netns at `path`.
///
/// # Errors
/// When it cannot be entered, or the kernel is older than 5.14.
pub async fn netns_cookie(path: &Path) -> io::Result<u64> {
    run_in_netns(path, || crate::sys::netns_cookie(std::net::UdpSocket::bind("0.0.0.0:0")?)).await
}

/// Makes a new netns at `path`, as `ip netns add` does.
pub(super) fn create(path: &Path) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    prepare(directory)?;
    fs::OpenOptions::new().read(true).create_new(true).write(true).mode(0o000).open(path)?;
    let made = std::thread::scope(|scope| {
        let make = || -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), path, NONE, MsFlags::MS_BIND, NONE)?;
            Ok(())
        };
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, make)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("panic while making a netns")))
    });
    made.inspect_err(|_| {
        if let Err(error) = remove(path) {
            tracing::warn!(path = %path.display(), %error, "half-made netns stays until the next reconciliation");
        }
    })
}

/// Makes the directory a shared mount, so that namespaces made here are seen, and go away, everywhere.
fn prepare(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let share = || mount(NONE, directory, NONE, MsFlags::MS_SHARED | MsFlags::MS_REC, NONE);
    if share() == Err(nix::errno::Errno::EINVAL) {
        // Not a mount point yet.
        mount(Some(directory), directory, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        share()?;
    }
    Ok(())
}

/// Removes the name. The netns itself goes when its last process and socket have gone.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Not mounted: half-made. Not there: done.
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
