//! The executor itself: prepares, starts the stage, moves output into log files, and writes down how the task ended.
//!
//! Single threaded on purpose: after `unshare(CLONE_NEWPID)` no thread can be made, and one poll loop is all it needs.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, fchown, setsid};
use tokio::time::Instant;

use super::STAGE;
use super::privileges::TaskUser;
use super::protocol::{StageReply, StageSpec, StartReply, Words as _, read_message};
use crate::report::chain;
use crate::task::cgroup::{self, Hierarchies, TaskCgroup};
use crate::task::identity::ProcessIdentity;
use crate::task::logs::{Rotator, Stream};
use crate::task::record::{EXECUTOR_FILE, EXIT_FILE, ExitFile, ExitStatus, TaskRecord, write_json};
use crate::task::spec::{Driver, TaskSpec};

/// How long a stage may take to set a task up.
const STAGE_TIMEOUT: Duration = Duration::from_secs(45);
/// How long output is still read after the task's last process was killed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes moved from a pipe at once: the default size of a pipe.
const CHUNK: usize = 64 << 10;
/// Longest report of a stage in bytes.
const MAX_REPORT: u64 = 64 << 10;
/// How often writing the exit status is tried, once per second: a full disk may get room again.
const EXIT_WRITES: u32 = 60;

/// The executor's `main`.
pub(super) fn run() -> ExitCode {
    crate::sys::close_on_exec_from(3);
    // A session of its own: no terminal, no signals of the agent's group. It fails only for a leader, which is as good.
    let _leader = setsid();
    let spec: TaskSpec = match read_message(io::stdin()) {
        Ok(spec) => spec,
        Err(error) => return reply(&StartReply::Failed { reason: format!("read the task's specification: {error}") }),
    };
    match launch(&spec) {
        Ok((record, running)) => {
            let answered = reply(&StartReply::Started(record.clone()));
            running.supervise(&spec, &record);
            answered
        }
        Err(reason) => {
            if let Ok(hierarchies) = Hierarchies::find() {
                // The agent does the same once more, and reports what fails.
                let _cleaned = cgroup::kill_and_remove(&hierarchies, &spec.cgroup());
            }
            reply(&StartReply::Failed { reason })
        }
    }
}

