//! Tasks: processes in an allocation's netns and in cgroups of their own, each under an executor that outlives the agent.
//!
//! ```text
//! culvert agent ── start ──> culvert executor (one per task, host namespaces, survives the agent)
//!                               └─ stage: joins cgroups and netns, then becomes the task (raw_exec)
//!                                         or builds the sandbox and stays as its init   (exec)
//! ```
//! * [`start`] starts a task, [`adopt`] finds one again after the agent's restart, [`RunningTask`] waits, signals, kills.
//! * [`executor`] is the executor's and the stage's own code: separate processes, started from `/proc/self/exe`.
//! * [`restart`](RestartTracker) decides whether a task that ended starts again; nothing here starts one by itself.
//!
//! Left out: what a job file means, interpolation, service registration. The runner does that.

mod cgroup;
pub mod descriptors;
mod dirs;
pub mod executor;
mod identity;
pub mod logs;
mod record;
mod remove;
mod restart;
mod running;
mod spec;

pub use cgroup::{CgroupError, Hierarchies, check_cgroup_parent, children, kill_all, kill_and_remove, remove_if_empty};
pub use dirs::{AllocDir, DirError, TaskDirs};
pub use identity::ProcessIdentity;
pub(crate) use identity::boot_id;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use record::ExitFile;
pub use record::{ExitStatus, TaskRecord, find_record};
pub(crate) use record::{read_json, sweep, write_json};
pub use restart::{RestartDecision, RestartMode, RestartPolicy, RestartReason, RestartTracker};
pub use running::{AdoptError, Adoption, ExecutorCommand, RunningTask, StartError, adopt, start, task_owner};
pub use spec::{
    DEFAULT_PATH, DEFAULT_PIDS_MAX, Driver, LogSettings, MAX_TASK_NAME, Resources, Signal, SpecError, TaskSpec,
    UnknownDriver, UnknownSignal, check_task_name,
};
