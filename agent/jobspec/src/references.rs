//! `${…}` that no allocation of the job would have a value for: refused here, so that no task is given the text itself.
//!
//! Which names there are is asked of [`Environment`], which fills them. `${meta.…}` and `${env["X"]}` are the user's
//! own, and a name without `NOMAD_` may be the program's (`${HOME}`): these stay as they are written.

use crate::decode::closest;
use crate::hcl::Problem;
use crate::parse::Session;
use crate::template::{Target, target};
use crate::{CheckKind, Environment, Group, Job, Service, Task, Template};
use std::collections::BTreeMap;

/// How the variables of ports, upstreams and `meta` begin.
const FAMILIES: &[(&str, &str)] = &[
    ("NOMAD_ALLOC_ADDR_", "port"),
    ("NOMAD_ALLOC_INTERFACE_", "port"),
    ("NOMAD_ALLOC_IP_", "port"),
    ("NOMAD_ALLOC_PORT_", "port"),
    ("NOMAD_HOST_ADDR_", "port"),
    ("NOMAD_HOST_IP_", "port"),
    ("NOMAD_HOST_PORT_", "port"),
    ("NOMAD_ADDR_", "port"),
    ("NOMAD_IP_", "port"),
    ("NOMAD_PORT_", "port"),
    ("NOMAD_META_", "meta"),
    ("NOMAD_UPSTREAM_ADDR_", "upstream"),
    ("NOMAD_UPSTREAM_IP_", "upstream"),
    ("NOMAD_UPSTREAM_PORT_", "upstream"),
];

/// Reports what `job` refers to and nothing will replace.
pub(crate) fn check(session: &Session, job: &Job) {
    let job_meta = Environment::names_of_meta(&job.meta);
    let mut job_meta_is_fine = true;
    for (index, group) in job.groups.iter().enumerate() {
        let (common, tasks) = (Environment::names_of_group(job, group), Environment::names_of_tasks(group));
        let (checker, path) = (Checker { session, group, tasks: &tasks }, format!("group.{index}"));
        let group_meta = Environment::names_of_meta(&group.meta);
        // The job's own is told of once, not by each group.
        job_meta_is_fine = job_meta_is_fine && checker.map(&[&common, &tasks], "job.meta", &job.meta);
        checker.map(&[&common, &tasks], &format!("{path}.meta"), &group.meta);
        for (index, service) in group.services.iter().enumerate() {
            checker.service(&[&common, &job_meta, &group_meta], &format!("{path}.service.{index}"), service);
        }
        for (index, task) in group.tasks.iter().enumerate() {
            let path = format!("{path}.task.{index}");
            checker.map(&[&common, &tasks], &format!("{path}.meta"), &task.meta);
            let own = Environment::names_of_task(task);
            checker.task(&[&common, &tasks, &job_meta, &group_meta, &own], &path, task);
        }
    }
}

struct Checker<'a> {
    session: &'a Session,
    group: &'a Group,
    /// What tasks have and services do not.
    tasks: &'a Environment,
}

/// The names that a text may refer to, in layers: each is made once, however many texts there are.
type Known<'a> = [&'a Environment];

