//! Attaching to the host's end of a veth: with tcx links, or on older kernels with filters of the clsact queue discipline.
//!
//! A filter is not a link: nothing pins it, it stays with the interface and goes with it. Ours are found again by their place.

use std::io;

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{Program, TcAttachType};

use super::config::WorkloadLinks;
use super::kernel::{FROM_WORKLOAD, Kernel, TO_WORKLOAD};
use super::pins::Generation;
use super::workloads::link_name;
use crate::sys::bpf::{self, AttachType, LinkTarget};

/// Priority and handle of our filters.
const PRIORITY: u16 = 0xc01;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Which of the two ways.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TcMode {
    /// tcx links, kernel 6.6 and later.
    Tcx,
    /// Filters of clsact.
    Clsact,
}

/// The two sides of the interface; "ingress" is what the host receives, so what the workload sends.
const SIDES: [(&str, &str, AttachType, TcAttachType); 2] = [
    ("in", FROM_WORKLOAD, AttachType::TcxIngress, TcAttachType::Ingress),
    ("out", TO_WORKLOAD, AttachType::TcxEgress, TcAttachType::Egress),
];

impl TcMode {
    /// Attaches both programs to the host's end of the workload's veth, or points what is attached at them.
    pub(super) fn attach(self, kernel: &mut Kernel, generation: &Generation, links: &WorkloadLinks) -> io::Result<()> {
        let ifindex = links.host_ifindex;
        for (kind, name, tcx, clsact) in SIDES {
            match self {
                Self::Tcx => {
                    let program = kernel.program(name)?;
                    let target = LinkTarget::Interface(ifindex);
                    generation.attach(&link_name(links.id, kind), target, program, || {
                        bpf::attach_to_interface(program, ifindex, tcx)
                    })?;
                }
                Self::Clsact => attach_filter(kernel, name, ifindex, clsact)?,
            }
        }
        Ok(())
    }

    /// Removes filters, which unlike links do not go with their pin.
    pub(super) fn detach(self, ifindex: u32) -> io::Result<()> {
        if self == Self::Tcx {
            return Ok(());
        }
        // Without the interface there are no filters; it may go at any moment, with its namespace.
        let Ok(interface) = interface_name(ifindex) else { return Ok(()) };
        for (_, _, _, side) in SIDES {
            match SchedClassifierLink::attached(&interface, side, PRIORITY, HANDLE, None) {
                // Detached on drop; a filter that is not there is no error.
                Ok(filter) => drop(filter),
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn attach_filter(kernel: &mut Kernel, name: &str, ifindex: u32, side: TcAttachType) -> io::Result<()> {
    let interface = interface_name(ifindex)?;
    match qdisc_add_clsact(&interface) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        other => other.map_err(io::Error::other)?,
    }
    let Some(Program::SchedClassifier(program)) = kernel.program_mut(name) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let options = TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None });
    let link = match program.attach_with_options(&interface, side, options) {
        Ok(link) => link,
        // Ours, of an earlier agent: replaced in one step.
        Err(_) => {
            let present = SchedClassifierLink::attached(&interface, side, PRIORITY, HANDLE, None)?;
            program.attach_to_link(present).map_err(io::Error::other)?
        }
    };
    // Dropping the link would remove the filter.
    std::mem::forget(program.take_link(link).map_err(io::Error::other)?);
    Ok(())
}

fn interface_name(ifindex: u32) -> io::Result<String> {
    let name = nix::net::if_::if_indextoname(ifindex)?;
    name.into_string().map_err(io::Error::other)
}

/// Tries both ways on `ifindex`, for nothing but to see which one the kernel takes.
pub(super) fn probe(kernel: &mut Kernel, ifindex: u32) -> io::Result<TcMode> {
    let tcx = SIDES
        .iter()
        .try_for_each(|(_, name, tcx, _)| bpf::attach_to_interface(kernel.program(name)?, ifindex, *tcx).map(drop));
    let Err(tcx) = tcx else { return Ok(TcMode::Tcx) };
    for (_, name, _, side) in SIDES {
        attach_filter(kernel, name, ifindex, side)
            .map_err(|clsact| io::Error::other(format!("neither by tcx ({tcx}) nor by clsact ({clsact})")))?;
    }
    Ok(TcMode::Clsact)
}
