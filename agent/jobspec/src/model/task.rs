//! Tasks and what runs them.

use crate::{Template, duration};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::time::Duration;

/// One `task` block.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Task {
    /// The label of the block.
    pub name: String,
    /// `driver` with its `config`.
    pub driver: Driver,
    /// `user` that the task runs as; `None`: the driver's default.
    pub user: Option<String>,
    /// `env`, to be rendered with the task's [`crate::Environment`] (it already holds the rendered values).
    pub env: BTreeMap<String, Template>,
    /// `meta` of the task.
    pub meta: BTreeMap<String, Template>,
    /// `resources`.
    pub resources: Resources,
    /// `logs`.
    pub logs: Logs,
    /// `restart` of the task, else of the group, else Nomad's default.
    pub restart: RestartPolicy,
    /// `kill_timeout`, 5 s unless set: between `kill_signal` and SIGKILL.
    #[serde(with = "duration::text")]
    pub kill_timeout: Duration,
    /// `kill_signal`, `SIGINT` unless set; always a name with its `SIG`.
    pub kill_signal: String,
}

/// Which driver runs a task. Drivers that culvert has no form of (`java`, `podman` …) are refused by name.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// Own mount namespace and root, unprivileged user, cgroup limits.
    Exec(Command),
    /// A plain child process.
    RawExec(Command),
    /// Parsed so that a job file stays valid; [`crate::check_runnable`] refuses to run it. Holds `config` as written.
    Docker(Map<String, Value>),
}

impl Driver {
    /// As job files write it.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::RawExec(_) => "raw_exec",
            Self::Docker(_) => "docker",
        }
    }

    /// What to execute, if the driver executes a command.
    #[must_use]
    pub fn command(&self) -> Option<&Command> {
        match self {
            Self::Exec(command) | Self::RawExec(command) => Some(command),
            Self::Docker(_) => None,
        }
    }
}

/// `config` of `exec` and `raw_exec`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Command {
    /// `command`: an absolute path, or a name looked up by the driver.
    pub command: Template,
    /// `args`, handed over as they are: no shell.
    pub args: Vec<Template>,
}

/// `resources` of a task.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Resources {
    /// `cpu` in MHz, 100 unless set.
    pub cpu_mhz: u32,
    /// `memory` in MiB, 300 unless set.
    pub memory_mb: u32,
}

impl Default for Resources {
    fn default() -> Self {
        Self { cpu_mhz: 100, memory_mb: 300 }
    }
}

/// `logs` of a task, per stream (stdout, stderr).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Logs {
    /// `max_files`, 10 unless set.
    pub max_files: u32,
    /// `max_file_size` in MiB, 10 unless set.
    pub max_file_size_mb: u32,
}

impl Default for Logs {
    fn default() -> Self {
        Self { max_files: 10, max_file_size_mb: 10 }
    }
}

/// `restart`: what happens when a task exits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RestartPolicy {
    /// Restarts allowed within `interval`.
    pub attempts: u32,
    /// The window in which attempts count.
    #[serde(with = "duration::text")]
    pub interval: Duration,
    /// Pause before each restart (up to 25 % more, at random).
    #[serde(with = "duration::text")]
    pub delay: Duration,
    /// What happens after the last attempt.
    pub mode: RestartMode,
}

impl Default for RestartPolicy {
    /// Nomad's for `type = "service"`.
    fn default() -> Self {
        Self {
            attempts: 2,
            interval: Duration::from_secs(30 * 60),
            delay: Duration::from_secs(15),
            mode: RestartMode::Fail,
        }
    }
}

/// `mode` of a restart policy.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartMode {
    /// The task, and with it the allocation, has failed.
    #[default]
    Fail,
    /// Wait until the interval is over, then try again.
    Delay,
}

impl RestartMode {
    /// As job files write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Delay => "delay",
        }
    }
}

/// A group or task that the job does not have.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("job {job:?} has no task {task:?} in a group {group:?}")]
pub struct UnknownTask {
    /// Job id.
    pub job: String,
    /// Group asked for.
    pub group: String,
    /// Task asked for.
    pub task: String,
}