/// Answers the agent and lets go of its pipes. An agent that died meanwhile finds the task by `executor.json`.
fn reply(message: &StartReply) -> ExitCode {
    let written = serde_json::to_vec(message).map_err(io::Error::from).and_then(|bytes| io::stdout().write_all(&bytes));
    let flushed = written.and_then(|()| io::stdout().flush());
    if let Ok(null) = fs::File::options().read(true).write(true).open("/dev/null") {
        for result in [rustix::stdio::dup2_stdin(&null), rustix::stdio::dup2_stdout(&null)] {
            // Only EMFILE-like failures are possible, and the executor works without.
            let _kept = result;
        }
    }
    if flushed.is_ok() && matches!(message, StartReply::Started(_)) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A started task.
struct Running {
    hierarchies: Hierarchies,
    cgroup: TaskCgroup,
    /// The stage, which is or becomes the task's main process.
    main: Pid,
    signals: SignalFd,
    /// `exec`: the init's reports.
    control: Option<BufReader<UnixStream>>,
    outputs: Vec<Output>,
}

/// One stream on its way to its files.
struct Output {
    pipe: fs::File,
    files: Rotator,
}

/// Prepares everything and starts the task.
fn launch(spec: &TaskSpec) -> Result<(TaskRecord, Running), String> {
    spec.check().map_err(|error| error.to_string())?;
    let user = TaskUser::resolve(spec.driver, spec.user.as_deref())?;
    for stale in [EXIT_FILE, EXECUTOR_FILE] {
        match fs::remove_file(spec.dirs.task.join(stale)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(format!("remove {stale}: {error}")),
            _ => {}
        }
    }
    let hierarchies = Hierarchies::find().map_err(|error| chain(&error))?;
    cgroup::kill_all(&hierarchies, &spec.cgroup()).map_err(|error| chain(&error))?;
    let limits = (spec.driver == Driver::Exec).then_some(&spec.resources);
    let (cgroup, notes) = TaskCgroup::create(&hierarchies, &spec.cgroup(), limits).map_err(|error| chain(&error))?;
    let (outputs, stdout, stderr) = open_outputs(spec, &user)?;
    // Orphans of the task come to this process, which buries them.
    prctl::set_child_subreaper(true).words("become subreaper")?;
    let signals = watched_signals()?;
    let (control, theirs) = UnixStream::pair().words("make the stage's socket pair")?;
    if spec.driver == Driver::Exec {
        unshare(CloneFlags::CLONE_NEWPID).words("make a pid namespace")?;
    }
    let child = Command::new("/proc/self/exe")
        .arg(STAGE)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn()
        .words("start the stage")?;
    let main = i32::try_from(child.id()).map(Pid::from_raw).map_err(|error| error.to_string())?;
    let record = record(spec, child.id(), notes).words("identify the stage")?;
    // On disk before the task exists: whatever dies from here on, the next agent finds it.
    write_json(&spec.dirs.task.join(EXECUTOR_FILE), &record).words("write executor.json")?;
    let stage = StageSpec { task: spec.clone(), procs_files: cgroup.procs_files().collect() };
    let control = talk_to_stage(control, &stage)?;
    Ok((record, Running { hierarchies, cgroup, main, signals, control, outputs }))
}

fn record(spec: &TaskSpec, pid: u32, notes: Vec<String>) -> io::Result<TaskRecord> {
    Ok(TaskRecord {
        alloc_id: spec.alloc_id.clone(),
        task: spec.task.clone(),
        process: ProcessIdentity::of(pid)?,
        executor: ProcessIdentity::of(std::process::id())?,
        cgroup: spec.cgroup(),
        task_dir: spec.dirs.task.clone(),
        started_at: SystemTime::now(),
        notes,
    })
}

/// Log files and pipes: the read ends with their files, and the write ends for stdout and stderr.
fn open_outputs(spec: &TaskSpec, user: &TaskUser) -> Result<(Vec<Output>, OwnedFd, OwnedFd), String> {
    let mut outputs = Vec::new();
    let mut open = |stream| -> Result<OwnedFd, String> {
        let (files, size) = (u64::from(spec.logs.max_files), u64::from(spec.logs.max_file_size_mb) << 20);
        let files = Rotator::open(&spec.dirs.logs, &spec.task, stream, files, size)
            .words(format_args!("open the log of {stream} in {}", spec.dirs.logs.display()))?;
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).words("make a pipe")?;
        rustix::io::ioctl_fionbio(&read, true).words("make a pipe")?;
        // So that the task can open /dev/stdout again, as many programs do for their logs.
        fchown(&write, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid))).words("give a pipe away")?;
        outputs.push(Output { pipe: read.into(), files });
        Ok(write)
    };
    let (stdout, stderr) = (open(Stream::Stdout)?, open(Stream::Stderr)?);
    Ok((outputs, stdout, stderr))
}

/// SIGCHLD tells of ended children; the others ask the executor to end, which it passes on.
fn watched_signals() -> Result<SignalFd, String> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().words("block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).words("make a signalfd")
}

/// Hands the stage its orders and waits for its word. Returns the reports' stream when the stage stays as init.
fn talk_to_stage(mut control: UnixStream, stage: &StageSpec) -> Result<Option<BufReader<UnixStream>>, String> {
    let orders = serde_json::to_vec(stage).map_err(|error| format!("write the stage's orders: {error}"))?;
    control.set_read_timeout(Some(STAGE_TIMEOUT)).words("set a time limit")?;
    control.set_write_timeout(Some(STAGE_TIMEOUT)).words("set a time limit")?;
    control.write_all(&orders).words("write the stage's orders")?;
    control.shutdown(std::net::Shutdown::Write).words("write the stage's orders")?;
    let mut reports = BufReader::new(control);
    let mut line = String::new();
    (&mut reports).take(MAX_REPORT).read_line(&mut line).words("wait for the task to start")?;
    if line.is_empty() {
        // The stage's end of the socket was closed by a successful exec(2), or by its death.
        return match stage.task.driver {
            Driver::RawExec => Ok(None),
            Driver::Exec => Err("the sandbox's init died while it was set up".to_owned()),
        };
    }
    match serde_json::from_str(&line) {
        Ok(StageReply::Started) => {
            reports.get_ref().set_nonblocking(true).words("watch the sandbox's init")?;
            Ok(Some(reports))
        }
        Ok(StageReply::Failed { reason }) => Err(reason),
        Ok(StageReply::Exited { .. }) | Err(_) => Err(format!("the stage said {line:?}")),
    }
}

