//! Listening sockets that the kernel programs did not see come: those of applications that listened before the programs were
//! attached, or that were crowded out of the table.
//!
//! The namespace is asked for its listening sockets, the processes of our cgroup for the descriptors that hold them, and copies of the
//! descriptors (`pidfd_getfd`) are put into the table. The copies are closed at once; the table follows the application's own close.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::maps::{HashMap as BpfHashMap, MapData, SockHash};
use culvert_ebpf_common::{LISTENER_SLOTS, ListenerKey, PortKey, PortRule, is_application};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tracing::debug;

use super::netns;
use super::sock_diag::{SockDiag, States, TcpSocket};

/// How deep cgroups are searched: `<allocation>/<task>`, and what a task makes below.
const MAX_DEPTH: usize = 8;

/// Puts the listening sockets of `workload` on ports of applications into the table, and returns how many.
///
/// # Errors
/// When the namespace cannot be asked. Processes that end meanwhile are no error.
pub(super) fn adopt(
    table: &mut SockHash<MapData, ListenerKey>,
    ports: &BpfHashMap<MapData, PortKey, PortRule>,
    workload: u32,
    netns: BorrowedFd<'_>,
    cgroup: &Path,
) -> io::Result<usize> {
    let listening = netns::enter(netns, || SockDiag::open()?.list(States::Listening))??;
    let application = |socket: &TcpSocket| {
        let key = PortKey { workload, port: socket.local_port, reserved: 0 };
        ports.get(&key, 0).is_ok_and(|rule| is_application(rule.kind))
    };
    let mut wanted: HashMap<u32, TcpSocket> =
        listening.into_iter().filter(application).map(|socket| (socket.inode, socket)).collect();
    if wanted.is_empty() {
        return Ok(0);
    }
    let mut slots: HashMap<(u8, u16), u8> = HashMap::new();
    let mut adopted = 0;
    for (socket, descriptor) in held_by(cgroup, &mut wanted) {
        let slot = slots.entry((socket.family, socket.local_port)).or_default();
        if *slot >= LISTENER_SLOTS {
            continue;
        }
        let key = ListenerKey { workload, port: socket.local_port, family: socket.family, slot: *slot };
        match table.insert(key, descriptor.as_raw_fd(), 0) {
            Ok(()) => {
                *slot += 1;
                adopted += 1;
            }
            Err(error) => debug!(workload, port = socket.local_port, %error, "a listening socket was not taken"),
        }
    }
    Ok(adopted)
}

/// Finds the holders of `wanted` among the processes of `cgroup`, and copies what they hold.
fn held_by(cgroup: &Path, wanted: &mut HashMap<u32, TcpSocket>) -> Vec<(TcpSocket, OwnedFd)> {
    let mut found = Vec::new();
    for pid in processes(cgroup, 0) {
        if wanted.is_empty() {
            break;
        }
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in entries.flatten() {
            let Some(inode) = fs::read_link(entry.path()).ok().and_then(|link| socket_inode(link.to_str()?)) else {
                continue;
            };
            let Some(socket) = wanted.get(&inode).copied() else { continue };
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Ok(descriptor) = copy(pid, number) {
                wanted.remove(&inode);
                found.push((socket, descriptor));
            }
        }
    }
    found
}

fn copy(pid: i32, descriptor: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty())?)
}

/// Processes of a cgroup and of those below it.
fn processes(cgroup: &Path, depth: usize) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    if depth < MAX_DEPTH {
        let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
        let directories = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        found.extend(directories.flat_map(|entry| processes(&entry.path(), depth + 1)));
    }
    found
}

/// Reads `socket:[4711]`.
fn socket_inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_sockets_are_read_strictly() {
        assert_eq!(socket_inode("socket:[4711]"), Some(4711));
        for link in ["socket:[]", "socket:4711", "pipe:[4711]", "/dev/null", "socket:[4711"] {
            assert_eq!(socket_inode(link), None, "{link}");
        }
    }
}
