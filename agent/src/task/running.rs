//! The agent's side of a task: start it through an executor, find it again, wait for it, signal it, end it.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal as NixSignal;
use rustix::process::pidfd_send_signal;

use crate::task::cgroup::{self, Hierarchies};
use crate::task::descriptors;
use crate::task::executor::{StartReply, TaskUser};
use crate::task::identity::{end_of, open_pidfd};
use crate::task::record::{EXIT_FILE, ExitFile, ExitStatus, TaskRecord, read_json};
use crate::task::spec::{Driver, Signal, SpecError, TaskSpec};

/// How long an executor may take to report that its task runs; its work is a few dozen system calls.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an executor may take to write the exit status after SIGKILL ended the task.
const EXECUTOR_END_TIMEOUT: Duration = Duration::from_secs(30);

/// How an executor is started: the agent's own binary, unless a test says otherwise.
#[derive(Clone, Debug)]
pub struct ExecutorCommand {
    /// The binary; its `main` must call [`crate::task::executor::dispatch`] first.
    pub program: PathBuf,
    /// The words that lead to the executor.
    pub args: Vec<OsString>,
}

impl Default for ExecutorCommand {
    fn default() -> Self {
        // The running binary, even when the file has been replaced by an upgrade.
        Self { program: PathBuf::from("/proc/self/exe"), args: vec!["executor".into()] }
    }
}

/// Why a task did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The specification cannot be honoured.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The executor itself could not be started or talked to.
    #[error("start an executor ({})", program.display())]
    Executor {
        /// The binary.
        program: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The executor could not start the task.
    #[error("failed to launch command with executor: {reason}")]
    Launch {
        /// In words for the job's author.
        reason: String,
    },
    /// The executor said nothing.
    #[error("failed to launch command with executor: no answer within {} s", START_TIMEOUT.as_secs())]
    Timeout,
}

impl StartError {
    /// Could another attempt succeed? For [`crate::task::RestartTracker::decide`].
    #[must_use]
    pub fn recoverable(&self) -> bool {
        matches!(self, Self::Executor { .. } | Self::Timeout)
    }
}

/// Uid and gid that a task's directories belong to; also the check of its `user`.
///
/// # Errors
/// [`StartError::Launch`]: no such user, or root for `exec`.
pub fn task_owner(driver: Driver, user: Option<&str>) -> Result<(u32, u32), StartError> {
    let user = TaskUser::resolve(driver, user).map_err(|reason| StartError::Launch { reason })?;
    Ok((user.uid, user.gid))
}

/// Starts the task of `spec` through an executor. Its directories must exist.
///
/// # Errors
/// [`StartError`]; nothing of the task is left running.
pub async fn start(spec: TaskSpec, executor: &ExecutorCommand) -> Result<RunningTask, StartError> {
    spec.check()?;
    let failed = |source| StartError::Executor { program: executor.program.clone(), source };
    let mut child = Command::new(&executor.program)
        .args(&executor.args)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Away from the terminal's group: Ctrl-C is for the agent alone.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let pidfd = open_pidfd(child.id()).map_err(failed)?;
    let guard = KillOnDrop(Some(pidfd.try_clone().map_err(failed)?));
    // It waits for its specification, and has started nothing yet.
    descriptors::restore(child.id()).map_err(failed)?;
    let name = spec.cgroup();
    let talk = tokio::task::spawn_blocking(move || -> io::Result<StartReply> {
        let (mut stdin, mut stdout) =
            (stdin.ok_or(io::ErrorKind::BrokenPipe)?, stdout.ok_or(io::ErrorKind::BrokenPipe)?);
        stdin.write_all(&serde_json::to_vec(&spec)?)?;
        drop(stdin);
        let mut reply = Vec::new();
        stdout.read_to_end(&mut reply)?;
        Ok(serde_json::from_slice(&reply)?)
    });
    let reply = tokio::time::timeout(START_TIMEOUT, talk).await.map(|joined| joined.map_err(io::Error::other));
    let outcome = match reply {
        Err(_) => Err(StartError::Timeout),
        Ok(Err(source) | Ok(Err(source))) => Err(failed(source)),
        Ok(Ok(Ok(StartReply::Failed { reason }))) => Err(StartError::Launch { reason }),
        Ok(Ok(Ok(StartReply::Started(record)))) => Ok(record),
    };
    match outcome {
        Ok(record) => {
            guard.disarm();
            Ok(RunningTask::new(record, pidfd))
        }
        Err(error) => {
            drop(guard);
            reap(&pidfd).await;
            clean_cgroup(name).await;
            Err(error)
        }
    }
}

/// Ends an executor whose start is abandoned; its task dies with it.
struct KillOnDrop(Option<OwnedFd>);

impl KillOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(pidfd) = self.0.take() {
            // Already gone is what we want.
            let _gone = pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { reap(&pidfd).await });
            }
        }
    }
}

/// What became of a recorded task.
#[derive(Debug)]
pub enum Adoption {
    /// It runs under its executor.
    Running(RunningTask),
    /// It has ended; whatever was left of it is gone.
    Ended(ExitStatus),
}

