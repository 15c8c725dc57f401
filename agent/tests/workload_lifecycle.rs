//! The life of the workload network: what survives the agent, what a crash leaves, and that nothing stays in the end.

mod workload_world;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::task::Poll;

use culvert_agent::task::{AllocDir, Hierarchies};
use culvert_agent::workload::{AllocId, Network, PortMap, is_netns, listen};
use workload_world::{World, ask_from_host, in_world, neighbour, run, tell_addresses};

fn map(host_port: u16, to: u16) -> PortMap {
    PortMap { host_port, to, addr: None, owner: "web:http".into() }
}

/// What can be seen of the host from outside: links, addresses, routes, rules, kernel settings, names.
fn host() -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    for what in ["link", "addr", "route", "rule"] {
        for family in ["-4", "-6"] {
            // The bridge changes its state with its ports; that it is there shows in its kernel settings below.
            let text = run("ip", &[family, "-o", what]);
            let lines: Vec<&str> = text.lines().filter(|line| !line.contains(" culvert0")).collect();
            seen.insert(format!("ip {family} {what}"), lines.join("\n"));
        }
    }
    seen.insert("nft".into(), run("nft", &["list", "ruleset"]));
    for family in ["ipv4", "ipv6"] {
        let root = Path::new("/proc/sys/net").join(family).join("conf");
        for entry in std::fs::read_dir(root).expect("settings").flatten() {
            for setting in std::fs::read_dir(entry.path()).expect("settings").flatten() {
                if let Ok(value) = std::fs::read_to_string(setting.path())
                    && setting.file_name() != "stable_secret"
                {
                    seen.insert(setting.path().display().to_string(), value);
                }
            }
        }
    }
    let value = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("a setting");
    seen.insert("ip_forward".into(), value);
    let netns =
        std::fs::read_dir("/run/netns").map(|entries| entries.flatten().map(|entry| entry.file_name()).collect());
    seen.insert("netns".into(), format!("{:?}", netns.unwrap_or_else(|_| Vec::new())));
    seen
}

