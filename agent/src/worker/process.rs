//! The worker's process: started as a child, or taken over from the agent before this one.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use culvert_control::disk::remedy;
use culvert_proxy::handoff::{ADOPTION_SOCKET, AdoptionListener, ControlSocket, PeerCredentials};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};

use crate::task::{ProcessIdentity, read_json, write_json};

/// Name of the worker's record in the data directory.
const FILE: &str = "worker.json";
/// How long a recorded worker may take to call a new agent. It calls every 100 ms.
const ADOPT_WITHIN: Duration = Duration::from_secs(3);
/// Pause after a call that could not be answered.
const ANSWER_PAUSE: Duration = Duration::from_millis(500);
/// How long a worker may take to be gone after SIGKILL.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
/// Pause after a worker could not be ended.
const KILL_PAUSE: Duration = Duration::from_secs(1);

/// How workers are started.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// The agent's data directory; holds `worker.json`.
    pub data_dir: PathBuf,
    /// Name of this node, told to the worker with every proxy.
    pub node: String,
    /// Verbosity of the worker's log, in the form of `RUST_LOG`.
    pub log: String,
}

/// What is written down about a running worker, so that the next agent finds it.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct WorkerRecord {
    process: ProcessIdentity,
}

/// A worker with a control socket.
pub(super) struct Worker {
    pub(super) control: ControlSocket,
    pub(super) process: ProcessIdentity,
    /// Only if this agent started it.
    child: Option<tokio::process::Child>,
}

impl Worker {
    /// The worker of the agent before this one, if it still lives and calls. When it returns nothing, no worker is left.
    pub(super) async fn adopt(settings: &WorkerSettings) -> Option<Self> {
        let process = recorded(&settings.data_dir).await?;
        let called = tokio::select! {
            called = await_call(&process) => called,
            // It may have died with its agent, and be a zombie until somebody looks: its successor need not wait.
            Ok(()) = process.ended() => return None,
        };
        if let Some(control) = called {
            info!(pid = process.pid, "took over the running worker");
            return Some(Self { control, process, child: None });
        }
        // Left alone it would judge by an old policy, and hold the listeners that its successor needs.
        warn!(pid = process.pid, "the recorded worker lives but does not call; it is ended");
        end(&process).await;
        None
    }

    /// This very process as a worker: whoever holds the other end of `control` speaks for it.
    #[cfg(test)]
    pub(super) fn at(control: ControlSocket) -> io::Result<Self> {
        Ok(Self { control, process: ProcessIdentity::of(std::process::id())?, child: None })
    }

    /// Starts a new worker from this very binary.
    pub(super) fn start(settings: &WorkerSettings) -> io::Result<Self> {
        let (control, for_worker) = ControlSocket::pair()?;
        let mut child = tokio::process::Command::new("/proc/self/exe")
            .arg("worker")
            .env_clear()
            .env("RUST_LOG", &settings.log)
            .stdin(Stdio::from(for_worker)) // the worker's end of the control socket
            .stdout(Stdio::null())
            .process_group(0) // a Ctrl-C at the terminal is for the agent, which drains the worker
            .spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("the worker ended at once"))?;
        let recorded = ProcessIdentity::of(pid).and_then(|process| {
            write_record(&settings.data_dir, &process)?;
            Ok(process)
        });
        let process = match recorded {
            Ok(process) => process,
            Err(error) => {
                // Without a record nobody would find it again.
                child.start_kill()?;
                return Err(error);
            }
        };
        info!(pid, "started the worker");
        Ok(Self { control, process, child: Some(child) })
    }

    /// Did an agent before this one start it?
    pub(super) fn was_adopted(&self) -> bool {
        self.child.is_none()
    }

    /// Makes sure that the process is gone, and reaps it if it was our child.
    pub(super) async fn end(mut self) {
        if let Some(child) = &mut self.child {
            if let Err(error) = child.kill().await {
                warn!(%error, "cannot end the worker");
            }
        } else {
            end(&self.process).await;
        }
    }
}

/// Ends the worker that is written down, if it lives.
pub(super) async fn end_recorded(data_dir: &Path) {
    if let Some(process) = recorded(data_dir).await {
        end(&process).await;
    }
}

