//! bpf(2): the links that aya cannot make, update or look into.
//!
//! Links are kept as plain descriptors, because all of ours are handled alike: made, pinned, found again by the next agent,
//! pointed at a new program. Layouts follow `union bpf_attr` of `include/uapi/linux/bpf.h`; the kernel takes a shorter struct
//! than its own as one with zeros at the end.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Where a program is attached: `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum AttachType {
    /// `BPF_CGROUP_SOCK_OPS`.
    CgroupSockOps = 3,
    /// `BPF_CGROUP_INET4_CONNECT`.
    CgroupConnect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`.
    CgroupConnect6 = 11,
    /// `BPF_CGROUP_INET4_GETPEERNAME`.
    CgroupGetpeername4 = 29,
    /// `BPF_CGROUP_INET6_GETPEERNAME`.
    CgroupGetpeername6 = 30,
    /// `BPF_SK_LOOKUP`.
    SkLookup = 36,
    /// `BPF_TCX_INGRESS`.
    TcxIngress = 46,
    /// `BPF_TCX_EGRESS`.
    TcxEgress = 47,
}

/// What a link holds on to, as the kernel tells it. Zero means that it is gone, and the link dead.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LinkTarget {
    /// Id of a cgroup: the inode number of its directory.
    Cgroup(u64),
    /// Inode number of a network namespace.
    Netns(u32),
    /// Index of an interface, in a namespace that is not told.
    Interface(u32),
    /// A kind of link that is none of ours; its `enum bpf_link_type`.
    Other(u32),
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// `tcx.relative_fd`, `tcx.expected_revision`: zero, at the end of the chain.
    reserved: [u64; 2],
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetach {
    link: u32,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The part of `struct bpf_map_info` that every kernel has.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct MapElement {
    map: u32,
    padding: u32,
    key: u64,
    /// `next_key`, where a key is asked for.
    value: u64,
    flags: u64,
}

#[repr(C)]
struct InfoByFd {
    fd: u32,
    length: u32,
    info: u64,
}

/// Head of `struct bpf_link_info`, and room for the largest of our kinds.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    detail: [u32; 4],
}

/// Calls bpf(2) with `attributes`.
///
/// # Safety
/// `T` must be the attributes of `command`, and every pointer in it must be valid for what the command does with it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the attributes are as large as said and live through the call; the caller answers for the rest.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>() as libc::c_uint)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

/// Takes a descriptor that the kernel has just made.
fn own(fd: libc::c_int) -> OwnedFd {
    // SAFETY: bpf(2) returned it for a command that makes descriptors; nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: RawFd) -> u32 {
    u32::try_from(fd).expect("a descriptor is not negative")
}

/// Attaches `program` to the cgroup or network namespace `target`. The program is detached when the last reference to the link,
/// descriptor or pin, goes.
///
/// # Errors
/// Those of `BPF_LINK_CREATE`: `EPERM` without the capability, `EINVAL` where the kernel knows no such attachment.
pub(crate) fn attach_to_fd(program: impl AsFd, target: impl AsFd, attach_type: AttachType) -> io::Result<OwnedFd> {
    attach(number(program.as_fd().as_raw_fd()), number(target.as_fd().as_raw_fd()), attach_type)
}

/// Attaches `program` to the interface `ifindex` of the calling thread's network namespace.
///
/// # Errors
/// Those of `BPF_LINK_CREATE`: `ENODEV` without the interface, `EINVAL` on kernels without tcx (before 6.6).
pub(crate) fn attach_to_interface(program: impl AsFd, ifindex: u32, attach_type: AttachType) -> io::Result<OwnedFd> {
    attach(number(program.as_fd().as_raw_fd()), ifindex, attach_type)
}

fn attach(program: u32, target: u32, attach_type: AttachType) -> io::Result<OwnedFd> {
    let mut attributes = LinkCreate { program, target, attach_type: attach_type as u32, flags: 0, reserved: [0; 2] };
    // SAFETY: the attributes of this command, without pointers.
    unsafe { bpf(BPF_LINK_CREATE, &mut attributes) }.map(own)
}

/// Makes `link` run `program` from now on, without a moment in which none runs.
///
/// # Errors
/// Those of `BPF_LINK_UPDATE`: `ENOLINK` when what the link was attached to is gone.
pub(crate) fn update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attributes = LinkUpdate {
        link: number(link.as_fd().as_raw_fd()),
        new_program: number(program.as_fd().as_raw_fd()),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the attributes of this command, without pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Detaches the program of `link` at once, whoever else holds on to the link: without this it ends some time after the last
/// reference has gone.
///
/// # Errors
/// Those of `BPF_LINK_DETACH`: `EOPNOTSUPP` for links that cannot.
pub(crate) fn detach(link: impl AsFd) -> io::Result<()> {
    let mut attributes = LinkDetach { link: number(link.as_fd().as_raw_fd()) };
    // SAFETY: the attributes of this command, without pointers.
    unsafe { bpf(BPF_LINK_DETACH, &mut attributes) }.map(drop)
}

/// Pins a program, map or link at `path`, in a BPF file system.
///
/// # Errors
/// Those of `BPF_OBJ_PIN`: `EEXIST`, and `EPERM` outside a BPF file system.
pub(crate) fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Object { path: name.as_ptr() as u64, fd: number(object.as_fd().as_raw_fd()), flags: 0 };
    // SAFETY: the attributes of this command; `name` ends in NUL and outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attributes) }.map(drop)
}

/// Opens what is pinned at `path`.
///
/// # Errors
/// Those of `BPF_OBJ_GET`: `ENOENT`, and `EACCES` for what is no BPF object.
pub(crate) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Object { path: name.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attributes of this command; `name` ends in NUL and outlives the call.
    unsafe { bpf(BPF_OBJ_GET, &mut attributes) }.map(own)
}

/// Removes every entry of a hash map, whatever its keys mean. Entries that others add meanwhile may stay.
///
/// # Errors
/// Those of `BPF_MAP_GET_NEXT_KEY` and `BPF_MAP_DELETE_ELEM`: `EINVAL` when the descriptor is no map.
pub(crate) fn empty_map(map: impl AsFd) -> io::Result<()> {
    let map = number(map.as_fd().as_raw_fd());
    let mut info = MapInfo::default();
    let length = u32::try_from(size_of::<MapInfo>()).expect("a small struct");
    let mut attributes = InfoByFd { fd: map, length, info: (&raw mut info) as u64 };
    // SAFETY: the attributes of this command; `info` is as large as said, writable, and outlives the call; every bit pattern
    // is valid in it.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)? };
    let mut key = vec![0_u8; info.key_size as usize];
    for _ in 0..=info.max_entries {
        // Without a key to start from the kernel tells the first one.
        let mut first = MapElement { map, padding: 0, key: 0, value: key.as_mut_ptr() as u64, flags: 0 };
        // SAFETY: the attributes of this command; `key` is as large as the map's keys, writable, and outlives the call.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut first) } {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        let mut entry = MapElement { map, padding: 0, key: key.as_ptr() as u64, value: 0, flags: 0 };
        // SAFETY: the attributes of this command; `key` is as large as the map's keys and outlives the call.
        match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut entry) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// What `link` is attached to.
///
/// # Errors
/// Those of `BPF_OBJ_GET_INFO_BY_FD`: `EINVAL` when the descriptor is no BPF object.
pub(crate) fn link_target(link: impl AsFd) -> io::Result<LinkTarget> {
    let mut info = LinkInfo::default();
    let mut attributes = InfoByFd {
        fd: number(link.as_fd().as_raw_fd()),
        length: u32::try_from(size_of::<LinkInfo>()).expect("a small struct"),
        info: (&raw mut info) as u64,
    };
    // SAFETY: the attributes of this command; `info` is as large as said, writable, and outlives the call; every bit pattern
    // is valid in it.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)? };
    // `enum bpf_link_type`; the detail begins at offset 16, aligned to 8.
    Ok(match info.kind {
        3 => LinkTarget::Cgroup(u64::from(info.detail[0]) | u64::from(info.detail[1]) << 32),
        5 => LinkTarget::Netns(info.detail[0]),
        11 => LinkTarget::Interface(info.detail[0]),
        other => LinkTarget::Other(other),
    })
}
