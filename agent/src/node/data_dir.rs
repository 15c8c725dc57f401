//! The data directory as a start finds it.

use std::path::Path;

use anyhow::bail;
use culvert_control::disk::remedy;

use crate::task::sweep;

/// What this agent writes in the data directory itself, beside the state store.
const FILES: [&str; 4] = ["node.json", "network.json", "worker.json", "direct.json"];

pub(super) fn make_private(data_dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    // Tasks find their own directories below: others may pass through, not look.
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(data_dir);
    made.map_err(|error| {
        let what = format!("data directory {} cannot be used ({})", data_dir.display(), remedy(&error));
        anyhow::Error::new(error).context(what)
    })
}

/// Removes what a write began and did not finish.
pub(super) fn sweep_unfinished(data_dir: &Path) {
    sweep(data_dir, |name| FILES.contains(&name));
}

/// A state file that lost its content, after a power cut say, would pass for that of a new mesh: without the intentions that
/// jobs of this node rely on.
pub(super) fn refuse_emptied_state(data_dir: &Path) -> anyhow::Result<()> {
    let state = data_dir.join("state.redb");
    let has_jobs = std::fs::read_dir(data_dir.join("jobs")).is_ok_and(|mut jobs| jobs.next().is_some());
    if has_jobs && std::fs::metadata(&state).is_ok_and(|state| state.len() == 0) {
        bail!(
            "{} is empty, but this node has jobs: restore it from a backup, or remove it to begin a new mesh without the \
             intentions and certificates of the old one",
            state.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_was_emptied_under_jobs_is_refused() {
        let data = tempfile::tempdir().expect("a directory");
        let state = data.path().join("state.redb");
        refuse_emptied_state(data.path()).expect("a new node");
        std::fs::write(&state, "").expect("a file");
        refuse_emptied_state(data.path()).expect("killed before it had anything");
        std::fs::create_dir(data.path().join("jobs")).expect("a directory");
        std::fs::write(data.path().join("jobs/61.json"), "{}").expect("a job");
        let refused = refuse_emptied_state(data.path()).expect_err("jobs, and no state");
        assert!(refused.to_string().contains("restore it from a backup"), "{refused}");
        std::fs::write(&state, "redb").expect("a file");
        refuse_emptied_state(data.path()).expect("the store looks at what is in it");
    }
}