/// The kernel removes some things, routes of a deleted link for one, a moment after it said so.
async fn assert_becomes(before: &BTreeMap<String, String>, when: &str) {
    for _ in 0..100 {
        if host() == *before {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_same(before, &host(), when);
}

fn assert_same(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>, when: &str) {
    let names = before.keys().chain(after.keys());
    let differences: Vec<_> = names
        .filter(|name| before.get(*name) != after.get(*name))
        .map(|name| format!("{name}: {:?} became {:?}", before.get(name), after.get(name)))
        .collect();
    assert!(differences.is_empty(), "{when}:\n{}", differences.join("\n"));
}

#[test]
fn leaving_puts_the_host_back_as_it_was() {
    in_world("leave", |world| async move {
        neighbour("outside", &["10.1.0.1/24", "2001:db8:1::1/64"], &["10.1.0.2/24"]);
        std::fs::write("/proc/sys/net/ipv4/conf/all/accept_redirects", "0").expect("written");
        std::fs::write("/proc/sys/net/ipv4/conf/o-outside/forwarding", "1").expect("written");
        run("nft", &["add table ip others; add chain ip others input { type filter hook input priority 0; }"]);
        let before = host();
        let network = Network::open(world.settings()).await.expect("opened");
        for port in 9002..9005 {
            let id = AllocId::random();
            network.create(&id).await.expect("created");
            network.publish(&id, &[map(port, 80)]).await.expect("published");
        }
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read").trim(), "1");
        // A second agent after a crash of the first must not take its changes for the host's own settings.
        drop(network);
        let network = Network::open(world.settings()).await.expect("opened again");
        network.close_all().await.expect("closed");
        assert_becomes(&before, "after leaving").await;
        assert!(!world.settings().data_dir.join("network.json").exists());
        assert!(world.settings().data_dir.join("node.json").exists(), "the node's identity stays");
    });
}

#[test]
fn a_restarted_agent_adopts_what_lives_and_keeps_addresses() {
    in_world("adopt", |world| async move {
        let (one, other) = (AllocId::random(), AllocId::random());
        let network = Network::open(world.settings()).await.expect("opened");
        let before = network.create(&one).await.expect("created");
        let released = network.create(&other).await.expect("created").addr4;
        network.publish(&one, &[map(9002, 9001)]).await.expect("published");
        network.remove(&other).await.expect("removed");
        let address = "[::]:9001".parse().expect("an address");
        tell_addresses(listen(&before.netns, address).await.expect("listening"));
        drop(network); // as kill -9 does: no clean-up runs

        let network = Network::open(world.settings()).await.expect("opened again");
        ask_from_host("127.0.0.1:9002").await.expect("published through the restart");
        assert_eq!(network.create(&one).await.expect("adopted"), before, "same netns, interface and addresses");
        assert_eq!(network.reconcile(std::slice::from_ref(&one)).await.expect("reconciled"), [] as [String; 0]);
        ask_from_host("127.0.0.1:9002").await.expect("still published");
        assert_eq!(network.workload(&one).await.expect("looked up"), Some(before.clone()));
        assert_eq!(network.workload(&other).await.expect("looked up"), None);
        let next = network.create(&AllocId::random()).await.expect("created");
        assert_ne!(next.addr4, released, "a released address is used last");

        // The host's reboot: the kernel's objects are gone, the records are not.
        for name in [&before, &next] {
            run("ip", &["link", "del", &name.host_interface]);
            run("ip", &["netns", "del", name.netns.file_name().and_then(|name| name.to_str()).expect("a name")]);
        }
        run("nft", &["delete", "table", "inet", "culvert"]);
        run("ip", &["link", "del", "culvert0"]);
        drop(network);
        let network = Network::open(world.settings()).await.expect("opened after a reboot");
        let again = network.create(&one).await.expect("made again");
        assert_eq!((again.addr4, again.addr6, again.mac), (before.addr4, before.addr6, before.mac));
        tell_addresses(listen(&again.netns, address).await.expect("listening"));
        ask_from_host("127.0.0.1:9002").await.expect("published again");
        network.close_all().await.expect("closed");
    });
}

#[test]
fn a_broken_network_is_mended_around_what_lives_in_it() {
    in_world("mended", |world| async move {
        let one = AllocId::random();
        let network = Network::open(world.settings()).await.expect("opened");
        let before = network.create(&one).await.expect("created");
        network.publish(&one, &[map(9002, 9001)]).await.expect("published");
        tell_addresses(listen(&before.netns, "[::]:9001".parse().expect("an address")).await.expect("listening"));
        drop(network);
        for broken in [before.host_interface.as_str(), "culvert0"] {
            run("ip", &["link", "del", broken]);
            let network = Network::open(world.settings()).await.expect("opened again");
            let after = network.create(&one).await.expect("mended");
            assert_eq!(
                (after.netns_cookie, after.addr4, after.addr6),
                (before.netns_cookie, before.addr4, before.addr6)
            );
            ask_from_host("127.0.0.1:9002").await.expect("what lived inside is reached again");
        }
        Network::open(world.settings()).await.expect("opened").close_all().await.expect("closed");
    });
}

/// Polls `future` at most `steps` times and drops it: a crash at that step, as far as the kernel and the disk can tell.
/// Returns whether it was done by then.
async fn die_after(steps: u32, future: impl Future) -> bool {
    let mut future = pin!(future);
    let mut left = steps;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(false);
        }
        left -= 1;
        future.as_mut().poll(context).map(|_| true)
    })
    .await
}

/// Waits for threads of an abandoned `create` that are still inside the kernel.
async fn let_threads_end() {
    workload_world::eventually("threads of the abandoned step end", async || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        !tasks
            .map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default())
            .any(|name| name.trim() == "netns")
    })
    .await;
}

async fn crash_at_every_step(world: World, reconcile: bool) {
    let settings = world.settings();
    drop(Network::open(settings.clone()).await.expect("opened"));
    let before = host();
    let mut steps = 0;
    loop {
        steps += 1;
        assert!(steps < 500, "creation has an end");
        let id = AllocId::random();
        let network = Network::open(settings.clone()).await.expect("opened");
        let done = die_after(steps, network.create(&id)).await;
        let_threads_end().await;
        drop(network);
        let network = Network::open(settings.clone()).await.expect("opened after the crash");
        if reconcile {
            network.reconcile(&[]).await.expect("reconciled");
        } else {
            // The record lives: the allocation is made whole, whatever was there.
            let workload = network.create(&id).await.expect("made whole");
            assert!(is_netns(&workload.netns));
            network.remove(&id).await.expect("removed");
        }
        assert_becomes(&before, &format!("crash at step {steps}")).await;
        if done {
            break;
        }
    }
    assert!(steps > 10, "creation was cut into {steps} steps only: this test sees nothing");
}

