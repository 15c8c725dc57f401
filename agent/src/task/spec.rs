//! What a task is to be: the one structure that crosses from the runner to the executor.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::task::dirs::TaskDirs;
use crate::workload::AllocId;

/// PATH of a task that sets none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Processes and threads of an `exec` task, unless the setting says otherwise: stops a fork bomb, hurts no service.
pub const DEFAULT_PIDS_MAX: u32 = 8192;
/// Longest task name: it is a directory and a cgroup.
pub const MAX_TASK_NAME: usize = 128;

/// How a task is started.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// A process of the host in the allocation's netns and a cgroup of its own; nothing else is isolated.
    RawExec,
    /// Own mount, pid, ipc and uts namespaces, own root, unprivileged user, no capabilities, resource limits.
    Exec,
}

impl Driver {
    /// Nomad's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RawExec => "raw_exec",
            Self::Exec => "exec",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A driver that culvert does not have.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown task driver {0:?}: culvert runs \"exec\" and \"raw_exec\"")]
pub struct UnknownDriver(pub String);

impl FromStr for Driver {
    type Err = UnknownDriver;
    fn from_str(text: &str) -> Result<Self, UnknownDriver> {
        match text {
            "raw_exec" => Ok(Self::RawExec),
            "exec" => Ok(Self::Exec),
            other => Err(UnknownDriver(other.to_owned())),
        }
    }
}

/// A signal by name: `SIGINT`, `SIGTERM`, …
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signal(nix::sys::signal::Signal);

/// A name that is no signal's.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown signal {0:?}: use a name such as SIGINT or SIGTERM")]
pub struct UnknownSignal(pub String);

impl Signal {
    /// Nomad's default for `exec` and `raw_exec`.
    pub const INT: Self = Self(nix::sys::signal::Signal::SIGINT);
    /// Cannot be caught.
    pub const KILL: Self = Self(nix::sys::signal::Signal::SIGKILL);
    /// The usual request to end.
    pub const TERM: Self = Self(nix::sys::signal::Signal::SIGTERM);

    /// The kernel's number.
    #[must_use]
    pub fn number(self) -> i32 {
        self.0 as i32
    }

    /// The name with `SIG`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.0.as_str()
    }
}

impl FromStr for Signal {
    type Err = UnknownSignal;
    fn from_str(text: &str) -> Result<Self, UnknownSignal> {
        text.parse().map(Self).map_err(|_| UnknownSignal(text.to_owned()))
    }
}

impl TryFrom<String> for Signal {
    type Error = UnknownSignal;
    fn try_from(text: String) -> Result<Self, UnknownSignal> {
        text.parse()
    }
}

impl From<Signal> for String {
    fn from(signal: Signal) -> Self {
        signal.as_str().to_owned()
    }
}

/// What a task may use. Enforced for `exec`; `raw_exec` is counted, not limited, as in Nomad.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Resources {
    /// Share of the processor in MHz: a weight against other tasks, not a ceiling.
    pub cpu_mhz: u32,
    /// Hard limit in MB (2²⁰ bytes); a task above it is killed by the kernel.
    pub memory_mb: u32,
    /// Nomad's `memory_max`: the hard limit in MB, where it is above `memory_mb`.
    pub memory_max_mb: Option<u32>,
    /// Processes and threads; default [`DEFAULT_PIDS_MAX`].
    pub pids_max: u32,
}

impl Default for Resources {
    /// Nomad's defaults.
    fn default() -> Self {
        Self { cpu_mhz: 100, memory_mb: 300, memory_max_mb: None, pids_max: DEFAULT_PIDS_MAX }
    }
}

/// How much output of a task is kept, per stream.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LogSettings {
    /// Files kept.
    pub max_files: u32,
    /// Size at which the next file is begun, in MB (2²⁰ bytes).
    pub max_file_size_mb: u32,
}

impl Default for LogSettings {
    /// Nomad's defaults.
    fn default() -> Self {
        Self { max_files: 10, max_file_size_mb: 10 }
    }
}

