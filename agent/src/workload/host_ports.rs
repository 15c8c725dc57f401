//! Does a process of the host listen on a port? Read from the kernel's socket tables, without touching the port.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A socket that a published port would hide.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Listening {
    /// `tcp` or `udp`.
    pub(super) protocol: &'static str,
    pub(super) address: IpAddr,
    inode: u64,
}

/// Sockets of the host that receive on `port` of `address` (`None`: any address). Listening TCP, and UDP sockets without
/// a peer; the latter only below the range of ephemeral ports, where every client's socket looks like a server's.
pub(super) fn listening(port: u16, address: Option<IpAddr>) -> io::Result<Vec<Listening>> {
    let mut found = Vec::new();
    let udp = !ephemeral().contains(&port);
    for (file, protocol) in [("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp")] {
        if protocol == "udp" && !udp {
            continue;
        }
        // Not /proc/net, which is the netns of the process's first thread. No IPv6: no file.
        match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            text => found.extend(text?.lines().skip(1).filter_map(|line| parse(line, protocol, port))),
        }
    }
    found.retain(|socket| {
        let any = socket.address.is_unspecified();
        any || address.is_none_or(|address| address == socket.address.to_canonical())
    });
    Ok(found)
}

/// Could port `port` of every address of the host be published? One that cannot be asked about cannot.
pub(crate) fn is_free(port: u16) -> bool {
    listening(port, None).is_ok_and(|sockets| sockets.is_empty())
}

/// `sl local_address rem_address st … inode`: addresses as hexadecimal words in host order, states 0A (TCP_LISTEN) and 07
/// (unconnected UDP).
fn parse(line: &str, protocol: &'static str, port: u16) -> Option<Listening> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
    if *state != if protocol == "tcp" { "0A" } else { "07" } {
        return None;
    }
    let (address, number) = local.split_once(':')?;
    if u16::from_str_radix(number, 16).ok()? != port {
        return None;
    }
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let address = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => IpAddr::V4(Ipv4Addr::from(bytes)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?)),
    };
    Some(Listening { protocol, address, inode: inode.parse().ok()? })
}

fn ephemeral() -> std::ops::RangeInclusive<u16> {
    let text = super::sysctl::read("net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
    numbers.next().unwrap_or(32_768)..=numbers.next().unwrap_or(60_999)
}

impl Listening {
    /// `process 812 (nginx)`, as far as it can be found out.
    pub(super) fn process(&self) -> String {
        let link = format!("socket:[{}]", self.inode);
        let Ok(processes) = fs::read_dir("/proc") else { return "a process".to_owned() };
        for entry in processes.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
            let mut links = descriptors.flatten().filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
            if links.any(|found| found.as_os_str() == link.as_str()) {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                return format!("process {pid} ({})", name.trim());
            }
        }
        "a process".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_listening_socket_is_found_with_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let found = listening(port, None).expect("readable");
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].address, IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert!(found[0].process().starts_with(&format!("process {} (", std::process::id())));
        let elsewhere = Some(IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3)));
        assert_eq!(listening(port, elsewhere).expect("readable"), []);
        drop(listener);
        assert_eq!(listening(port, None).expect("readable"), []);
    }

    #[test]
    fn the_kernels_hexadecimal_addresses_are_understood() {
        let line = "   1: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A \
                    00000000:00000000 00:00000000 00000000     0        0 4242 1 0000000000000000 100 0 0 10 0";
        let socket = parse(line, "tcp", 8080).expect("it listens");
        assert_eq!((socket.address, socket.inode), (IpAddr::V6(Ipv6Addr::LOCALHOST), 4242));
        assert_eq!(parse(line, "tcp", 8081), None);
        assert_eq!(parse("nonsense", "tcp", 8080), None);
    }

    proptest! {
        #[test]
        fn no_line_is_too_strange_to_be_skipped(line in ".{0,200}", words in "[0-9A-F: ]{0,200}") {
            for line in [line, words] {
                prop_assert!(parse(&line, "tcp", 80).is_none_or(|socket| socket.protocol == "tcp"));
            }
        }
    }
}
