//! What the fuzz targets call: the readers of submissions and of the files of the data directory, with no node behind them.

use axum::http::StatusCode;
use culvert_jobspec::NodeContext;

use crate::{routes, runner, task, worker, workload};

pub use crate::config::finish;

/// Reads the body of `PUT /v1/culvert/jobs` and judges its job, as far as that needs no node.
///
/// # Errors
/// What the client is told.
pub fn submission(body: &[u8]) -> Result<(), (StatusCode, String)> {
    let context = NodeContext { datacenter: "dc1".to_owned(), ..NodeContext::default() };
    routes::judge(body, &context)
}

/// A file of the data directory that an agent reads of the agent before it.
#[derive(Clone, Copy, Debug)]
pub enum Record {
    /// `worker.json`.
    Worker,
    /// `jobs/*.json`.
    Job,
    /// `allocations/*.json`.
    Allocation,
    /// `executor.json` of a task.
    Task,
    /// `exit.json` of a task.
    Exit,
    /// `network.json`.
    Network,
    /// `node.json`.
    Node,
}

impl Record {
    /// Chosen by the first byte of an input.
    #[must_use]
    pub fn of(byte: u8) -> Self {
        match byte {
            b'w' => Self::Worker,
            b'j' => Self::Job,
            b'a' => Self::Allocation,
            b't' => Self::Task,
            b'e' => Self::Exit,
            b'n' => Self::Network,
            _ => Self::Node,
        }
    }
}

/// Reads `bytes` as such a file, and gives back what would be written then.
///
/// # Errors
/// Why it is none.
pub fn record(kind: Record, bytes: &[u8]) -> serde_json::Result<Vec<u8>> {
    match kind {
        Record::Worker => again::<worker::WorkerRecord>(bytes),
        Record::Job => again::<runner::JobRecord>(bytes),
        Record::Allocation => again::<runner::AllocationRecord>(bytes),
        Record::Task => again::<task::TaskRecord>(bytes),
        Record::Exit => again::<task::ExitFile>(bytes),
        Record::Network => again::<workload::NetworkContent>(bytes),
        Record::Node => again::<workload::NodeFile>(bytes),
    }
}

fn again<T: serde::de::DeserializeOwned + serde::Serialize>(bytes: &[u8]) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(&serde_json::from_slice::<T>(bytes)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use culvert_proxy::handoff::ToAgent;

    use super::*;

    /// Name and content of every seed of `target`.
    fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds").join(target);
        let seed = |path: &Path| (path.display().to_string(), std::fs::read(path).expect("a seed"));
        let seeds: Vec<_> =
            std::fs::read_dir(folder).expect("seeds").map(|entry| seed(&entry.expect("a seed").path())).collect();
        assert!(!seeds.is_empty(), "{target}");
        seeds
    }

    #[test]
    fn the_seeds_are_what_their_readers_understand() {
        for (name, bytes) in seeds("http_bodies") {
            if let Some(body) = bytes.strip_prefix(b"j") {
                submission(body).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            }
        }
        for (name, bytes) in seeds("worker_messages") {
            serde_json::from_slice::<ToAgent>(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        for (name, bytes) in seeds("configuration") {
            let refused = finish(std::str::from_utf8(&bytes).expect("text"), "agent.hcl").err();
            assert_eq!(refused.is_some(), name.ends_with("refused.hcl"), "{name}: {refused:?}");
        }
        for (name, bytes) in seeds("state_files") {
            record(Record::of(bytes[0]), &bytes[1..]).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}
