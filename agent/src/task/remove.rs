//! Removes a tree whose shape strangers chose: tasks may have nested directories as deep as the file system allows.
//!
//! Neither the stack nor the number of descriptors grows with the depth: what lies in a sub-directory is moved up into the top
//! one, until that is empty. No link is followed. Nobody may be at work in the tree any more.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

/// Removes `path` and everything in it; a path that is not there is removed already.
///
/// # Errors
/// What the kernel refuses to remove: for example a mount point, or a file that is immutable.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match open(CWD, path) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut moved = 0;
    while flatten(&top, &mut moved)? {}
    unlinkat(CWD, path, AtFlags::REMOVEDIR)?;
    Ok(())
}

/// Goes once over the entries of `top`: removes what can be removed, and moves up what lies below. Was there anything?
fn flatten(top: &OwnedFd, moved: &mut u64) -> io::Result<bool> {
    let mut anything = false;
    for name in names(top)? {
        let name = name?;
        anything = true;
        if remove_one(top, &name)? {
            continue;
        }
        let below = open(top, &*name)?;
        for inner in names(&below)? {
            let inner = inner?;
            if !remove_one(&below, &inner)? {
                move_up(&below, &inner, top, moved)?;
            }
        }
        // Emptied by now, unless entries were passed over while others went; the next round finds it again.
        remove_one(top, &name)?;
    }
    Ok(anything)
}

/// Removes a file, or a directory that is empty. `false`: one that is not.
fn remove_one(folder: &OwnedFd, name: &CStr) -> io::Result<bool> {
    match unlinkat(folder, name, AtFlags::empty()) {
        // Linux says EISDIR, POSIX EPERM (unlink(2)).
        Err(Errno::ISDIR | Errno::PERM) => {}
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(error) => return Err(error.into()),
    }
    match unlinkat(folder, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Moves a directory up under a name that is free.
fn move_up(from: &OwnedFd, name: &CStr, top: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        match renameat(from, name, top, format!("removed-{moved}")) {
            Ok(()) => return Ok(()),
            // Somebody called something so.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn open(folder: impl AsFd, path: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(folder, path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())
}

fn names(folder: &OwnedFd) -> io::Result<impl Iterator<Item = io::Result<CString>>> {
    let entries = Dir::read_from(folder)?;
    Ok(entries.filter_map(|entry| match entry {
        Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => None,
        Ok(entry) => Some(Ok(entry.file_name().to_owned())),
        Err(error) => Some(Err(error.into())),
    }))
}

#[cfg(test)]
mod tests {
    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn a_tree_of_any_depth_goes_on_a_small_stack() {
        let world = tempfile::tempdir().expect("a directory");
        let top = world.path().join("top");
        std::fs::create_dir(&top).expect("a directory");
        let mut folder = open(CWD, &top).expect("open");
        for _ in 0..10_000 {
            mkdirat(&folder, "d", Mode::RWXU).expect("a directory");
            folder = open(&folder, "d").expect("open");
        }
        let small = std::thread::Builder::new().stack_size(64 * 1024);
        let removed = small.spawn(move || remove_tree(&top)).expect("a thread").join();
        removed.expect("no panic").expect("removed");
        assert_eq!(std::fs::read_dir(world.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn links_are_removed_and_what_they_point_to_stays() {
        let world = tempfile::tempdir().expect("a directory");
        let (top, other) = (world.path().join("top"), world.path().join("other"));
        for folder in [&top.join("a/b"), &top.join("removed-1/removed-2"), &other] {
            std::fs::create_dir_all(folder).expect("a directory");
        }
        std::fs::write(other.join("kept"), "x").expect("a file");
        std::fs::write(top.join("a/b/file"), "x").expect("a file");
        for link in ["link", "a/link", "a/b/link"] {
            std::os::unix::fs::symlink(&other, top.join(link)).expect("a link");
        }
        remove_tree(&top).expect("removed");
        assert!(!top.exists() && other.join("kept").exists());
        remove_tree(&top).expect("nothing to do");
        let link = world.path().join("link");
        std::os::unix::fs::symlink(&other, &link).expect("a link");
        assert!(remove_tree(&link).is_err() && other.join("kept").exists(), "a link is no tree");
    }
}
