//! What an agent finds in its data directory. What keeps it from starting is said so that somebody can act: what is wrong, where,
//! and what to do. What a predecessor left unfinished goes.

use std::fs;
use std::io::{PipeWriter, Read as _, Write as _};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Command, Stdio};

use culvert_tests::{API, DATA_DIR, Node, NodeOptions, Process, World, binary, eventually, get};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Below it are the data directories of this test.
const FOLDER: &str = "/run/start";

/// What an agent with this data directory says before it ends, for it does not start.
fn refusal(world: &World, data_dir: &str) -> String {
    let log = format!("{FOLDER}/log");
    let file = fs::File::create(&log).expect("a log");
    let mut command = Command::new(binary("culvert"));
    command.args([
        "agent",
        "-server",
        "-bind",
        "127.0.0.1",
        "-data-dir",
        data_dir,
        "-cgroup-parent",
        &world.cgroup_parent(),
    ]);
    let mut agent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().expect("start the agent");
    let mut status = None;
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually("the agent ends", || {
            status = agent.try_wait().expect("look after the agent");
            status.is_some()
        });
    }));
    let said = fs::read_to_string(&log).expect("its log");
    if ended.is_err() {
        drop(Command::new(binary("culvert")).arg("leave").output());
        drop(agent.kill());
        drop(agent.wait());
        panic!("the agent started on {data_dir}: {said}");
    }
    assert!(!status.expect("ended").success(), "{said}");
    said
}

