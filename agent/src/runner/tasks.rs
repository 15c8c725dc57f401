//! The life of one task: started, watched, started again as its policy says, ended.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::report::chain;
use crate::task::{
    Adoption, ExecutorCommand, ExitStatus, RestartDecision, RestartPolicy, RestartTracker, RunningTask, Signal,
    StartError, TaskSpec, adopt, find_record, start,
};

/// Events kept per task, as Nomad does.
const MAX_EVENTS: usize = 10;

/// Where a task stands, in Nomad's words.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TaskState {
    /// Not started yet, or waiting to be started again.
    #[default]
    Pending,
    /// Its process runs.
    Running,
    /// It ended and is not started again.
    Dead,
}

impl TaskState {
    /// Nomad's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Dead => "dead",
        }
    }
}

/// Something that happened to a task.
#[derive(Clone, Debug)]
pub struct TaskEvent {
    /// When.
    pub at: SystemTime,
    /// Nomad's name for it: `Started`, `Terminated`, `Restarting`, …
    pub kind: &'static str,
    /// In words.
    pub message: String,
}

/// What is known of a task.
#[derive(Clone, Debug, Default)]
pub struct TaskView {
    /// Where it stands.
    pub state: TaskState,
    /// It ended and its policy is exhausted.
    pub failed: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// Its process, while it runs.
    pub pid: Option<u32>,
    /// How it last ended.
    pub exit: Option<ExitStatus>,
    /// The last [`MAX_EVENTS`] events.
    pub events: VecDeque<TaskEvent>,
}

/// What a task's life needs.
pub(super) struct TaskLife {
    pub(super) spec: TaskSpec,
    pub(super) policy: RestartPolicy,
    pub(super) view: watch::Sender<TaskView>,
    pub(super) executor: ExecutorCommand,
    /// Cancelled when nobody waits any longer for tasks to end by themselves.
    pub(super) hurry: CancellationToken,
}

/// What came of waiting for a running task.
enum Outcome {
    Stopped,
    Ended(ExitStatus),
}

