//! Where cgroup2 is, and whether cgroup v1 stands in its way.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What `/proc/self/mountinfo` says about cgroups.
#[derive(Debug, Default, Eq, PartialEq)]
struct Mounts {
    /// Mount point of cgroup2.
    unified: Option<PathBuf>,
    /// Mount points of v1 hierarchies with `net_cls` or `net_prio`.
    network_v1: Vec<PathBuf>,
}

/// Mount point of cgroup2: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid hosts, or wherever it is.
///
/// # Errors
/// When mounts cannot be read, or cgroup2 is not mounted.
pub fn unified_root() -> io::Result<PathBuf> {
    let mounts = parse(&fs::read_to_string("/proc/self/mountinfo")?);
    mounts.unified.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "cgroup2 is not mounted"))
}

/// A cgroup v1 hierarchy whose `net_cls` or `net_prio` is in use, if there is one: on older kernels these controllers and
/// cgroup2 share a field of the socket, and a socket marked by them is lost to programs attached to cgroup2.
pub(super) fn conflicting_v1() -> io::Result<Option<PathBuf>> {
    let mounts = parse(&fs::read_to_string("/proc/self/mountinfo")?);
    Ok(mounts.network_v1.into_iter().find(|root| in_use(root, 0)))
}

/// How deep hierarchies are searched; container managers use two to four levels.
const MAX_DEPTH: usize = 8;

fn in_use(directory: &Path, depth: usize) -> bool {
    let class = fs::read_to_string(directory.join("net_cls.classid")).unwrap_or_default();
    let priorities = fs::read_to_string(directory.join("net_prio.ifpriomap")).unwrap_or_default();
    if !matches!(class.trim(), "" | "0")
        || priorities.lines().any(|line| !matches!(line.rsplit_once(' '), None | Some((_, "0"))))
    {
        return true;
    }
    let Ok(entries) = fs::read_dir(directory) else { return false };
    depth < MAX_DEPTH
        && entries
            .flatten()
            .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()) && in_use(&entry.path(), depth + 1))
}

/// Reads mountinfo (proc(5)): `… <root> <mount point> <options> <tags>* - <type> <source> <super options>`.
fn parse(mountinfo: &str) -> Mounts {
    let mut mounts = Mounts::default();
    for line in mountinfo.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4) else { continue };
        let mut filesystem = filesystem.split(' ');
        let (kind, options) = (filesystem.next(), filesystem.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup2") if mounts.unified.is_none() => mounts.unified = Some(unescape(point)),
            Some("cgroup") if options.split(',').any(|option| matches!(option, "net_cls" | "net_prio")) => {
                mounts.network_v1.push(unescape(point));
            }
            _ => {}
        }
    }
    mounts
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    PathBuf::from(text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_on_unified_and_on_hybrid_hosts() {
        let unified = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse(unified).unified, Some(PathBuf::from("/sys/fs/cgroup")));
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/net_cls,net_prio rw - cgroup cgroup rw,net_cls,net_prio\n\
                      41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw\n";
        let mounts = parse(hybrid);
        assert_eq!(mounts.unified, Some(PathBuf::from("/sys/fs/cgroup/uni fied")));
        assert_eq!(mounts.network_v1, [PathBuf::from("/sys/fs/cgroup/net_cls,net_prio")]);
        assert_eq!(parse("nonsense\n\n - \n"), Mounts::default());
    }

    #[test]
    fn a_class_or_a_priority_anywhere_below_is_use() {
        let root = tempfile::tempdir().expect("a directory");
        let child = root.path().join("containers/one");
        fs::create_dir_all(&child).expect("a directory");
        fs::write(child.join("net_cls.classid"), "0\n").expect("a file");
        fs::write(child.join("net_prio.ifpriomap"), "lo 0\neth0 0\n").expect("a file");
        assert!(!in_use(root.path(), 0));
        fs::write(child.join("net_prio.ifpriomap"), "lo 0\neth0 5\n").expect("a file");
        assert!(in_use(root.path(), 0));
        fs::write(child.join("net_prio.ifpriomap"), "").expect("a file");
        fs::write(child.join("net_cls.classid"), "1048577\n").expect("a file");
        assert!(in_use(root.path(), 0));
    }
}
