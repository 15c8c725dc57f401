//! Whether this kernel can do what the direct path needs: tried out in a network namespace of its own, which is then gone.

use std::fs::File;
use std::io;
use std::net::TcpListener;

use super::config::DatapathUnavailable;
use super::kernel::{Kernel, LOOKUP};
use super::netns;
use super::sock_diag::{SockDiag, States};
use super::tc::{self, TcMode};
use crate::sys;
use crate::sys::bpf::{self, AttachType};

/// Index of the loopback interface in every new network namespace.
const LOOPBACK: u32 = 1;

/// Tries every attachment that a workload will need, and ending a socket; returns how packets can be guarded.
pub(super) fn probe(kernel: &mut Kernel) -> Result<TcMode, DatapathUnavailable> {
    let unavailable = |step| move |error: io::Error| DatapathUnavailable::new(step, &error);
    netns::enter_new(|| {
        sys::netns_cookie(TcpListener::bind("0.0.0.0:0").map_err(unavailable("listen"))?)
            .map_err(unavailable("read the cookie of a network namespace"))?;
        attach_lookup(kernel).map_err(unavailable("attach to a network namespace"))?;
        end_a_socket().map_err(unavailable("end a socket (SOCK_DESTROY)"))?;
        tc::probe(kernel, LOOPBACK).map_err(unavailable("attach to an interface"))
    })
    .map_err(unavailable("make a network namespace to try in"))?
}

fn attach_lookup(kernel: &Kernel) -> io::Result<()> {
    let netns = File::open("/proc/thread-self/ns/net")?;
    bpf::attach_to_fd(kernel.program(LOOKUP)?, netns, AttachType::SkLookup).map(drop)
}

/// Without this the kernel cannot enforce a revocation.
fn end_a_socket() -> io::Result<()> {
    let _listener = TcpListener::bind("0.0.0.0:0")?;
    let mut diag = SockDiag::open()?;
    let sockets = diag.list(States::Listening)?;
    let listener = sockets.first().ok_or(io::ErrorKind::NotFound)?;
    if diag.destroy(listener)? { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}
