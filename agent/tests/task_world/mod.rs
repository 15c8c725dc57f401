//! Tasks of a test: a specification that runs a shell script, and what it wrote.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use culvert_agent::task::logs::{self, Cursor, Stream};
use culvert_agent::task::{
    self, AllocDir, Driver, ExecutorCommand, ExitStatus, LogSettings, Resources, RunningTask, Signal, StartError,
    TaskSpec,
};
use culvert_agent::workload::AllocId;

use crate::workload_world::{PATIENCE, World};

/// The real binary as executor, as the agent starts it.
pub(crate) fn executor() -> ExecutorCommand {
    ExecutorCommand { program: PathBuf::from(env!("CARGO_BIN_EXE_culvert")), args: vec!["executor".into()] }
}

/// A task `web` that runs `script` in a shell.
pub(crate) fn spec(world: &World, driver: Driver, script: &str) -> TaskSpec {
    let alloc_id = AllocId::random();
    let owner = task::task_owner(driver, None).expect("the driver's default user");
    let data_dir = world.settings().data_dir;
    std::fs::create_dir_all(&data_dir).expect("a directory");
    let dirs = AllocDir::new(&data_dir, &alloc_id).add_task("web", owner).expect("directories");
    TaskSpec {
        alloc_id,
        task: "web".into(),
        driver,
        command: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: BTreeMap::new(),
        user: None,
        netns: None,
        cgroup_parent: world.cgroup_parent.clone(),
        resources: Resources::default(),
        kill_signal: Signal::INT,
        kill_timeout: Duration::from_secs(5),
        logs: LogSettings::default(),
        dirs,
    }
}

/// Starts `spec`, which must work.
pub(crate) async fn start(spec: &TaskSpec) -> RunningTask {
    task::start(spec.clone(), &executor()).await.expect("started")
}

/// Starts `spec`, which must fail.
pub(crate) async fn fail_to_start(spec: &TaskSpec) -> StartError {
    task::start(spec.clone(), &executor()).await.expect_err("it cannot start")
}

/// Waits for the end of `task`.
pub(crate) async fn end(task: &RunningTask) -> ExitStatus {
    tokio::time::timeout(PATIENCE, task.wait()).await.expect("it ends").expect("watched")
}

/// Runs `spec` to its end and returns the status and its standard output.
pub(crate) async fn run_to_end(spec: &TaskSpec) -> (ExitStatus, String) {
    let task = start(spec).await;
    let status = end(&task).await;
    (status, output(spec, Stream::Stdout))
}

/// What the task wrote.
pub(crate) fn output(spec: &TaskSpec, stream: Stream) -> String {
    let (mut all, mut cursor) = (Vec::new(), Cursor::default());
    loop {
        let (bytes, next) = logs::read(&spec.dirs.logs, &spec.task, stream, cursor, 1 << 20).expect("readable");
        if bytes.is_empty() {
            return String::from_utf8_lossy(&all).into_owned();
        }
        all.extend(bytes);
        cursor = next;
    }
}