/// A recorded task that could not be judged.
#[derive(Debug, thiserror::Error)]
#[error("adopt task {task} of allocation {alloc_id}")]
pub struct AdoptError {
    task: String,
    alloc_id: String,
    #[source]
    source: io::Error,
}

/// Finds the task of `record` again, after the agent's restart. Identity is checked by start time and boot, so a process
/// that merely got the pid is never taken for it.
///
/// # Errors
/// [`AdoptError`] when `/proc` or `exit.json` cannot be read.
pub async fn adopt(record: TaskRecord) -> Result<Adoption, AdoptError> {
    match record.executor.open() {
        Ok(Some(pidfd)) => Ok(Adoption::Running(RunningTask::new(record, pidfd))),
        Ok(None) => Ok(Adoption::Ended(ended(&record).await)),
        Err(source) => Err(AdoptError { task: record.task, alloc_id: record.alloc_id.to_string(), source }),
    }
}

/// A task under its executor. Dropping it ends nothing: the task goes on, [`adopt`] finds it again.
#[derive(Debug)]
pub struct RunningTask {
    record: TaskRecord,
    executor: OwnedFd,
    process: Option<OwnedFd>,
}

impl RunningTask {
    fn new(record: TaskRecord, executor: OwnedFd) -> Self {
        let process = record.process.open().unwrap_or_else(|error| {
            tracing::warn!(task = record.task, %error, "task's process cannot be opened");
            None
        });
        Self { record, executor, process }
    }

    /// What the agent must keep to find the task again.
    #[must_use]
    pub fn record(&self) -> &TaskRecord {
        &self.record
    }

    /// Waits until the task has ended and says how. Can be called by several at once, and again.
    ///
    /// # Errors
    /// When the runtime cannot watch the executor's descriptor.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        end_of(&self.executor).await?;
        Ok(ended(&self.record).await)
    }

    /// Sends `signal` to the task's main process.
    ///
    /// # Errors
    /// `ESRCH` when it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let process = self.process.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        send(process, signal)
    }

    /// Asks the task to end with `signal`; after `timeout` sends SIGKILL to its whole cgroup. Returns how it ended.
    ///
    /// # Errors
    /// When the runtime cannot watch the executor's descriptor.
    pub async fn kill(&self, signal: Signal, timeout: Duration) -> io::Result<ExitStatus> {
        if let Err(error) = self.signal(signal) {
            tracing::debug!(task = self.record.task, %error, "signal not delivered");
        }
        if let Ok(status) = tokio::time::timeout(timeout, self.wait()).await {
            return status;
        }
        tracing::info!(task = self.record.task, alloc = %self.record.alloc_id, ?timeout, "task did not end: SIGKILL");
        let name = self.record.cgroup.clone();
        let killed = tokio::task::spawn_blocking(move || cgroup::kill_all(&Hierarchies::find()?, &name)).await;
        if let Err(error) = killed.map_err(io::Error::other)?.map_err(io::Error::other) {
            tracing::warn!(task = self.record.task, error = &error as &dyn std::error::Error, "cgroup not emptied");
        }
        if let Ok(status) = tokio::time::timeout(EXECUTOR_END_TIMEOUT, self.wait()).await {
            return status;
        }
        // A stuck executor takes its task with it.
        send(&self.executor, Signal::KILL)?;
        self.wait().await
    }
}

fn send(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    let signal = NixSignal::try_from(signal.number())?;
    let signal = rustix::process::Signal::from_named_raw(signal as i32).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_send_signal(pidfd, signal)?)
}

/// A pidfd turns readable when its process has ended (pidfd_open(2)).
async fn reap(pidfd: &OwnedFd) {
    if let Ok(Err(error)) = tokio::time::timeout(EXECUTOR_END_TIMEOUT, end_of(pidfd)).await {
        tracing::warn!(%error, "cannot watch an executor end");
    }
}

async fn clean_cgroup(name: PathBuf) {
    let cleaned = tokio::task::spawn_blocking(move || cgroup::kill_and_remove(&Hierarchies::find()?, &name)).await;
    match cleaned {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "cgroup stays behind"),
        Err(error) => tracing::warn!(%error, "cgroup stays behind"),
    }
}

/// The status of a task whose executor is gone. Without one on disk, the executor was killed: so is what it left.
async fn ended(record: &TaskRecord) -> ExitStatus {
    let path = record.task_dir.join(EXIT_FILE);
    let error = match read_json::<ExitFile>(&path) {
        Ok(Some(file)) if file.executor == record.executor => return file.status,
        Ok(_) => "the executor ended without an exit status (killed, or the host went down)".to_owned(),
        Err(error) => format!("read {}: {error}", path.display()),
    };
    clean_cgroup(record.cgroup.clone()).await;
    ExitStatus {
        exit_code: -1,
        signal: 0,
        oom_killed: false,
        error: Some(error),
        started_at: record.started_at,
        finished_at: SystemTime::now(),
    }
}
