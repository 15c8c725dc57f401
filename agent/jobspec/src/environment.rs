//! The environment of a task, and what `${…}` means for one allocation (Nomad's "Runtime Environment").
//!
//! Left out: `PATH`, `HOME` and the like, which the driver decides.

use crate::template::{Target, target};
use crate::{Group, Job, Resources, Task, Template, TemplateError, UnknownTask};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Longest value of one variable in bytes: Linux takes no more (`MAX_ARG_STRLEN`, execve(2)).
pub const MAX_VALUE: usize = 128 * 1024;

/// What an allocation knows about itself and its node.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct AllocContext {
    /// UUID of the allocation.
    pub alloc_id: String,
    /// Which of the group's `count` instances, from 0.
    pub index: u32,
    /// The node that runs it.
    pub node: NodeContext,
    /// Under which address the node publishes ports.
    pub host_ip: IpAddr,
    /// The allocation's own address, inside its network namespace.
    pub alloc_ip: IpAddr,
    /// The interface that carries `alloc_ip`.
    pub alloc_interface: String,
    /// The ports of the group's network by label; for tasks also the sidecars' as `connect-proxy-<service>`.
    pub ports: BTreeMap<String, PortBinding>,
}

impl AllocContext {
    /// A context for names alone.
    fn nowhere(node: NodeContext) -> Self {
        let (host_ip, alloc_ip) = (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into());
        let (alloc_id, alloc_interface) = (String::new(), String::new());
        Self { alloc_id, index: 0, node, host_ip, alloc_ip, alloc_interface, ports: BTreeMap::new() }
    }
}

/// The node, as `${node.…}`, `${attr.…}` and `${meta.…}` show it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct NodeContext {
    /// `node.unique.id`.
    pub id: String,
    /// `node.unique.name`.
    pub name: String,
    /// `node.datacenter` and `NOMAD_DC`.
    pub datacenter: String,
    /// `attr.<key>`, for example `kernel.name`.
    pub attributes: BTreeMap<String, String>,
    /// `meta.<key>`.
    pub meta: BTreeMap<String, String>,
}

impl NodeContext {
    /// The keys of `attributes` that every node has.
    pub const ATTRIBUTES: [&str; 4] = ["cpu.arch", "culvert.version", "kernel.name", "unique.hostname"];
}

/// Where a `port` block ended up.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct PortBinding {
    /// Port of the host.
    pub host: u16,
    /// Port inside the network namespace.
    pub inside: u16,
}

/// A task's directories, as the task itself sees them.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct TaskDirs {
    /// `NOMAD_ALLOC_DIR`: shared by the tasks of the allocation.
    pub alloc: String,
    /// `NOMAD_TASK_DIR`: the task's own (`local`).
    pub local: String,
    /// `NOMAD_SECRETS_DIR`: readable by the task alone.
    pub secrets: String,
}

/// Why a task has no environment.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum EnvironmentError {
    /// The job has no such task.
    #[error(transparent)]
    UnknownTask(#[from] UnknownTask),
    /// References to references made a value that no process can be given.
    #[error("job {job:?}: variable {variable:?}: {error}")]
    Value {
        /// Job id.
        job: String,
        /// Name of the variable.
        variable: String,
        /// What is wrong with it.
        error: TemplateError,
    },
}

/// Values of one allocation, for its processes and for `${…}`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    node: BTreeMap<String, String>,
}

impl Environment {
    /// What the services of `group` may refer to.
    ///
    /// # Errors
    /// [`EnvironmentError::Value`] for a `meta` value of more than [`MAX_VALUE`] bytes.
    pub fn of_group(job: &Job, group: &Group, context: &AllocContext) -> Result<Self, EnvironmentError> {
        let mut environment = Self::base(job, group, context);
        environment.add_meta(job, group, None)?;
        Ok(environment)
    }

    /// What `task` of `group` finds in its environment, and what its `args` may refer to.
    ///
    /// # Errors
    /// [`EnvironmentError`] for a task that `job` does not have, and for a value of more than [`MAX_VALUE`] bytes.
    pub fn of_task(
        job: &Job,
        group: &str,
        task: &str,
        context: &AllocContext,
        dirs: &TaskDirs,
    ) -> Result<Self, EnvironmentError> {
        let (group, task) = job.task(group, task)?;
        let mut environment = Self::base(job, group, context);
        environment.add_task(&task.name, task.resources, dirs);
        environment.add_meta(job, group, Some(task))?;
        environment.add_task_env(job, &task.env)?;
        Ok(environment)
    }

