//! The proof of each claim of the demo.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use super::agent::Demo;
use super::sniff::{Seen, Sniffer};
use super::{entries, root};
use crate::command::output;

/// How long a change may take to show in the dashboard, which asks every quarter of a second and dials every two.
const SHOWS_WITHIN: Duration = Duration::from_secs(20);
/// What the counting service's requests and answers hold.
const PAYLOAD: [&[u8]; 2] = [b"GET / HTTP/1.1", b"\"count\":"];
/// How long traffic is watched.
const WATCH: Duration = Duration::from_secs(4);

pub(crate) fn prove(demo: &Demo) -> anyhow::Result<()> {
    let api = addresses(demo, "api")?;
    println!("\n1. encryption = always: the count moves, the wire carries TLS and never the payload");
    counts(demo)?;
    let seen = watch(&api)?;
    ensure!(seen.tls > 0, "no TLS record went to or from {api:?}");
    ensure!(seen.plain == 0, "{} packets to or from {api:?} carry the payload in plain text", seen.plain);
    println!("   {} TLS records, payload never seen", seen.tls);
    path(demo, "proxied")?;

    println!("2. encryption = between-nodes, switched live: the count moves on the direct path");
    let direct = demo.api("/v1/culvert/status")?["Ebpf"]["Active"] == true;
    demo.encrypt("between-nodes")?;
    counts(demo)?;
    if direct {
        path(demo, "direct")?;
        let seen = watch(&api)?;
        // The same eyes that saw nothing before see the payload now: the first claim was not blindness.
        ensure!(seen.plain > 0, "the direct path shows no payload: the packet socket is blind");
        println!("   payload seen by the same packet socket: it is not blind");
    } else {
        let reason = demo.api("/v1/culvert/status")?["Ebpf"]["Reason"].clone();
        ensure!(
            std::env::var_os("CI").is_none(),
            "this kernel offers no direct path, and half the proof with it: {reason}"
        );
        println!("   this kernel offers no direct path: {reason}");
    }

    for encryption in ["between-nodes", "always"] {
        println!("3. deny ends it, allow brings it back ({encryption})");
        demo.encrypt(encryption)?;
        counts(demo)?;
        demo.culvert(&["intention", "create", "-replace", "-deny", "count-dashboard", "count-api"])?;
        demo.until("the dashboard disconnects", SHOWS_WITHIN, || {
            demo.state().is_ok_and(|state| state["connected"] == false)
        })?;
        let stopped = demo.state()?["count"].clone();
        std::thread::sleep(Duration::from_secs(3));
        let state = demo.state()?;
        ensure!(
            state["connected"] == false && state["count"] == stopped,
            "the count moves although it is denied: {state}"
        );
        println!("   denied: {}", state["error"]);
        demo.culvert(&["intention", "create", "-replace", "-allow", "count-dashboard", "count-api"])?;
        counts(demo)?;
        println!("   allowed: counting again");
    }
    println!("{}", demo.culvert(&["job", "status", "countdash"])?);
    Ok(())
}

/// The count grows.
fn counts(demo: &Demo) -> anyhow::Result<()> {
    let before = demo.wait_connected(SHOWS_WITHIN)?;
    demo.until("the count grows", SHOWS_WITHIN, || {
        demo.state().is_ok_and(|state| state["connected"] == true && state["count"].as_u64() > Some(before))
    })
}

/// New connections take this path, as the metrics count it.
fn path(demo: &Demo, path: &str) -> anyhow::Result<()> {
    let before = connections(demo, path)?;
    demo.until(&format!("connections take the {path} path"), SHOWS_WITHIN, || {
        connections(demo, path).is_ok_and(|now| now > before)
    })?;
    println!("   new connections take the {path} path");
    Ok(())
}

fn connections(demo: &Demo, path: &str) -> anyhow::Result<u64> {
    let text = demo.get("127.0.0.1:8500", "/v1/culvert/metrics")?;
    let label = format!("path=\"{path}\"");
    let lines = text.lines().filter(|line| line.starts_with("culvert_connections_total{") && line.contains(&label));
    lines.map(|line| line.rsplit(' ').next().unwrap_or_default().parse::<u64>().context("a metric")).sum()
}

/// Looks at all packets to and from `addresses` for a while.
fn watch(addresses: &[IpAddr]) -> anyhow::Result<Seen> {
    let sniffer = Sniffer::start(addresses, &PAYLOAD)?;
    std::thread::sleep(WATCH);
    sniffer.finish()
}

/// The addresses of the allocation of `group`, of both families.
fn addresses(demo: &Demo, group: &str) -> anyhow::Result<Vec<IpAddr>> {
    let job = demo.api("/v1/culvert/job/countdash")?;
    let allocations = job["Allocations"].as_array().context("allocations")?;
    let allocation = allocations.iter().find(|one| one["Group"] == group).with_context(|| group.to_owned())?;
    let addresses = allocation["Addresses"].as_array().context("addresses")?;
    addresses.iter().map(|address| address.as_str().context("address")?.parse().context("address")).collect()
}

/// Processes of the mesh and of the workloads, as the agent names them.
pub(crate) fn processes(demo: &Demo) -> anyhow::Result<Vec<u64>> {
    let job = demo.api("/v1/culvert/job/countdash")?;
    let tasks = job["Allocations"].as_array().into_iter().flatten().filter_map(|one| one["Tasks"][0]["Pid"].as_u64());
    Ok(tasks.chain(demo.api("/v1/culvert/status")?["Worker"]["Pid"].as_u64()).collect())
}

/// Nothing with our names is left, and none of `processes`.
pub(crate) fn nothing_left(processes: &[u64]) -> anyhow::Result<()> {
    let mut left: Vec<String> = Vec::new();
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let mounts: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
    let cgroups = mounts.iter().filter(|mount| mount[2].starts_with("cgroup"));
    let cgroups = cgroups.map(|mount| Path::new(mount[1]).join("culvert")).filter(|cgroup| cgroup.exists());
    left.extend(cgroups.map(|cgroup| cgroup.display().to_string()));
    let places = [
        ("/run/netns", "culvert-"),
        ("/sys/class/net", "culvert0"),
        ("/sys/class/net", "cv"),
        ("/sys/fs/bpf/culvert", "v"),
        ("/run/culvert/alloc", ""),
        ("/run/culvert/allocations", ""),
    ];
    for (folder, prefix) in places {
        left.extend(entries(Path::new(folder), prefix).iter().map(|path| path.display().to_string()));
    }
    let ours = |mount: &&str| mount.starts_with("/run/culvert/") || mount.starts_with("/run/netns/culvert-");
    left.extend(mounts.iter().map(|mount| mount[1]).filter(ours).map(|mount| format!("mount {mount}")));
    let living = processes.iter().filter(|process| Path::new(&format!("/proc/{process}")).exists());
    left.extend(living.map(|process| format!("process {process}")));
    let tables = output(Command::new("nft").args(["list", "tables"]).current_dir(root()))?;
    left.extend(tables.lines().filter(|line| line.ends_with(" culvert")).map(str::to_owned));
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    println!("nothing is left: no process, netns, link, nftables table, pin, mount, cgroup or allocation directory");
    Ok(())
}
