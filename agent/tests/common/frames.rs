//! Crafted frames, and the guard's programs that judge them in test runs (`BPF_PROG_TEST_RUN`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::{Array, HashMap, MapData};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use culvert_agent::datapath::OBJECT;
use culvert_ebpf_common::{Address, Quota, Settings, Workload, map};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const ADDR4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
pub const OTHER4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 6);
pub const ADDR6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5);
pub const OTHER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 6);
pub const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 5);
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
/// `TC_ACT_UNSPEC`, on to the next program, and `TC_ACT_SHOT`.
pub const PASS: u32 = u32::MAX;
pub const DROP: u32 = 2;

/// The programs, loaded without being attached; one workload behind interface 1, which frames of a test run come from.
pub struct Programs(pub Ebpf);

impl Programs {
    pub fn load(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "{test} needs root, and must not be skipped under CI");
            return None;
        }
        let mut programs = Self(EbpfLoader::new().load(OBJECT).expect("the object loads"));
        for name in ["from_workload", "to_workload"] {
            programs.program(name).load().expect("the program is verified");
        }
        let settings = Settings { epoch: 0, auth_ttl: 1, auth_cap: 1, refusals_per_second: 8 };
        let mut map: Array<_, Settings> =
            programs.0.map_mut(map::SETTINGS).expect("a map").try_into().expect("its type");
        map.set(0, settings, 0).expect("written");
        let workload = Workload {
            id: 1,
            flags: 0,
            address4: ADDR4.into(),
            address6: ADDR6.into(),
            ifindex: 1,
            mac: MAC.into(),
            ..Workload::default()
        };
        programs.table::<u32, Workload>(map::WORKLOAD_IF).insert(1, workload, 0).expect("written");
        programs.table::<u32, Quota>(map::QUOTA).insert(1, Quota::default(), 0).expect("written");
        for (address, id) in [(OTHER4.into(), 2), (IpAddr::V6(OTHER6), 2)] {
            let other = Workload { id, ..workload };
            programs
                .table::<Address, Workload>(map::WORKLOAD_ADDR)
                .insert(Address::from(address), other, 0)
                .expect("written");
        }
        Some(programs)
    }

    pub fn program(&mut self, name: &str) -> &mut SchedClassifier {
        self.0.program_mut(name).expect("a program").try_into().expect("its type")
    }

    pub fn table<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        self.0.map_mut(name).expect("a map").try_into().expect("its type")
    }

    pub fn run(&mut self, name: &str, frame: &[u8]) -> u32 {
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        self.program(name).test_run(options).expect("a test run").return_value
    }

    pub fn leaves(&mut self, frame: &[u8]) -> bool {
        self.verdict("from_workload", frame)
    }

    pub fn enters(&mut self, frame: &[u8]) -> bool {
        self.verdict("to_workload", frame)
    }

    pub fn verdict(&mut self, name: &str, frame: &[u8]) -> bool {
        match self.run(name, frame) {
            PASS => true,
            DROP => false,
            other => panic!("{name} returned {other}"),
        }
    }
}

pub fn ethernet(source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

pub fn arp(mac: [u8; 6], sender_mac: [u8; 6], sender: Ipv4Addr) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend_from_slice(&sender_mac);
    arp.extend_from_slice(&sender.octets());
    arp.extend_from_slice(&[0; 6]);
    arp.extend_from_slice(&OTHER4.octets());
    ethernet(mac, 0x0806, &arp)
}

pub fn ipv4(
    mac: [u8; 6],
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    fragment: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(&fragment.to_be_bytes());
    packet.extend_from_slice(&[64, protocol, 0, 0]);
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(payload);
    ethernet(mac, 0x0800, &packet)
}

pub fn ipv6(mac: [u8; 6], source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[next, 255]);
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(payload);
    ethernet(mac, 0x86dd, &packet)
}

pub fn tcp(destination_port: u16, flags: u8) -> Vec<u8> {
    let mut segment = 50_000_u16.to_be_bytes().to_vec();
    segment.extend_from_slice(&destination_port.to_be_bytes());
    segment.extend_from_slice(&[0; 8]);
    segment.extend_from_slice(&[0x50, flags, 0, 0, 0, 0, 0, 0]);
    segment
}

pub fn udp(destination_port: u16) -> Vec<u8> {
    let mut datagram = 50_000_u16.to_be_bytes().to_vec();
    datagram.extend_from_slice(&destination_port.to_be_bytes());
    datagram.extend_from_slice(&[0, 8, 0, 0]);
    datagram
}

/// A neighbour discovery message: type, target (for 135 and 136), options.
pub fn neighbour(kind: u8, target: Option<Ipv6Addr>, options: &[(u8, [u8; 6])]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.map(|target| target.octets()).into_iter().flatten());
    for (option, mac) in options {
        message.extend_from_slice(&[*option, 1]);
        message.extend_from_slice(mac);
    }
    message
}