#[test]
fn reconciliation_removes_what_a_crash_at_any_step_left() {
    in_world("crash", |world| crash_at_every_step(world, true));
}

#[test]
fn creation_makes_whole_what_a_crash_at_any_step_left() {
    in_world("whole", |world| crash_at_every_step(world, false));
}

#[test]
fn reconciliation_removes_everything_of_ours_and_nothing_else() {
    in_world("reconcile", |world| async move {
        let settings = world.settings();
        let network = Network::open(settings.clone()).await.expect("opened");
        let (live, stale) = (AllocId::random(), AllocId::random());
        let kept = network.create(&live).await.expect("created");
        let gone = network.create(&stale).await.expect("created");
        network.publish(&stale, &[map(9002, 80)]).await.expect("published");
        // Leftovers without a record: a half-made netns, an interface, a cgroup with a process, a mount.
        std::fs::write("/run/netns/culvert-deadbeef", "").expect("written");
        run("ip", &["link", "add", "cvdeadbeef", "type", "veth", "peer", "name", "peer0"]);
        let hierarchies = Hierarchies::find().expect("cgroup2");
        let group = hierarchies.cgroup2().join(&world.cgroup_parent).join(stale.as_str()).join("web");
        std::fs::create_dir_all(&group).expect("a cgroup");
        let mut process = std::process::Command::new("sleep").arg("1000").spawn().expect("a process");
        std::fs::write(group.join("cgroup.procs"), process.id().to_string()).expect("joined");
        let dirs = AllocDir::new(&settings.data_dir, &stale).add_task("web", (65_534, 65_534)).expect("directories");
        let secrets = dirs.secrets.display().to_string();
        assert!(run("mount", &[]).contains(&secrets), "secrets are in memory");
        // Not ours, however similar.
        run("ip", &["netns", "add", "culvert-other"]);
        run("ip", &["link", "add", "cvlan0", "type", "veth", "peer", "name", "peer1"]);

        let removed = network.reconcile(std::slice::from_ref(&live)).await.expect("reconciled").join("\n");
        for name in ["culvert-deadbeef", "cvdeadbeef", stale.as_str()] {
            assert!(removed.contains(name), "{name} is not in: {removed}");
        }
        assert!(!process.wait().expect("it ended").success());
        assert!(!group.exists());
        assert!(!gone.netns.exists() && !Path::new("/run/netns/culvert-deadbeef").exists());
        assert!(!run("mount", &[]).contains(&secrets));
        assert!(dirs.logs.exists(), "logs stay for whoever reads them");
        let links = run("ip", &["-o", "link"]);
        assert!(!links.contains("cvdeadbeef") && !links.contains(&gone.host_interface), "{links}");
        assert!(links.contains("cvlan0") && Path::new("/run/netns/culvert-other").exists());
        assert!(!run("nft", &["list", "ruleset"]).contains("9002"));
        assert_eq!(network.create(&live).await.expect("adopted"), kept);
        AllocDir::new(&settings.data_dir, &stale).destroy().expect("removed");
        assert!(!dirs.alloc.exists());
    });
}

#[test]
fn two_allocations_may_be_made_and_removed_at_once() {
    in_world("concurrent", |world| async move {
        let network = Network::open(world.settings()).await.expect("opened");
        let ids: Vec<AllocId> = (0..8).map(|_| AllocId::random()).collect();
        let made = futures::future::join_all(ids.iter().map(|id| network.create(id))).await;
        let mut addresses: Vec<_> = made.into_iter().map(|workload| workload.expect("created").addr4).collect();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 8);
        for removed in futures::future::join_all(ids.iter().map(|id| network.remove(id))).await {
            removed.expect("removed");
        }
        assert_eq!(std::fs::read_dir("/run/netns").expect("a directory").count(), 0);
        network.remove(&ids[0]).await.expect("removed twice is removed");
    });
}

#[test]
fn a_full_subnet_is_an_error_that_says_so() {
    in_world("full", |world| async move {
        let mut settings = world.settings();
        settings.subnet.prefix = 30;
        let network = Network::open(settings).await.expect("opened");
        let id = AllocId::random();
        network.create(&id).await.expect("the only address");
        let error = network.create(&AllocId::random()).await.expect_err("full").to_string();
        let expected =
            "no free workload address: all 1 addresses of 172.26.64.0/30 are in use by allocations of this node";
        assert_eq!(error, expected);
        network.remove(&id).await.expect("removed");
        network.create(&AllocId::random()).await.expect("free again");
    });
}