#[test]
fn an_agent_that_cannot_use_its_files_says_which_and_what_to_do() {
    let world = World::new("start");
    let folder = |name: &str| {
        let folder = format!("{FOLDER}/{name}");
        fs::create_dir_all(&folder).expect("a folder");
        folder
    };
    let says = |data_dir: &str, file: &str, remedy: &str| {
        let said = refusal(&world, data_dir);
        let line = said.lines().find(|line| line.contains(&format!("{data_dir}{file} cannot be used (")));
        assert!(line.is_some_and(|line| line.contains(remedy)), "{remedy:?} is not said of {data_dir}{file}: {said}");
    };

    let alien = folder("alien");
    fs::write(format!("{alien}/state.redb"), "").expect("a file");
    fs::set_permissions(format!("{alien}/state.redb"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .expect("a mode");
    chown(format!("{alien}/state.redb"), Some(65534), Some(65534)).expect("an owner");
    says(&alien, "/state.redb", "it and its folder have to belong to root");

    for file in ["state.redb", "node.json", "network.json", "worker.json"] {
        let directory = folder(&format!("directory-{file}"));
        fs::create_dir(format!("{directory}/{file}")).expect("a folder");
        says(&directory, &format!("/{file}"), "a folder is where a file belongs: move it away");
    }
    for file in ["network.json", "node.json"] {
        let damaged = folder(&format!("damaged-{file}"));
        fs::write(format!("{damaged}/{file}"), "{").expect("a file");
        says(&damaged, &format!("/{file}"), "it is damaged: restore it from a backup");
    }
    let damaged = folder("damaged");
    fs::write(format!("{damaged}/state.redb"), "not redb at all").expect("a file");
    let said = refusal(&world, &damaged);
    assert!(said.contains("/state.redb is not readable: ") && said.contains("restore it from a backup"), "{said}");

    let occupied = folder("occupied");
    fs::write(format!("{occupied}/data"), "").expect("a file");
    says(&format!("{occupied}/data"), "", "a file is where a folder belongs: move it away");

    let fixed = folder("read-only");
    world.run("mount", &["-t", "tmpfs", "tmpfs", &fixed]);
    fs::write(format!("{fixed}/node.json"), fs::read(format!("{alien}/node.json")).expect("made")).expect("written");
    world.run("mount", &["-o", "remount,ro", &fixed]);
    says(&fixed, "/state.redb", "its file system is read-only: mount it writable, or set another data_dir");
    assert!(!Path::new("/sys/fs/bpf/culvert").exists(), "who does not start leaves nothing");
    assert!(!Path::new("/run/culvert.lock").exists(), "nor a lock");
    assert!(!world.unified().join(world.cgroup_parent()).exists(), "nor a cgroup");
}

#[test]
fn what_was_being_written_when_an_agent_was_killed_is_gone_after_the_next_start() {
    let world = World::new("unfinished");
    let mut node = Node::start(&world, NodeOptions { server: true, ..NodeOptions::default() });
    node.kill();
    let id = "b6d4f8c2-0000-4000-8000-00000000002a";
    let ours = ["node.json.new", "network.json.new", "worker.json.new", "direct.json.new", "jobs/776562.json.new"]
        .map(str::to_owned)
        .into_iter()
        .chain([format!("allocations/{id}.json.new")]);
    let ours: Vec<String> = ours.map(|name| format!("{DATA_DIR}/{name}")).collect();
    let others = ["notes.json.new", "jobs/notes.json.new", "allocations/notes.new"];
    let others = others.map(|name| format!("{DATA_DIR}/{name}"));
    for path in ours.iter().chain(&others) {
        fs::write(path, "{").expect("a file");
    }
    node.spawn();
    eventually("what was left is gone", || !ours.iter().any(|path| Path::new(path).exists()));
    assert!(others.iter().all(|path| Path::new(path).exists()), "files of others stay");
    node.leave();
}

#[test]
fn an_agent_that_is_ended_while_it_starts_leaves_nothing() {
    let world = World::new("early-end");
    fs::create_dir_all(FOLDER).expect("a folder");
    let log = format!("{FOLDER}/log");
    let file = fs::File::create(&log).expect("a log");
    let mut command = Command::new(binary("culvert"));
    command.args(["agent", "-dev", "-cgroup-parent", &world.cgroup_parent()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
    let mut agent = command.spawn().expect("start the agent");
    // From then on it makes what it would have to remove.
    let begun = || fs::read_to_string(&log).is_ok_and(|said| said.contains("culvert agent serves"));
    eventually("the agent has begun", begun);
    let pid = Pid::from_raw(i32::try_from(agent.id()).expect("a process id"));
    kill(pid, Signal::SIGTERM).expect("signal the agent");
    eventually("the agent ends", || agent.try_wait().expect("look after the agent").is_some());
    let said = fs::read_to_string(&log).expect("its log");
    assert!(agent.wait().expect("ended").success(), "{said}");
    let links = world.run("ip", &["-o", "link"]);
    assert!(!links.contains("culvert0"), "{links}");
    assert_eq!(world.run("nft", &["list", "tables"]), "", "nftables");
    assert!(!Path::new("/sys/fs/bpf/culvert").exists(), "pins");
    assert!(!Path::new("/run/culvert.lock").exists(), "the lock file");
    assert!(!world.unified().join(world.cgroup_parent()).exists(), "the cgroup");
}

#[test]
fn an_agent_that_is_started_at_once_after_one_was_killed_waits_for_its_end() {
    let world = World::new("at-once");
    let mut node = Node::start(&world, NodeOptions { server: true, ..NodeOptions::default() });
    for _ in 0..5 {
        kill(Pid::from_raw(node.pid()), Signal::SIGKILL).expect("signal the agent");
        node.spawn();
    }
    node.leave();
}

#[test]
fn who_asks_an_agent_to_leave_that_is_leaving_hears_of_its_end() {
    let world = World::new("leave-twice");
    let mut node = Node::start(&world, NodeOptions { server: true, ..NodeOptions::default() });
    drop(node.run_pair(""));
    let people = node.people();
    std::thread::scope(|scope| {
        let asked = [0; 3].map(|_| scope.spawn(|| node.culvert(&["leave"])));
        for asked in asked {
            asked.join().expect("it has left");
        }
    });
    node.ended();
    world.assert_nothing_left(&people);
}

/// What an agent says that is started in a network namespace of its own, after `prepare`.
fn says_elsewhere(prepare: &str, arguments: &[&str]) -> String {
    let script = format!("ip link set lo up && {prepare} && exec \"$@\"");
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "10", "unshare", "--net", "--mount", "sh", "-c", &script, "sh"]);
    command.arg(binary("culvert")).args(["agent", "-server", "-bind", "127.0.0.1", "-data-dir", "/run/elsewhere"]);
    let output = command.args(arguments).stdin(Stdio::null()).output().expect("start the agent");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_agent_of_another_network_namespace_does_not_touch_what_runs_here() {
    let world = World::new("elsewhere");
    let mut node = Node::start(&world, NodeOptions { server: true, ..NodeOptions::default() });
    drop(node.run_pair(""));
    let (people, pid, parent) = (node.people(), node.pid(), world.cgroup_parent());
    let own_run = "mount -t tmpfs tmpfs /run";
    let same = ["-cgroup-parent", &parent];
    let said = says_elsewhere("true", &same);
    let wanted = [
        "/run/culvert.lock is used by another culvert agent".to_owned(),
        format!("pid {pid}, data directory {DATA_DIR}"),
    ];
    assert!(wanted.iter().all(|wanted| said.contains(wanted)), "{said}");
    let said = says_elsewhere(own_run, &same);
    assert!(said.contains(&format!("{parent} is used by")) && said.contains(&format!("pid {pid}:")), "{said}");
    assert!(said.contains("set another cgroup_parent"), "{said}");
    let other = ["-cgroup-parent", "culvert-test-elsewhere-2"];
    let said = says_elsewhere(own_run, &other);
    assert!(said.contains("/sys/fs/bpf/culvert is used by") && said.contains("set another ebpf.bpf_dir"), "{said}");
    assert!(people.iter().all(Process::lives), "what runs here goes on");

    // Nobody but the agent holds a lock.
    node.kill();
    node.spawn();
    eventually("all are taken over", || node.tasks().len() == 3);
    assert_eq!(node.people(), people, "taken over");
    node.leave();
    world.assert_nothing_left(&people);
}

/// The agent and its worker with standard error at `log`: they start, and end when they are told to.
fn logs_to(world: &World, log: PipeWriter) {
    let mut command = Command::new(binary("culvert"));
    command.args(["agent", "-dev", "-cgroup-parent", &world.cgroup_parent()]).stdin(Stdio::null());
    let mut agent = command.stdout(Stdio::null()).stderr(log).spawn().expect("start the agent");
    let mut worker = None;
    eventually("the worker runs", || {
        assert!(agent.try_wait().expect("look after the agent").is_none(), "the agent ended");
        let status = get(API, "/v1/culvert/status").unwrap_or_default();
        let status: Value = serde_json::from_str(&status).unwrap_or_default();
        worker = status["Worker"]["Pid"].as_i64().and_then(|pid| Process::of(pid.try_into().ok()?));
        worker.is_some()
    });
    kill(Pid::from_raw(agent.id().try_into().expect("a pid")), Signal::SIGTERM).expect("tell it to end");
    let mut status = None;
    eventually("the agent ends", || {
        status = agent.try_wait().expect("look after the agent");
        status.is_some()
    });
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    world.assert_nothing_left(&worker.into_iter().collect::<Vec<_>>());
}

/// A log collector that ends or hangs, a terminal that is closed.
#[test]
fn an_agent_whose_log_nobody_reads_any_more_goes_on_and_ends_in_order() {
    let world = World::new("log");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    logs_to(&world, writer);

    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    let flags = OFlag::from_bits_retain(fcntl(&writer, FcntlArg::F_GETFL).expect("flags"));
    fcntl(&writer, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).expect("set");
    let mut full = 0;
    while let Ok(written) = writer.write(&[b'.'; 4096]) {
        full += written;
    }
    fcntl(&writer, FcntlArg::F_SETFL(flags)).expect("set");
    logs_to(&world, writer);
    let mut said = Vec::new();
    reader.read_to_end(&mut said).expect("what was said");
    assert_eq!(said.len(), full, "there was no room");
}