    /// The variables for the process; names are safe for a shell, with the raw form beside them where they differ.
    #[must_use]
    pub fn variables(&self) -> &BTreeMap<String, String> {
        &self.variables
    }

    /// The value of what stands between `${` and `}`.
    #[must_use]
    pub fn lookup(&self, reference: &str) -> Option<&str> {
        match target(reference) {
            Target::Variable(name) => self.variables.get(name),
            Target::Node(name) => self.node.get(name),
        }
        .map(String::as_str)
    }

    /// The names that services and tasks of `group` have in common, without `meta`. The values mean nothing, as below.
    pub(crate) fn names_of_group(job: &Job, group: &Group) -> Self {
        let attributes = NodeContext::ATTRIBUTES.map(|key| (key.to_owned(), String::new()));
        let labels = group.network.ports.iter().map(|port| port.label.clone());
        let ports = labels.map(|label| (label, PortBinding::default())).collect();
        let node = NodeContext { attributes: attributes.into(), ..NodeContext::default() };
        Self::base(job, group, &AllocContext { ports, ..AllocContext::nowhere(node) })
    }

    /// The names that every task of `group` has beside those, without `meta`.
    pub(crate) fn names_of_tasks(group: &Group) -> Self {
        let mut names = Self::default();
        names.add_task("", Resources::default(), &TaskDirs::default());
        let nowhere = AllocContext::nowhere(NodeContext::default());
        for service in group.services.iter().filter(|service| service.connect.is_some()) {
            names.add_port(&format!("connect-proxy-{}", service.name), PortBinding::default(), &nowhere);
        }
        names
    }

    /// The names that the keys of `meta` make.
    pub(crate) fn names_of_meta(meta: &BTreeMap<String, Template>) -> Self {
        let mut names = Self::default();
        meta.keys().for_each(|key| names.set_meta(key, String::new()));
        names
    }

    /// The names that `task` adds: those of its `meta` and `env`.
    pub(crate) fn names_of_task(task: &Task) -> Self {
        let mut names = Self::names_of_meta(&task.meta);
        task.env.keys().for_each(|key| names.set_both(key, String::new()));
        names
    }

