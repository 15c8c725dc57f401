//! A connect that io_uring makes passes the same hooks. The ring is made by hand, as io_uring(7) describes it: one entry, one answer.

#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod common;

use std::io;
use std::mem::offset_of;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{PATIENCE, Pair, echo, greeting, upstream4};
use socket2::{Domain, SockAddr, Socket, Type};

const IORING_OP_CONNECT: u8 = 16;
const IORING_ENTER_GETEVENTS: libc::c_uint = 1;
const IORING_OFF_SQ_RING: libc::off_t = 0;
const IORING_OFF_SQES: libc::off_t = 0x1000_0000;
/// `IORING_FEAT_SINGLE_MMAP`: both queues are in one mapping; since 5.4.
const SINGLE_MMAP: u32 = 1;
const RING_SIZE: usize = 4096;

/// `struct io_sqring_offsets`, and `struct io_cqring_offsets`, in which `other` is the counter of overflows and the place of answers.
#[repr(C)]
#[derive(Default)]
struct Offsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    other: [u32; 2],
    array: u32,
    reserved: [u32; 3],
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    thread: [u32; 2],
    features: u32,
    reserved: [u32; 4],
    sq: Offsets,
    cq: Offsets,
}

/// `struct io_uring_sqe`.
#[repr(C)]
#[derive(Default)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    rest: [u64; 5],
}

/// `struct io_uring_cqe`.
#[repr(C)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

const _: () = assert!(size_of::<Params>() == 120 && size_of::<Submission>() == 64 && size_of::<Completion>() == 16);
const _: () = assert!(offset_of!(Params, sq) == 40 && offset_of!(Offsets, array) == 24);

/// Connects `socket` to `to` with io_uring. `None` when the kernel has no io_uring for us.
fn connect(socket: &Socket, to: SocketAddr) -> Option<io::Result<()>> {
    let mut params = Params::default();
    // SAFETY: `params` is what the call wants, and outlives it.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut params) };
    if ring < 0 {
        let error = io::Error::last_os_error();
        assert!(std::env::var_os("CI").is_none(), "no io_uring, and a skip must not be taken for a pass: {error}");
        #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
        {
            eprintln!("SKIPPED: no io_uring: {error}");
        }
        return None;
    }
    // SAFETY: the descriptor was made just now.
    let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
    assert_ne!(params.features & SINGLE_MMAP, 0, "every kernel with eBPF links has it");
    let queues = map(&ring, IORING_OFF_SQ_RING);
    let submissions = map(&ring, IORING_OFF_SQES);

    let address = SockAddr::from(to);
    let entry = Submission {
        opcode: IORING_OP_CONNECT,
        fd: socket.as_raw_fd(),
        offset: address.len().into(),
        address: address.as_ptr() as u64,
        ..Submission::default()
    };
    // SAFETY: both mappings are as large as the kernel says these places are, and live to the end of the function; `address` too.
    let result = unsafe {
        submissions.cast::<Submission>().write(entry);
        queues.add(params.sq.array as usize).cast::<u32>().write(0);
        (*queues.add(params.sq.tail as usize).cast::<AtomicU32>()).store(1, Ordering::Release);
        let done = libc::syscall(
            libc::SYS_io_uring_enter,
            ring.as_raw_fd(),
            1,
            1,
            IORING_ENTER_GETEVENTS,
            ptr::null::<u8>(),
            0_usize,
        );
        assert_eq!(done, 1, "{}", io::Error::last_os_error());
        assert_eq!((*queues.add(params.cq.tail as usize).cast::<AtomicU32>()).load(Ordering::Acquire), 1);
        queues.add(params.cq.other[1] as usize).cast::<Completion>().read().result
    };
    for mapping in [queues, submissions] {
        // SAFETY: mapped above, not used any more.
        unsafe { libc::munmap(mapping.cast(), RING_SIZE) };
    }
    Some(if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) })
}

fn map(ring: &OwnedFd, offset: libc::off_t) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, at a place of the kernel's choice.
    let mapping = unsafe { libc::mmap(ptr::null_mut(), RING_SIZE, access, libc::MAP_SHARED, ring.as_raw_fd(), offset) };
    assert_ne!(mapping, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    mapping.cast()
}

#[test]
fn a_connect_by_io_uring_goes_direct() {
    let Some(pair) = Pair::new("iouring") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "b");
    let stream = pair.a.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        connect(&socket, upstream4()).map(|connected| {
            connected.expect("the direct path");
            TcpStream::from(socket)
        })
    });
    let Some(mut stream) = stream else { return };
    stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
    assert_eq!(greeting(&mut stream), "b");
    echo(&mut stream, b"hello").expect("an echo");
    assert_eq!(stream.peer_addr().expect("a peer"), upstream4());
    assert_eq!(server.peers()[0].0.ip(), pair.a.addr4);
}