/// Two workers would share listeners: none is started before this one has ended. For want of descriptors that may take a while.
async fn end(process: &ProcessIdentity) {
    while let Err(error) = process.kill() {
        error!(%error, pid = process.pid, "cannot end the worker");
        if !is_out_of_descriptors(&error) {
            return;
        }
        sleep(KILL_PAUSE).await;
    }
    let ended = async {
        loop {
            match process.ended().await {
                Err(error) if is_out_of_descriptors(&error) => sleep(ANSWER_PAUSE).await,
                ended => return ended,
            }
        }
    };
    match timeout(ENDS_WITHIN, ended).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, pid = process.pid, "the end of the worker cannot be watched"),
        Err(_) => error!(pid = process.pid, "the worker was killed, and is there yet"),
    }
}

/// Waits until the worker calls; nothing when it does not. While this agent cannot answer for want of descriptors, it goes on
/// waiting: the worker calls again and again, and carries its connections meanwhile.
async fn await_call(process: &ProcessIdentity) -> Option<ControlSocket> {
    let mut listener = None;
    let mut until = Instant::now() + ADOPT_WITHIN;
    while Instant::now() < until {
        let Ok(answered) = timeout_at(until, answer(&mut listener)).await else { break };
        let error =
            match answered.and_then(|(control, caller)| Ok((is_recorded(caller.pid, process)?, control, caller))) {
                Ok((true, control, _)) => return Some(control),
                Ok((false, _, caller)) => {
                    warn!(pid = caller.pid, "a process that is not the recorded worker called; refused");
                    continue;
                }
                Err(error) => error,
            };
        warn!(%error, pid = process.pid, "the running worker cannot be answered yet");
        if is_out_of_descriptors(&error) {
            until = Instant::now() + ADOPT_WITHIN;
        }
        sleep(ANSWER_PAUSE).await;
    }
    None
}

async fn answer(listener: &mut Option<AdoptionListener>) -> io::Result<(ControlSocket, PeerCredentials)> {
    let listener = match listener {
        Some(listener) => listener,
        None => listener.insert(AdoptionListener::bind(ADOPTION_SOCKET)?),
    };
    listener.accept().await
}

fn is_recorded(pid: i32, process: &ProcessIdentity) -> io::Result<bool> {
    Ok(u32::try_from(pid) == Ok(process.pid) && process.exists()?)
}

/// Somebody may close some meanwhile.
fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// `worker.json` cannot be used, so that no worker could be found again.
#[derive(Debug, thiserror::Error)]
#[error("record of the worker {} cannot be used ({})", path.display(), remedy(source))]
pub struct WorkerFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Sees to it that the worker's record can be read, if there is one: a worker whose record cannot be written is not started.
///
/// # Errors
/// [`WorkerFileError`]. What is in the file does not matter: a worker that is not found drains, and another one is started.
pub fn check_record(data_dir: &Path) -> Result<(), WorkerFileError> {
    let path = record_path(data_dir);
    match std::fs::read(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(WorkerFileError { path, source }),
        _ => Ok(()),
    }
}

fn record_path(data_dir: &Path) -> PathBuf {
    data_dir.join(FILE)
}

/// The worker that is written down. Whether one is has to be known before another is started: for want of descriptors this
/// waits.
async fn recorded(data_dir: &Path) -> Option<ProcessIdentity> {
    loop {
        match read_json::<WorkerRecord>(&record_path(data_dir)) {
            Ok(record) => return Some(record?.process),
            Err(error) if is_out_of_descriptors(&error) => {
                warn!(%error, "worker.json cannot be read yet");
                sleep(ANSWER_PAUSE).await;
            }
            Err(error) => {
                warn!(%error, "worker.json is not readable; a running worker will drain");
                return None;
            }
        }
    }
}

fn write_record(data_dir: &Path, process: &ProcessIdentity) -> io::Result<()> {
    write_json(&record_path(data_dir), &WorkerRecord { process: process.clone() })
}

/// Forgets the worker, after it ended on purpose.
pub(super) fn forget(data_dir: &Path) {
    match std::fs::remove_file(record_path(data_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => warn!(%error, "cannot remove worker.json"),
        _ => {}
    }
}
