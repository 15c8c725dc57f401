//! The tasks of an allocation: started once the rest of it is up, and those of an earlier agent found again.

use std::collections::BTreeMap;

use culvert_jobspec::{Environment, Group, RestartMode as JobRestartMode, Task};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::allocation::{Allocation, Up};
use super::tasks::{TaskLife, TaskState, TaskView, end};
use super::{AllocationStatus, RunError};
use crate::report::chain;
use crate::task::{
    Adoption, AllocDir, Driver, LogSettings, Resources, RestartMode, RestartPolicy, Signal, TaskSpec, adopt,
    find_record, task_owner,
};

impl Allocation {
    pub(super) fn start_tasks(&self, up: &Up, tasks: &TaskTracker, stop: &CancellationToken) {
        let Ok(group) = self.group() else { return };
        info!(alloc = %self.id, services = up.services.len(), "starting the tasks");
        for task in &group.tasks {
            let (publish, view) = watch::channel(TaskView::default());
            self.follow(task.name.clone(), view, tasks);
            match self.task_spec(group, task, up) {
                Ok(spec) => {
                    let (policy, executor) = (restart_policy(task), self.node.executor.clone());
                    let hurry = self.node.hurry.clone();
                    let life = TaskLife { spec, policy, view: publish, executor, hurry };
                    tasks.spawn(life.run(stop.clone()));
                }
                Err(error) => {
                    let error = chain(&error);
                    warn!(alloc = %self.id, task = task.name, error, "task cannot be started");
                    publish.send_modify(|view| (view.state, view.failed) = (TaskState::Dead, true));
                    self.view.send_modify(|view| view.error = Some(error));
                }
            }
        }
        tasks.close();
    }

    fn task_spec(&self, group: &Group, task: &Task, up: &Up) -> Result<TaskSpec, RunError> {
        let driver = match task.driver.as_str() {
            "exec" => Driver::Exec,
            "raw_exec" => Driver::RawExec,
            other => return Err(RunError::Driver(other.to_owned())),
        };
        let owner = task_owner(driver, task.user.as_deref())?;
        let dirs = AllocDir::new(&self.node.data_dir, &self.id).add_task(&task.name, owner)?;
        let seen = dirs.env(driver).map(|(_, path)| path);
        let [alloc, local, secrets] = seen;
        let seen = culvert_jobspec::TaskDirs { alloc, local, secrets };
        let environment = Environment::of_task(&self.record.job, &group.name, &task.name, &up.environment, &seen)?;
        let command = task.driver.command().ok_or_else(|| RunError::Driver(task.driver.as_str().to_owned()))?;
        let args = command.args.iter().map(|argument| argument.render("args", &environment));
        Ok(TaskSpec {
            alloc_id: self.id.clone(),
            task: task.name.clone(),
            driver,
            command: command.command.render("command", &environment)?,
            args: args.collect::<Result<_, _>>()?,
            env: environment.variables().clone(),
            user: task.user.clone(),
            netns: Some(up.workload.netns.clone()),
            cgroup_parent: self.node.cgroup_parent.clone(),
            resources: Resources {
                cpu_mhz: task.resources.cpu_mhz,
                memory_mb: task.resources.memory_mb,
                ..Resources::default()
            },
            kill_signal: task.kill_signal.parse::<Signal>()?,
            kill_timeout: task.kill_timeout,
            logs: LogSettings { max_files: task.logs.max_files, max_file_size_mb: task.logs.max_file_size_mb },
            dirs,
        })
    }

    /// Copies what a task tells of itself into the allocation's view.
    fn follow(&self, task: String, mut view: watch::Receiver<TaskView>, tasks: &TaskTracker) {
        let publish = self.view.clone();
        tasks.spawn(async move {
            loop {
                let now = view.borrow_and_update().clone();
                publish.send_modify(|allocation| {
                    allocation.tasks.insert(task.clone(), now);
                    allocation.status = status(&allocation.tasks);
                });
                if view.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// What ran under an agent before this one: its output is still there to be read.
    pub(super) fn show_dead_tasks(&self) {
        let Ok(group) = self.group() else { return };
        let dead = || TaskView { state: TaskState::Dead, ..TaskView::default() };
        let tasks: BTreeMap<String, TaskView> = group.tasks.iter().map(|task| (task.name.clone(), dead())).collect();
        self.view.send_modify(|view| view.tasks = tasks);
    }

    /// Ends tasks that an earlier agent started and that were not taken over, because the allocation stops or fails
    /// before it came up.
    pub(super) async fn end_strays(&self) {
        let Ok(group) = self.group() else { return };
        for task in &group.tasks {
            let dirs = AllocDir::new(&self.node.data_dir, &self.id).task(&task.name);
            let Ok(Some(record)) = find_record(&dirs.task) else { continue };
            let Ok(Adoption::Running(running)) = adopt(record).await else { continue };
            let signal = task.kill_signal.parse().unwrap_or(Signal::INT);
            if let Err(error) = end(&running, signal, task.kill_timeout, &self.node.hurry).await {
                warn!(alloc = %self.id, task = task.name, %error, "how a task of an earlier agent ended is not known");
            }
        }
    }
}

/// Failed as soon as one task has failed; running as soon as one runs.
fn status(tasks: &BTreeMap<String, TaskView>) -> AllocationStatus {
    if tasks.values().any(|task| task.failed) {
        AllocationStatus::Failed
    } else if tasks.values().any(|task| task.state == TaskState::Running) {
        AllocationStatus::Running
    } else {
        AllocationStatus::Pending
    }
}

fn restart_policy(task: &Task) -> RestartPolicy {
    let mode = match task.restart.mode {
        JobRestartMode::Fail => RestartMode::Fail,
        JobRestartMode::Delay => RestartMode::Delay,
    };
    let restart = &task.restart;
    RestartPolicy { attempts: restart.attempts, interval: restart.interval, delay: restart.delay, mode }
}
