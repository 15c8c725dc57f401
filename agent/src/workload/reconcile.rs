//! Removing by name: what a crash left, and everything when the node leaves.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::alloc_id::{AllocId, SHORT_ID};
use super::network::{Network, NetworkError, blocking, failed};
use super::{firewall, netns, sysctl};
use crate::task::{self, AllocDir, Hierarchies};

impl Network {
    /// Removes whatever is ours by name and belongs to none of `live`: processes and cgroups, netns, veths, published
    /// ports, addresses, mounts. Returns what was removed, for the log. Goes on after a failure; the first one is returned.
    ///
    /// # Errors
    /// [`NetworkError`] of the first removal that failed.
    pub async fn reconcile(&self, live: &[AllocId]) -> Result<Vec<String>, NetworkError> {
        let live: BTreeSet<&AllocId> = live.iter().collect();
        let mut outcome = Outcome::default();
        // First what runs: a process could hold, or remake, the rest.
        outcome.add(self.remove_cgroups(&live).await);
        let mut state = self.state.lock().await;
        let stale: Vec<AllocId> = state.allocations().keys().filter(|id| !live.contains(id)).cloned().collect();
        for id in stale {
            let removed = self.remove_locked(&mut state, &id).await;
            outcome.add(removed.map(|()| vec![format!("network of allocation {id}")]));
        }
        let short: BTreeSet<&str> = live.iter().map(|id| id.short()).collect();
        outcome.add(self.remove_netns(&short).await);
        outcome.add(self.remove_veths(&short).await);
        outcome.add(self.remove_mounts(&live).await);
        outcome.add(self.apply(&state).await.map(|()| Vec::new()));
        outcome.finish()
    }

    /// Removes everything, also the bridge, the table, the records, and puts changed kernel settings back: the node leaves.
    /// Directories of allocations stay; who keeps their logs removes them. Afterwards this value is of no use any more.
    ///
    /// # Errors
    /// [`NetworkError`] of the first removal that failed; the records stay then.
    pub async fn close_all(&self) -> Result<(), NetworkError> {
        self.reconcile(&[]).await?;
        let mut state = self.state.lock().await;
        let (nft, script) = (self.settings.nft.clone(), firewall::removal(&self.settings.table));
        blocking(move || firewall::apply(&nft, &script)).await?;
        self.netlink.delete(&self.settings.bridge).await.map_err(failed("delete bridge", &self.settings.bridge))?;
        // Backwards: `ip_forward` changes others when it is written, and sorts after them.
        for (name, former) in state.sysctls().iter().rev() {
            if sysctl::exists(name) {
                sysctl::set(name, former)?;
            }
        }
        if let Ok(hierarchies) = Hierarchies::find() {
            task::remove_if_empty(&hierarchies, Path::new(&self.settings.cgroup_parent));
        }
        Ok(state.forget()?)
    }

    async fn remove_cgroups(&self, live: &BTreeSet<&AllocId>) -> Result<Vec<String>, NetworkError> {
        let parent = PathBuf::from(&self.settings.cgroup_parent);
        let live: BTreeSet<AllocId> = live.iter().map(|id| (*id).clone()).collect();
        blocking(move || {
            // A host without cgroup2 has no cgroups of ours.
            let Ok(hierarchies) = Hierarchies::find() else { return Ok(Vec::new()) };
            let mut removed = Vec::new();
            for name in task::children(&hierarchies, &parent) {
                if AllocId::new(&name).is_ok_and(|id| !live.contains(&id)) {
                    task::kill_and_remove(&hierarchies, &parent.join(&name))?;
                    removed.push(format!("cgroup {}", parent.join(&name).display()));
                }
            }
            Ok(removed)
        })
        .await
    }

    async fn remove_netns(&self, live: &BTreeSet<&str>) -> Result<Vec<String>, NetworkError> {
        let entries = match std::fs::read_dir(&self.settings.netns_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed("read", self.settings.netns_dir.display().to_string()))?,
        };
        let mut removed = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            if is_stale(&name.to_string_lossy(), &self.settings.netns_prefix, live) {
                let path = entry.path();
                let gone = blocking(move || netns::remove(&path)).await;
                gone.map_err(failed("remove netns", name.to_string_lossy()))?;
                removed.push(format!("netns {}", name.to_string_lossy()));
            }
        }
        Ok(removed)
    }

    async fn remove_veths(&self, live: &BTreeSet<&str>) -> Result<Vec<String>, NetworkError> {
        let links = self.netlink.links().await.map_err(failed("list", "interfaces"))?;
        let mut removed = Vec::new();
        for link in links.iter().filter(|link| is_stale(&link.name, &self.settings.veth_prefix, live)) {
            self.netlink.delete(&link.name).await.map_err(failed("delete interface", &link.name))?;
            removed.push(format!("interface {}", link.name));
        }
        Ok(removed)
    }

    async fn remove_mounts(&self, live: &BTreeSet<&AllocId>) -> Result<Vec<String>, NetworkError> {
        let Ok(entries) = std::fs::read_dir(self.settings.data_dir.join("alloc")) else { return Ok(Vec::new()) };
        for entry in entries.flatten() {
            let Ok(id) = AllocId::new(&entry.file_name().to_string_lossy()) else { continue };
            if !live.contains(&id) {
                let directory = AllocDir::new(&self.settings.data_dir, &id);
                blocking(move || directory.unmount()).await?;
            }
        }
        Ok(Vec::new())
    }
}

/// Collects what was removed and the first failure.
#[derive(Default)]
struct Outcome {
    removed: Vec<String>,
    failure: Option<NetworkError>,
}

impl Outcome {
    fn add(&mut self, result: Result<Vec<String>, NetworkError>) {
        match result {
            Ok(removed) => self.removed.extend(removed),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "reconciliation goes on after a failure");
                self.failure.get_or_insert(error);
            }
        }
    }

    fn finish(self) -> Result<Vec<String>, NetworkError> {
        self.failure.map_or(Ok(self.removed), Err)
    }
}

/// Is `name` one of ours (prefix and eight hexadecimal digits) of an allocation that does not live?
fn is_stale(name: &str, prefix: &str, live: &BTreeSet<&str>) -> bool {
    let hexadecimal = |id: &&str| id.len() == SHORT_ID && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.strip_prefix(prefix).filter(hexadecimal).is_some_and(|id| !live.contains(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_our_shape_are_ours() {
        let live = BTreeSet::from(["0123abcd"]);
        let stale = |name| is_stale(name, "cv", &live);
        assert!(stale("cvdeadbeef"));
        assert!(!stale("cv0123abcd"), "it lives");
        for other in ["cv", "cvlan0", "cvdeadbee", "cvdeadbeef0", "eth0", "xcvdeadbeef", "cvdeadbeeg"] {
            assert!(!stale(other), "{other}");
        }
    }
}
