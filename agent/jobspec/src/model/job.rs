//! Job, group and network.

use super::{Service, Task, UnknownTask};
use crate::{Location, Template};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One `job` block. Its label is both id and name.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Job {
    /// The label of the block.
    pub id: String,
    /// `namespace`; only `default` is accepted.
    pub namespace: String,
    /// `region`, `global` unless set.
    pub region: String,
    /// `datacenters`, `["*"]` unless set. Patterns with `*`; [`Job::runs_in`] compares.
    pub datacenters: Vec<String>,
    /// `type`; only `service` is accepted.
    pub kind: JobType,
    /// `priority`, 1 to 100, 50 unless set.
    pub priority: u8,
    /// `meta` of the job; see [`Job::task_meta`] for the merged view.
    pub meta: BTreeMap<String, Template>,
    /// In the order of the file; names are unique.
    pub groups: Vec<Group>,
    /// Where things were written, for errors found after parsing.
    #[serde(default)]
    pub origins: Origins,
}

impl Job {
    /// The group called `name`.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|group| group.name == name)
    }

    /// Group and task by name.
    ///
    /// # Errors
    /// [`UnknownTask`] names the one that is missing.
    pub fn task(&self, group: &str, task: &str) -> Result<(&Group, &Task), UnknownTask> {
        let unknown = || UnknownTask { job: self.id.clone(), group: group.to_owned(), task: task.to_owned() };
        let found = self.group(group).ok_or_else(unknown)?;
        let task = found.tasks.iter().find(|candidate| candidate.name == task).ok_or_else(unknown)?;
        Ok((found, task))
    }

    /// Job, group and task `meta` merged; the innermost wins.
    #[must_use]
    pub fn task_meta<'a>(&'a self, group: &'a Group, task: Option<&'a Task>) -> BTreeMap<&'a str, &'a Template> {
        let layers = [Some(&self.meta), Some(&group.meta), task.map(|task| &task.meta)];
        layers.into_iter().flatten().flatten().map(|(key, value)| (key.as_str(), value)).collect()
    }

    /// Whether a node of `datacenter` may run this job (`*` stands for any text, as Nomad's globs).
    #[must_use]
    pub fn runs_in(&self, datacenter: &str) -> bool {
        self.datacenters.iter().any(|pattern| glob(pattern, datacenter))
    }
}

/// `*` matches any text, everything else itself.
fn glob(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut pieces: Vec<&str> = pieces.collect();
    let Some(last) = pieces.pop() else { return rest.is_empty() };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// `type` of a job. Nomad's `batch`, `system` and `sysbatch` are refused by name.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobType {
    /// Runs until it is stopped.
    #[default]
    Service,
}

/// One `group` block: tasks that share a network namespace, and the services they offer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Group {
    /// The label of the block.
    pub name: String,
    /// `count`, 1 unless set; 0 runs nothing.
    pub count: u32,
    /// The only `network` block.
    pub network: Network,
    /// `service` blocks of the group.
    pub services: Vec<Service>,
    /// In the order of the file; names are unique within the group.
    pub tasks: Vec<Task>,
    /// `meta` of the group.
    pub meta: BTreeMap<String, Template>,
}

/// `network` of a group.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Network {
    /// `mode`; only `bridge` is accepted.
    pub mode: NetworkMode,
    /// `port` blocks in the order of the file; labels are unique.
    pub ports: Vec<Port>,
}

impl Network {
    /// The port with this label.
    #[must_use]
    pub fn port(&self, label: &str) -> Option<&Port> {
        self.ports.iter().find(|port| port.label == label)
    }
}

/// `mode` of a network. Nomad's `host`, `none` and `cni/*` are refused by name.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// A network namespace per allocation, joined by the node's bridge.
    #[default]
    Bridge,
}

/// `port "label" {}`: a port of the host that leads into the network namespace, for TCP and UDP.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Port {
    /// The label of the block.
    pub label: String,
    /// `static`: the port of the host; `None`: the node picks one.
    #[serde(rename = "static")]
    pub static_port: Option<u16>,
    /// `to`: the port inside the namespace; `None` (unset, 0 or -1): the same number as the host's.
    pub to: Option<u16>,
}

/// Where parts of a job were written: path such as `group.api.task.web.driver` → place in the file.
///
/// Never part of equality: moving a block to another line does not change the job.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Origins(pub(crate) BTreeMap<String, Location>);

impl Origins {
    /// The place of `path`, if it was kept.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Location> {
        self.0.get(path)
    }
}

impl PartialEq for Origins {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn datacenter_patterns_match_as_globs() {
        for (pattern, text, expected) in [
            ("*", "dc1", true),
            ("dc1", "dc1", true),
            ("dc1", "dc10", false),
            ("dc*", "dc10", true),
            ("*-eu", "dc-eu", true),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxcyyb", false),
            ("ab*ba", "aba", false),
            ("", "dc1", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }
}