    /// All names, as they stand between `${` and `}`.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.variables.keys().chain(self.node.keys()).map(String::as_str)
    }

    fn base(job: &Job, group: &Group, context: &AllocContext) -> Self {
        let mut environment = Self { variables: BTreeMap::new(), node: node_values(&context.node) };
        let id = &context.alloc_id;
        environment.set("NOMAD_ALLOC_ID", id);
        environment.set("NOMAD_SHORT_ALLOC_ID", id.chars().take(8).collect::<String>());
        environment.set("NOMAD_ALLOC_NAME", format!("{}.{}[{}]", job.id, group.name, context.index));
        environment.set("NOMAD_ALLOC_INDEX", context.index);
        environment.set("NOMAD_GROUP_NAME", &group.name);
        environment.set("NOMAD_JOB_ID", &job.id);
        environment.set("NOMAD_JOB_NAME", &job.id);
        environment.set("NOMAD_NAMESPACE", &job.namespace);
        environment.set("NOMAD_REGION", &job.region);
        environment.set("NOMAD_DC", &context.node.datacenter);
        for (label, port) in &context.ports {
            environment.add_port(label, *port, context);
        }
        for service in &group.services {
            for upstream in service.connect.iter().flat_map(|connect| &connect.sidecar.proxy.upstreams) {
                // Always 127.0.0.1, as Nomad's, whatever `local_bind_address` says; with another one the application
                // has to name the address itself.
                let (name, port) = (&upstream.destination_name, upstream.local_bind_port);
                environment.set_both(&format!("NOMAD_UPSTREAM_ADDR_{name}"), format!("127.0.0.1:{port}"));
                environment.set_both(&format!("NOMAD_UPSTREAM_IP_{name}"), "127.0.0.1".to_owned());
                environment.set_both(&format!("NOMAD_UPSTREAM_PORT_{name}"), port.to_string());
            }
        }
        environment
    }

    fn add_task(&mut self, name: &str, resources: Resources, dirs: &TaskDirs) {
        self.set("NOMAD_TASK_NAME", name);
        self.set("NOMAD_ALLOC_DIR", &dirs.alloc);
        self.set("NOMAD_TASK_DIR", &dirs.local);
        self.set("NOMAD_SECRETS_DIR", &dirs.secrets);
        self.set("NOMAD_CPU_LIMIT", resources.cpu_mhz);
        self.set("NOMAD_MEMORY_LIMIT", resources.memory_mb);
    }

    fn add_port(&mut self, label: &str, port: PortBinding, context: &AllocContext) {
        let host = SocketAddr::new(context.host_ip, port.host);
        let inside = SocketAddr::new(context.alloc_ip, port.inside);
        for (prefix, value) in [
            ("NOMAD_PORT_", port.inside.to_string()),
            ("NOMAD_ALLOC_PORT_", port.inside.to_string()),
            ("NOMAD_HOST_PORT_", port.host.to_string()),
            ("NOMAD_IP_", context.host_ip.to_string()),
            ("NOMAD_HOST_IP_", context.host_ip.to_string()),
            ("NOMAD_ADDR_", host.to_string()),
            ("NOMAD_HOST_ADDR_", host.to_string()),
            ("NOMAD_ALLOC_IP_", context.alloc_ip.to_string()),
            ("NOMAD_ALLOC_ADDR_", inside.to_string()),
            ("NOMAD_ALLOC_INTERFACE_", context.alloc_interface.clone()),
        ] {
            self.set_both(&format!("{prefix}{label}"), value);
        }
    }

    fn add_meta(&mut self, job: &Job, group: &Group, task: Option<&Task>) -> Result<(), EnvironmentError> {
        let mut rendered = Vec::new();
        for (key, value) in job.task_meta(group, task) {
            rendered.push((key.to_owned(), self.value(job, key, value)?));
        }
        for (key, value) in rendered {
            self.set_meta(&key, value);
        }
        Ok(())
    }

    /// `NOMAD_META_<key>` as written and in upper case.
    fn set_meta(&mut self, key: &str, value: String) {
        self.set_both(&format!("NOMAD_META_{key}"), value.clone());
        self.set_both(&format!("NOMAD_META_{}", key.to_uppercase()), value);
    }

    /// Adds `env`. Values may refer to each other in any order; a circle leaves its references as written.
    fn add_task_env(&mut self, job: &Job, env: &BTreeMap<String, Template>) -> Result<(), EnvironmentError> {
        let mut waiting: BTreeSet<&str> = env.keys().map(String::as_str).collect();
        while !waiting.is_empty() {
            let ready = |name: &&str| !refers_to(&env[*name], |other| waiting.contains(other));
            let mut turn: Vec<&str> = waiting.iter().copied().filter(ready).collect();
            if turn.is_empty() {
                turn = waiting.iter().copied().collect();
            }
            for name in turn {
                let value = self.value(job, name, &env[name])?;
                self.set_both(name, value);
                waiting.remove(name);
            }
        }
        Ok(())
    }

    fn value(&self, job: &Job, variable: &str, template: &Template) -> Result<String, EnvironmentError> {
        let variable = || variable.to_owned();
        template.render("its value", self).map_err(|error| EnvironmentError::Value {
            job: job.id.clone(),
            variable: variable(),
            error,
        })
    }

    fn set(&mut self, name: &str, value: impl ToString) {
        self.variables.insert(name.to_owned(), value.to_string());
    }

    /// Sets `name` and its shell-safe form.
    fn set_both(&mut self, name: &str, value: String) {
        let clean = clean_name(name);
        if clean != name {
            self.variables.insert(clean, value.clone());
        }
        self.variables.insert(name.to_owned(), value);
    }
}

fn refers_to(template: &Template, is: impl Fn(&str) -> bool) -> bool {
    template.references().any(|reference| matches!(target(reference), Target::Variable(name) if is(name)))
}

fn node_values(node: &NodeContext) -> BTreeMap<String, String> {
    let fixed = [("node.unique.id", &node.id), ("node.unique.name", &node.name), ("node.datacenter", &node.datacenter)];
    let attributes = node.attributes.iter().map(|(key, value)| (format!("attr.{key}"), value));
    let meta = node.meta.iter().map(|(key, value)| (format!("meta.{key}"), value));
    let fixed = fixed.into_iter().map(|(key, value)| (key.to_owned(), value));
    fixed.chain(attributes).chain(meta).map(|(key, value)| (key, value.clone())).collect()
}

/// Nomad's rule: letters, `_`, `.` and (not first) digits stay; every other byte becomes `_`.
#[must_use]
pub fn clean_name(name: &str) -> String {
    let keep = |(at, byte): (usize, u8)| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'.' => char::from(byte),
        b'0'..=b'9' if at > 0 => char::from(byte),
        _ => '_',
    };
    name.bytes().enumerate().map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::clean_name;

    #[test]
    fn names_are_cleaned_as_nomad_does() {
        assert_eq!(clean_name("NOMAD_UPSTREAM_ADDR_count-api"), "NOMAD_UPSTREAM_ADDR_count_api");
        assert_eq!(clean_name("1a.b"), "_a.b");
        assert_eq!(clean_name("é"), "__");
    }
}
