//! Programs of others at the hooks of ours: on a cgroup above, on the same one, and on one below.

mod common;

use std::fs::{self, File};
use std::path::Path;

use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use aya::{Ebpf, EbpfLoader};
use common::{Pair, echo, greeting, join_cgroup, upstream4, upstream6};
use culvert_agent::datapath::OBJECT;

/// Programs at `connect4` and `connect6` of a cgroup that let everything pass as it is: ours, with empty tables. They are gone
/// when this is dropped.
fn attach_to(cgroup: &Path) -> Ebpf {
    let mut other = EbpfLoader::new().load(OBJECT).expect("the object loads");
    for name in ["connect4", "connect6"] {
        let program: &mut CgroupSockAddr = other.program_mut(name).expect("a program").try_into().expect("its type");
        program.load().expect("the program is verified");
        let cgroup = File::open(cgroup).expect("a cgroup");
        // A link always lets others stand beside it; it takes no flag that says so.
        program.attach(cgroup, CgroupAttachMode::Single).expect("attached");
    }
    other
}

/// A connection over each family goes direct, and none of it shows.
fn goes_direct(pair: &Pair, when: &str) {
    for to in [upstream4(), upstream6()] {
        let mut stream = pair.a.connect(to).unwrap_or_else(|error| panic!("{when}: {to}: {error}"));
        assert_eq!(greeting(&mut stream), "b", "{when}: {to}");
        echo(&mut stream, b"hello").expect("an echo");
        assert_eq!(stream.peer_addr().expect("a peer"), to, "{when}");
    }
}

#[test]
fn programs_of_others_do_not_keep_ours_from_their_work() {
    let Some(pair) = Pair::with("others", |config| config.cgroup.push("mesh")) else { return };
    let above = pair.world.cgroup();
    let (mesh, below) = (above.join("mesh"), above.join("mesh/app"));
    fs::create_dir(&below).expect("a cgroup");
    join_cgroup(&below);
    let _proxies = ["127.0.0.1:8080", "[::1]:8080"].map(|address| pair.a.serve(address, "proxy"));
    let _server = pair.b.serve("[::]:9001", "b");
    let ours = pair.program_ids();
    goes_direct(&pair, "alone");
    let mut others = [above, &mesh, &below].map(attach_to).into_iter();
    goes_direct(&pair, "beside all of them");
    while let Some(other) = others.next() {
        drop(other);
        goes_direct(&pair, &format!("beside {} of them", others.len()));
    }
    assert_eq!(pair.program_ids(), ours, "ours are attached still");
}