impl TaskLife {
    /// Runs the task until `stop`, or until its policy gives up. Finds a running one again first.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut tracker = RestartTracker::new(self.policy);
        let mut found = self.find_again().await;
        loop {
            let started = match found.take() {
                Some(Ok(running)) => Ok(running),
                Some(Err(ended)) => {
                    self.ended(&ended);
                    if self.again(&mut tracker, true, &stop).await {
                        continue;
                    }
                    return;
                }
                None => self.start().await,
            };
            let recoverable = match started {
                Ok(running) => match self.attend(&running, &stop).await {
                    Outcome::Stopped => return self.set_dead(false),
                    Outcome::Ended(status) => {
                        self.ended(&status);
                        true
                    }
                },
                Err(error) => {
                    let message = chain(&error);
                    warn!(task = self.spec.task, alloc = %self.spec.alloc_id, message, "task did not start");
                    self.event("Driver Failure", message);
                    error.recoverable()
                }
            };
            if !self.again(&mut tracker, recoverable, &stop).await {
                return;
            }
        }
    }

    /// The task as the agent before this one left it.
    async fn find_again(&self) -> Option<Result<RunningTask, ExitStatus>> {
        let record = find_record(&self.spec.dirs.task)
            .inspect_err(|error| warn!(%error, task = self.spec.task, "the record of a task is not readable"))
            .ok()
            .flatten()?;
        match adopt(record).await {
            Ok(Adoption::Running(running)) => Some(Ok(running)),
            Ok(Adoption::Ended(status)) => Some(Err(status)),
            Err(error) => {
                warn!(error = chain(&error), task = self.spec.task, "a task cannot be taken over");
                None
            }
        }
    }

    async fn start(&self) -> Result<RunningTask, StartError> {
        start(self.spec.clone(), &self.executor).await
    }

    /// Watches a running task; ends it when told to.
    async fn attend(&self, running: &RunningTask, stop: &CancellationToken) -> Outcome {
        let record = running.record();
        info!(task = record.task, alloc = %record.alloc_id, pid = record.process.pid, "task runs");
        self.view.send_modify(|view| (view.state, view.pid) = (TaskState::Running, Some(record.process.pid)));
        self.event("Started", "Task started by client".to_owned());
        for note in &record.notes {
            self.event("Driver", note.clone());
        }
        let status = tokio::select! {
            status = running.wait() => status,
            () = stop.cancelled() => {
                self.event("Killing", format!("Sent {}", self.spec.kill_signal.as_str()));
                let status = end(running, self.spec.kill_signal, self.spec.kill_timeout, &self.hurry).await;
                match status {
                    Ok(status) => self.ended(&status),
                    Err(error) => warn!(%error, task = record.task, "how the task ended is not known"),
                }
                self.event("Killed", "Task successfully killed".to_owned());
                return Outcome::Stopped;
            }
        };
        Outcome::Ended(status.unwrap_or_else(|error| lost(&error, record.started_at)))
    }

    /// Waits as the restart policy says; `false` when the task is not to be started again.
    async fn again(&self, tracker: &mut RestartTracker, recoverable: bool, stop: &CancellationToken) -> bool {
        match tracker.decide(Instant::now(), recoverable, random()) {
            RestartDecision::After(delay, reason) => {
                self.event("Restarting", format!("Task restarting in {}: {reason}", in_words(delay)));
                self.view.send_modify(|view| (view.state, view.restarts) = (TaskState::Pending, view.restarts + 1));
                tokio::select! {
                    () = tokio::time::sleep(delay) => true,
                    () = stop.cancelled() => {
                        self.set_dead(false);
                        false
                    }
                }
            }
            RestartDecision::GiveUp(reason) => {
                self.event("Not Restarting", reason.to_string());
                self.set_dead(true);
                false
            }
        }
    }

    fn ended(&self, status: &ExitStatus) {
        let mut message = format!("Exit Code: {}", status.exit_code);
        if status.signal != 0 {
            message.push_str(&format!(", Signal: {}", status.signal));
        }
        if status.oom_killed {
            message.push_str(", OOM Killed");
        }
        if let Some(error) = &status.error {
            message.push_str(&format!(", Error: {error}"));
        }
        self.event("Terminated", message);
        self.view.send_modify(|view| (view.pid, view.exit) = (None, Some(status.clone())));
    }

    fn set_dead(&self, failed: bool) {
        self.view.send_modify(|view| (view.state, view.failed, view.pid) = (TaskState::Dead, failed, None));
    }

    fn event(&self, kind: &'static str, message: String) {
        self.view.send_modify(|view| {
            if view.events.len() == MAX_EVENTS {
                view.events.pop_front();
            }
            view.events.push_back(TaskEvent { at: SystemTime::now(), kind, message });
        });
    }
}

/// Ends a task; in a `hurry` without the time that it has to end by itself.
pub(super) async fn end(
    task: &RunningTask,
    signal: Signal,
    timeout: Duration,
    hurry: &CancellationToken,
) -> std::io::Result<ExitStatus> {
    tokio::select! {
        status = task.kill(signal, timeout) => status,
        () = hurry.cancelled() => task.kill(Signal::KILL, Duration::ZERO).await,
    }
}

/// The status of a task whose end could not be observed.
fn lost(error: &std::io::Error, started_at: SystemTime) -> ExitStatus {
    ExitStatus {
        exit_code: -1,
        signal: 0,
        oom_killed: false,
        error: Some(error.to_string()),
        started_at,
        finished_at: SystemTime::now(),
    }
}

/// Whole milliseconds are precise enough for people.
fn in_words(delay: Duration) -> String {
    culvert_types::format_go_duration(Duration::from_millis(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)))
}

/// In `0.0..1.0`, for jitter only: a fresh uuid is random enough.
fn random() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / (f64::from(u32::MAX) + 1.0)
}
