//! A disk that is full: what is stopped stops, whoever asks learns why it is not written down, and once there is room again
//! everything goes its way.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};

use culvert_tests::{API, DATA_DIR, Node, NodeOptions, Process, World, eventually, put};

/// Takes all the room that is left below the data directory, and gives it back when dropped.
struct Filler {
    path: String,
}

impl Filler {
    fn new() -> Self {
        let path = format!("{DATA_DIR}/filler");
        let mut file = File::create(&path).expect("a file");
        let block = [0; 4096];
        loop {
            match file.write(&block) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Self { path },
                Err(error) => panic!("{error}"),
            }
        }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        fs::remove_file(&self.path).expect("room again");
    }
}

fn tasks(node: &Node) -> Vec<Process> {
    let tasks: Vec<Process> = node.tasks().into_iter().filter_map(Process::of).collect();
    assert_eq!(tasks.len(), 3, "the job runs");
    tasks
}

/// While something cannot be removed: the command fails and says what, and the tasks end all the same.
fn stop_in_vain(node: &Node) {
    let tasks = tasks(node);
    let refused = node.try_culvert(&["job", "stop", "pair"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let says = ["not everything of it could be removed (allocation ", "stop it again"];
    assert!(!refused.status.success() && says.iter().all(|wanted| said.contains(wanted)), "{said}");
    eventually("the tasks end", || !tasks.iter().any(Process::lives));
}

fn intention(number: u32) -> anyhow::Result<String> {
    let path = format!("/v1/connect/intentions/exact?source=source-{number}&destination=called");
    put(API, &path, r#"{"SourceType": "consul", "Action": "allow"}"#)
}

/// Until the file of the state store would have to grow.
fn intentions_until_refused(node: &Node) {
    let refused = (1..5_000).find_map(|number| intention(number).err()).expect("the disk is full");
    assert!(refused.to_string().contains("500"), "{refused}");
    eventually("the log says why", || node.log().contains("No space left on device"));
}

/// Entries of folders in the data directory.
fn left(folders: [&str; 2]) -> [usize; 2] {
    folders.map(|folder| fs::read_dir(format!("{DATA_DIR}/{folder}")).into_iter().flatten().count())
}

/// With room again.
fn stops(node: &Node) {
    node.culvert(&["job", "stop", "pair"]);
    let job = node.api("/v1/culvert/job/pair");
    assert!(job["Status"] == "dead" && job["Allocations"].as_array().is_some_and(Vec::is_empty), "{job}");
    eventually("nothing of the job is in the catalog", || {
        node.api("/v1/agent/services").as_object().is_some_and(serde_json::Map::is_empty)
    });
    assert_eq!(left(["alloc", "allocations"]), [0; 2], "in alloc and allocations");
}

#[test]
fn a_job_is_stopped_on_a_full_disk_and_forgotten_when_there_is_room() {
    let world = World::new("fulldisk");
    fs::create_dir_all(DATA_DIR).expect("a folder");
    world.run("mount", &["-t", "tmpfs", "-o", "size=24m,mode=0711", "tmpfs", DATA_DIR]);
    let mut node = Node::start(&world, NodeOptions { server: true, ..NodeOptions::default() });
    drop(node.run_pair(""));
    let people = node.people();

    // So long that the agent gives up; what its own removals free must not help it out of that.
    let filler = Filler::new();
    let obstacle = format!("{DATA_DIR}/network.json.new");
    fs::create_dir(&obstacle).expect("no room is needed for it");
    intentions_until_refused(&node);
    stop_in_vain(&node);
    drop(filler);
    fs::remove_dir(&obstacle).expect("empty");
    stops(&node);
    intention(0).expect("the state store takes changes again");

    // What the tasks leave takes the room that is needed to write down that they are not wanted any more.
    drop(node.run_pair(""));
    let filler = Filler::new();
    let tasks = tasks(&node);
    node.culvert(&["job", "stop", "pair"]);
    node.kill();
    drop(filler);
    node.spawn();
    assert_eq!(node.api("/v1/culvert/job/pair")["Status"], "dead");
    assert!(!tasks.iter().any(Process::lives), "the tasks have ended");
    stops(&node);

    // What one stop could not remove, the next submission does.
    drop(node.run_pair(""));
    fs::create_dir(&obstacle).expect("a folder");
    stop_in_vain(&node);
    fs::remove_dir(&obstacle).expect("empty");
    drop(node.run_pair(""));
    assert_eq!(left(["alloc", "allocations"]), [3; 2], "in alloc and allocations");
    stops(&node);

    // So does another stop, also of a job that is forgotten.
    drop(node.run_pair(""));
    fs::create_dir(&obstacle).expect("a folder");
    assert!(!node.try_culvert(&["job", "stop", "-purge", "pair"]).status.success(), "something is left");
    fs::remove_dir(&obstacle).expect("empty");
    node.culvert(&["job", "stop", "pair"]);
    assert_eq!(left(["alloc", "allocations"]), [0; 2], "in alloc and allocations");
    node.leave();
    assert_eq!(left(["alloc", "jobs"]), [0; 2], "in alloc and jobs");
    world.run("umount", &[DATA_DIR]);
    world.assert_nothing_left(&people);
}