impl Running {
    /// Until the task has ended and its status is on disk.
    fn supervise(mut self, spec: &TaskSpec, record: &TaskRecord) {
        let mut ending: Option<Instant> = None;
        let end = loop {
            self.wait_for_events(ending);
            self.pump();
            if let Some(end) = self.reap() {
                break end;
            }
            if self.asked_to_end() && ending.is_none() {
                // ESRCH: it is ending by itself; the next round sees it.
                let _gone = kill(self.main, Signal::try_from(spec.kill_signal.number()).unwrap_or(Signal::SIGTERM));
                ending = Some(Instant::now() + spec.kill_timeout);
            }
            if ending.is_some_and(|deadline| Instant::now() >= deadline) {
                let _gone = kill(self.main, Signal::SIGKILL);
            }
        };
        let killed = cgroup::kill_all(&self.hierarchies, &record.cgroup);
        self.drain();
        let (exit_code, signal) = self.reported(end);
        let status = ExitStatus {
            exit_code,
            signal,
            oom_killed: self.cgroup.oom_killed(),
            error: killed.err().map(|error| chain(&error)),
            started_at: record.started_at,
            finished_at: SystemTime::now(),
        };
        let file = ExitFile { executor: record.executor.clone(), status };
        for _ in 0..EXIT_WRITES {
            if write_json(&spec.dirs.task.join(EXIT_FILE), &file).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        // What cannot be removed now is removed by the agent's reconciliation.
        let _removed = cgroup::kill_and_remove(&self.hierarchies, &record.cgroup);
    }

    fn wait_for_events(&self, deadline: Option<Instant>) {
        let mut watched = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        watched.extend(self.outputs.iter().map(|output| PollFd::new(output.pipe.as_fd(), PollFlags::POLLIN)));
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        // EINTR: the caller looks at everything anyway.
        let _interrupted = poll(&mut watched, timeout);
    }

    /// Moves at most one chunk per stream, so that a flood on one does not starve the other or the signals.
    fn pump(&mut self) {
        self.outputs.retain_mut(|output| output.pump() != Pumped::Closed);
    }

    /// Reads what the dead have left in the pipes.
    fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while !self.outputs.is_empty() && Instant::now() < deadline {
            self.outputs.retain_mut(|output| output.pump() == Pumped::Some);
        }
    }

    /// Buries every child that ended; the main process's end is the task's.
    fn reap(&self) -> Option<WaitStatus> {
        let mut end = None;
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match status.pid() {
                Some(pid) if pid == self.main => end = Some(status),
                Some(_) => {}
                None => break, // nobody has ended
            }
        }
        end
    }

    fn asked_to_end(&self) -> bool {
        let mut asked = false;
        while let Ok(Some(info)) = self.signals.read_signal() {
            asked |= info.ssi_signo != Signal::SIGCHLD as u32;
        }
        asked
    }

    /// Code and signal of the program itself: as the init reported them, else as the kernel says.
    fn reported(&mut self, end: WaitStatus) -> (i32, i32) {
        let mut line = String::new();
        if let Some(control) = &mut self.control
            && control.take(MAX_REPORT).read_line(&mut line).is_ok()
            && let Ok(StageReply::Exited { code, signal }) = serde_json::from_str(&line)
        {
            return (code, signal);
        }
        exit_of(end)
    }
}

/// Exit code and signal of a status; code is 128 + signal for a signal, as shells have it.
pub(super) fn exit_of(status: WaitStatus) -> (i32, i32) {
    match status {
        WaitStatus::Exited(_, code) => (code, 0),
        WaitStatus::Signaled(_, signal, _) => (128 + signal as i32, signal as i32),
        _ => (-1, 0),
    }
}

#[derive(Eq, PartialEq)]
enum Pumped {
    Some,
    Nothing,
    Closed,
}

impl Output {
    fn pump(&mut self) -> Pumped {
        let mut chunk = [0_u8; CHUNK];
        match self.pipe.read(&mut chunk) {
            Ok(0) => Pumped::Closed,
            Ok(length) => {
                // A full disk loses output; it must neither stop nor block the task.
                let _lost = self.files.write(&chunk[..length]);
                Pumped::Some
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Pumped::Some,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Pumped::Nothing,
            Err(_) => Pumped::Closed,
        }
    }
}
