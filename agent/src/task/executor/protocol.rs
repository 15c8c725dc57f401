//! Messages between agent, executor and stage, and the errors they carry: words for a job's author.

use std::fmt::Display;
use std::io::{self, Read};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::task::record::TaskRecord;
use crate::task::spec::TaskSpec;

/// Longest message in bytes: bounds what a confused peer can make us read. Environments are at most 2 MiB in Linux anyway.
const MAX_MESSAGE: u64 = 8 << 20;

/// The executor's one answer to the agent.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StartReply {
    /// The task runs.
    Started(TaskRecord),
    /// It does not, and nothing is left of it.
    Failed {
        /// In words.
        reason: String,
    },
}

/// What a stage is to do.
#[derive(Deserialize, Serialize)]
pub(super) struct StageSpec {
    /// The task.
    pub(super) task: TaskSpec,
    /// Files into which the stage writes `0` to join its cgroups.
    pub(super) procs_files: Vec<PathBuf>,
}

/// What a stage says, one JSON document per line. End of file without a word means that the stage has become the task.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum StageReply {
    /// The task's program could not be started.
    Failed {
        /// In words.
        reason: String,
    },
    /// `exec`: the program runs below the stage, which stays as init.
    Started,
    /// `exec`: the program has ended.
    Exited {
        /// Exit code; 128 + signal when a signal ended it.
        code: i32,
        /// The signal, 0 for none.
        signal: i32,
    },
}

/// Reads one JSON document up to the end of the stream.
pub(super) fn read_message<T: DeserializeOwned>(from: impl Read) -> io::Result<T> {
    let mut bytes = Vec::new();
    from.take(MAX_MESSAGE).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Turns an error into words with what was tried in front: `mount /proc: operation not permitted`.
pub(super) trait Words<T> {
    /// `doing` names operation and object.
    fn words(self, doing: impl Display) -> Result<T, String>;
}

impl<T, E: Into<io::Error>> Words<T> for Result<T, E> {
    fn words(self, doing: impl Display) -> Result<T, String> {
        self.map_err(|error| format!("{doing}: {}", error.into()))
    }
}