impl Checker<'_> {
    fn service(&self, known: &Known<'_>, path: &str, service: &Service) {
        self.text(known, &format!("{path}.name"), &service.name);
        self.texts(known, &format!("{path}.tags"), &service.tags);
        self.map(known, &format!("{path}.meta"), &service.meta);
        for (index, check) in service.checks.iter().enumerate() {
            let path = format!("{path}.check.{index}");
            let name = format!("{path}.name");
            // Left out, it holds the service's.
            if self.session.is_placed(&name) {
                self.text(known, &name, &check.name);
            }
            let CheckKind::Http(http) = &check.kind else { continue };
            self.text(known, &format!("{path}.path"), &http.path);
            self.text(known, &format!("{path}.body"), &http.body);
            for (key, values) in &http.headers {
                self.texts(known, &format!("{path}.header.{key}"), values);
            }
        }
        if let Some(connect) = &service.connect {
            let path = format!("{path}.connect.sidecar_service");
            self.texts(known, &format!("{path}.tags"), connect.sidecar.tags.as_deref().unwrap_or_default());
            self.map(known, &format!("{path}.meta"), &connect.sidecar.meta);
        }
    }

    fn task(&self, known: &Known<'_>, path: &str, task: &Task) {
        self.map(known, &format!("{path}.env"), &task.env);
        if let Some(command) = task.driver.command() {
            self.text(known, &format!("{path}.config.command"), &command.command);
            self.texts(known, &format!("{path}.config.args"), &command.args);
        }
    }

    fn texts(&self, known: &Known<'_>, path: &str, texts: &[Template]) {
        for text in texts {
            self.text(known, path, text);
        }
    }

    /// Checks each value of `map`; false when one is refused.
    fn map(&self, known: &Known<'_>, path: &str, map: &BTreeMap<String, Template>) -> bool {
        let refused = map.iter().filter(|(key, text)| !self.text(known, &format!("{path}.{key}"), text));
        refused.count() == 0
    }

    /// Checks `text`, which stands at `path`; false when it is refused.
    fn text(&self, known: &Known<'_>, path: &str, text: &Template) -> bool {
        let missing = |name: &&str| is_promised(name) && !known.iter().any(|names| names.lookup(name).is_some());
        let refused: Vec<&str> = text.references().filter(missing).filter(|name| !self.comes_later(name)).collect();
        refused.iter().for_each(|name| self.report(known, path, name));
        refused.is_empty()
    }

    /// Whether it may be the port of a sidecar whose service has its name from the allocation.
    fn comes_later(&self, name: &str) -> bool {
        let late = |service: &Service| service.connect.is_some() && service.name.as_literal().is_none();
        let of_sidecar = |label: &str| label.starts_with("connect-proxy-") || label.starts_with("connect_proxy_");
        family(name).is_some_and(|(kind, label)| kind == "port" && of_sidecar(label))
            && self.group.services.iter().any(late)
    }

    fn report(&self, known: &Known<'_>, path: &str, name: &str) {
        let reference = format!("${{{name}}}");
        let own_meta = path.contains("meta.") && !path.contains(".service.");
        let message = match family(name) {
            Some(("meta", _)) if own_meta => format!("{reference} in \"meta\": one key cannot refer to another"),
            Some((kind, rest)) => {
                format!("{reference} refers to {kind} {rest:?}, which group {:?} does not have", self.group.name)
            }
            None if self.tasks.lookup(name).is_some() => format!("{reference} has a value in tasks only"),
            None => format!("{reference} is not supported by culvert yet"),
        };
        let mut problem = Problem::new(self.session.span_within(path, &reference), message);
        if !self.session.is_full() {
            problem.hint = hint(name, known.iter().flat_map(|names| names.names()).collect());
        }
        self.session.report(problem);
    }
}

/// Whether it is for culvert to know `name`.
fn is_promised(name: &str) -> bool {
    match target(name) {
        Target::Variable(variable) => variable == name && name.starts_with("NOMAD_"),
        Target::Node(name) => !name.starts_with("meta."),
    }
}

/// `port` and `http` of `NOMAD_PORT_http`.
fn family(name: &str) -> Option<(&'static str, &str)> {
    FAMILIES.iter().find_map(|(prefix, kind)| Some((*kind, name.strip_prefix(prefix)?)))
}

/// The name that was meant, else all of the same root (`node.`, `attr.`).
fn hint(name: &str, known: Vec<&str>) -> Option<String> {
    if let Some(close) = closest(name, known.iter().copied()) {
        return Some(format!("did you mean ${{{close}}}?"));
    }
    let (root, _) = name.split_once('.')?;
    let same_root = |known: &&str| known.split_once('.').is_some_and(|(other, _)| other == root);
    let names: Vec<&str> = known.into_iter().filter(same_root).collect();
    Some(format!("culvert knows {}", names.join(", ")))
}