/// Everything an executor needs to know about its task. Holds the task's environment: never printed, never on a command
/// line; it reaches the executor through a pipe.
#[derive(Clone, Deserialize, Serialize)]
pub struct TaskSpec {
    /// The allocation it is part of.
    pub alloc_id: AllocId,
    /// The task's name in the job.
    pub task: String,
    /// How it is started.
    pub driver: Driver,
    /// `config.command`: a name looked up as Nomad does, or a path.
    pub command: String,
    /// `config.args`.
    pub args: Vec<String>,
    /// The whole environment, apart from [`DEFAULT_PATH`] when it has no PATH.
    pub env: BTreeMap<String, String>,
    /// User name or number. `exec`: default `nobody`, root is refused; `raw_exec`: default the agent's user.
    pub user: Option<String>,
    /// The netns to join; `None` stays in the agent's.
    pub netns: Option<PathBuf>,
    /// Parent of all task cgroups below each hierarchy's root, as in [`crate::workload::NetworkSettings`].
    pub cgroup_parent: String,
    /// Limits.
    pub resources: Resources,
    /// What `kill` sends first.
    pub kill_signal: Signal,
    /// How long `kill` waits before SIGKILL.
    pub kill_timeout: Duration,
    /// Log rotation.
    pub logs: LogSettings,
    /// The task's directories; they exist ([`crate::task::AllocDir::add_task`]).
    pub dirs: TaskDirs,
}

impl fmt::Debug for TaskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { alloc_id, task, driver, command, .. } = self;
        write!(f, "TaskSpec {{ {alloc_id}/{task}: {driver} {command:?}, … }}")
    }
}

/// A value of a [`TaskSpec`] that no executor could honour.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// The name cannot be a directory.
    #[error(
        "task name {0:?} cannot be used: it becomes a directory beside \"alloc\"; use letters, digits, -, _ and . \
         (at most {MAX_TASK_NAME} bytes)"
    )]
    Name(String),
    /// Nothing to start.
    #[error("task {0:?}: missing command")]
    Command(String),
    /// A NUL byte, or an environment name with `=`.
    #[error("task {task:?}: {what} holds a byte that no process can be given (NUL, or '=' in a variable's name)")]
    Bytes {
        /// The task.
        task: String,
        /// Which value.
        what: String,
    },
    /// A zero where at least one is needed.
    #[error("task {task:?}: {what} must be at least 1")]
    Zero {
        /// The task.
        task: String,
        /// Which value.
        what: &'static str,
    },
}

/// Can `name` be a task's: a directory of its own inside the allocation's?
///
/// # Errors
/// [`SpecError::Name`].
pub fn check_task_name(name: &str) -> Result<(), SpecError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let fits = !name.is_empty() && name.len() <= MAX_TASK_NAME && name.bytes().all(allowed);
    if fits && !matches!(name, "." | ".." | "alloc") { Ok(()) } else { Err(SpecError::Name(name.to_owned())) }
}

impl TaskSpec {
    /// Checks every value that ends in a path, an argument vector or a limit.
    ///
    /// # Errors
    /// [`SpecError`] naming the value.
    pub fn check(&self) -> Result<(), SpecError> {
        check_task_name(&self.task)?;
        if self.command.is_empty() {
            return Err(SpecError::Command(self.task.clone()));
        }
        let bytes = |what: String| SpecError::Bytes { task: self.task.clone(), what };
        if self.command.contains('\0') || self.args.iter().any(|arg| arg.contains('\0')) {
            return Err(bytes("the command line".to_owned()));
        }
        for (name, value) in &self.env {
            if name.is_empty() || name.contains(['\0', '=']) || value.contains('\0') {
                return Err(bytes(format!("environment variable {name:?}")));
            }
        }
        let zero = |what| SpecError::Zero { task: self.task.clone(), what };
        let Resources { cpu_mhz, memory_mb, pids_max, .. } = self.resources;
        for (value, what) in [
            (cpu_mhz, "resources.cpu"),
            (memory_mb, "resources.memory"),
            (pids_max, "pids_max"),
            (self.logs.max_files, "logs.max_files"),
            (self.logs.max_file_size_mb, "logs.max_file_size"),
        ] {
            if value == 0 {
                return Err(zero(what));
            }
        }
        Ok(())
    }

    /// The task's cgroup below each hierarchy's root: `<parent>/<alloc id>/<task>`.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        PathBuf::from(&self.cgroup_parent).join(self.alloc_id.as_str()).join(&self.task)
    }
}
