//! `job`, `group` and `network`.

use super::reader::{At, EMPTY, Reader, Schema, header, label};
use super::service::decode_service;
use super::task::{decode_restart, decode_task};
use crate::hcl::Scope;
use crate::parse::Session;
use crate::{Group, Job, JobType, Network, NetworkMode, Origins, Port, RestartPolicy, Service};
use hcl_edit::structure::Block;

/// Most instances of a group: a node has addresses for fewer than 4096 allocations (172.26.64.0/20).
pub const MAX_COUNT: u32 = 1000;

/// Longest name of a job, group, task or port: names become parts of file names.
pub const MAX_NAME: usize = 120;

/// No task can be called like the directory that stands beside those of the tasks.
const SHARED_DIRECTORY: &str = "alloc";

const JOB: Schema = Schema {
    block: "job",
    attributes: &["datacenters", "namespace", "priority", "region", "type"],
    maps: &["meta"],
    repeated: &["group"],
    refused: &[
        "affinity",
        "all_at_once",
        "constraint",
        "consul",
        "consul_token",
        "dynamic",
        "id",
        "migrate",
        "multiregion",
        "name",
        "node_pool",
        "parameterized",
        "periodic",
        "reschedule",
        "scheduler",
        "spread",
        "task",
        "ui",
        "update",
        "vault",
        "vault_token",
    ],
    ..EMPTY
};

const GROUP: Schema = Schema {
    block: "group",
    attributes: &["count"],
    maps: &["meta"],
    once: &["restart"],
    repeated: &["network", "service", "task"],
    refused: &[
        "affinity",
        "constraint",
        "consul",
        "disconnect",
        "dynamic",
        "ephemeral_disk",
        "max_client_disconnect",
        "migrate",
        "prevent_reschedule_on_lost",
        "reschedule",
        "scaling",
        "shutdown_delay",
        "spread",
        "stop_after_client_disconnect",
        "update",
        "vault",
        "volume",
    ],
};

const NETWORK: Schema = Schema {
    block: "network",
    attributes: &["mode"],
    repeated: &["port"],
    refused: &["cni", "dns", "dynamic", "hostname", "mbits"],
    ..EMPTY
};

const PORT: Schema =
    Schema { block: "port", attributes: &["static", "to"], refused: &["host_network", "ignore_collision"], ..EMPTY };

/// Reads the `job` block.
pub(crate) fn decode_job(session: &Session, scope: Scope<'_>, block: &Block) -> Option<Job> {
    let id = label(session, block)?;
    let reader = Reader::open(session, scope, &JOB, block, "job".to_owned());
    check_name(&reader, "Job ID", &id);
    if let Some(kind) = reader.literal("type")
        && kind.value != "service"
    {
        reader.refuse_word("job type", &kind, &["batch", "system", "sysbatch"], "\"service\"");
    }
    let namespace = reader.literal("namespace");
    if let Some(namespace) = namespace.filter(|namespace| namespace.value != "default") {
        let message = format!("namespace {:?} is not supported by culvert yet", namespace.value);
        reader.report(namespace.span, message, Some("there is one namespace: \"default\"".to_owned()));
    }
    let mut job = Job {
        id: id.value,
        namespace: "default".to_owned(),
        region: reader.literal("region").map_or_else(|| "global".to_owned(), |region| region.value),
        datacenters: datacenters(&reader),
        kind: JobType::Service,
        priority: reader.number("priority", 1..=100).and_then(|at| u8::try_from(at.value).ok()).unwrap_or(50),
        meta: reader.template_map("meta"),
        groups: Vec::new(),
        origins: Origins::default(),
    };
    for (index, (name, block)) in reader.labelled("group").into_iter().enumerate() {
        let inner = Reader::open(session, scope, &GROUP, block, format!("group.{index}"));
        check_name(&inner, "Task group name", &name);
        if job.groups.iter().any(|group| group.name == name.value) {
            reader.report(name.span.clone(), format!("job has two groups named {:?}", name.value), None);
        }
        let group = decode_group(&inner, &job, name.value);
        job.groups.push(group);
    }
    if job.groups.is_empty() {
        reader.report(reader.span.clone(), "Missing job task groups", Some("add group \"name\" { … }".to_owned()));
    }
    Some(job)
}

fn datacenters(reader: &Reader<'_>) -> Vec<String> {
    let Some(given) = reader.templates("datacenters") else { return vec!["*".to_owned()] };
    let mut names = Vec::new();
    for name in &given.value {
        match name.as_literal() {
            Some("") | None => {
                reader.report(given.span.clone(), format!("{name} is not the name of a datacenter"), None);
            }
            Some(name) => names.push(name.to_owned()),
        }
    }
    if given.value.is_empty() {
        reader.report(given.span, "Missing job datacenters", Some("[\"*\"] means any".to_owned()));
    }
    names
}

fn decode_group(reader: &Reader<'_>, job: &Job, name: String) -> Group {
    let count = reader.number("count", 0..=i64::from(MAX_COUNT));
    let services: Vec<Service> = reader
        .blocks("service")
        .into_iter()
        .enumerate()
        .filter_map(|(index, block)| decode_service(reader, index, block, job, &name))
        .collect();
    let network = decode_networks(reader, &name, services.iter().any(|service| service.connect.is_some()));
    let restart = RestartPolicy::default();
    let restart = reader.block("restart").map_or(restart, |block| decode_restart(reader, block, restart));
    let mut tasks = Vec::new();
    for (index, (task_name, block)) in reader.labelled("task").into_iter().enumerate() {
        check_name(reader, "Task name", &task_name);
        if task_name.value == SHARED_DIRECTORY {
            let hint = "it is the directory that the tasks of an allocation share; choose another name".to_owned();
            reader.report(task_name.span.clone(), format!("Task name cannot be {SHARED_DIRECTORY:?}"), Some(hint));
        }
        let duplicate = |task: &crate::Task| task.name == task_name.value;
        if tasks.iter().any(duplicate) {
            let message = format!("group {name:?} has two tasks named {:?}", task_name.value);
            reader.report(task_name.span.clone(), message, None);
        }
        if let Some(task) = decode_task(reader, index, block, task_name.value, restart) {
            tasks.push(task);
        }
    }
    if reader.labelled("task").is_empty() {
        let message = format!("Missing tasks for task group {name:?}");
        reader.report(reader.span.clone(), message, Some("add task \"name\" { … }".to_owned()));
    }
    Group {
        count: count.and_then(|at| u32::try_from(at.value).ok()).unwrap_or(1),
        network,
        services,
        tasks,
        meta: reader.template_map("meta"),
        name,
    }
}

/// The only network of a group; Nomad's words where a connect service is the reason.
fn decode_networks(group: &Reader<'_>, name: &str, connect: bool) -> Network {
    let blocks = group.blocks("network");
    let hint = || Some("write network { mode = \"bridge\" }".to_owned());
    let mut network = Network { mode: NetworkMode::Bridge, ports: Vec::new() };
    if blocks.len() != 1 {
        let (span, count) = (blocks.get(1).map_or_else(|| group.span.clone(), |block| header(block)), blocks.len());
        let message = if connect {
            format!(
                "connect sidecar: must have exactly one network for Consul Connect: group {name:?} has {count} networks"
            )
        } else if count > 1 {
            format!("group {name:?} has {count} networks: only one is allowed")
        } else {
            format!("group {name:?} has no network: the host's own network is not supported by culvert yet")
        };
        group.report(span, message, hint());
    }
    let Some(block) = blocks.first() else { return network };
    let reader = group.inner(&NETWORK, block, "network");
    let mode = reader.literal("mode");
    if mode.as_ref().is_none_or(|mode| mode.value != "bridge") {
        let span = mode.as_ref().map_or_else(|| reader.span.clone(), |mode| mode.span.clone());
        // Unset is Nomad's "host".
        let word = mode.map_or_else(|| "host".to_owned(), |mode| mode.value);
        let message = match word.as_str() {
            cni if cni.starts_with("cni/") => format!("network mode {cni:?} is not supported by culvert yet"),
            word if connect => format!(
                "connect sidecar: invalid network mode for Consul Connect: group {name:?} uses network mode {word:?}; must be \"bridge\" or \"cni/*\""
            ),
            "host" | "none" => format!("network mode {word:?} is not supported by culvert yet"),
            word => format!("invalid network mode: {word:?}"),
        };
        reader.report(span, message, hint());
    }
    for (index, (label, block)) in reader.labelled("port").into_iter().enumerate() {
        check_name(&reader, "Port label", &label);
        if network.port(&label.value).is_some() {
            reader.report(label.span.clone(), format!("Port label {} already in use by {name}", label.value), None);
        }
        let port = reader.inner(&PORT, block, &format!("port.{index}"));
        network.ports.push(decode_port(&port, label.value));
    }
    network
}

fn decode_port(reader: &Reader<'_>, label: String) -> Port {
    let any = i64::MIN..=i64::MAX;
    let mut static_port = None;
    if let Some(At { value, span }) = reader.number("static", any.clone()) {
        static_port = u16::try_from(value).ok().filter(|port| *port != 0);
        if value > i64::from(u16::MAX) {
            reader.report(span, format!("Port {label} ({value}) cannot be greater than 65535"), None);
        } else if static_port.is_none() {
            reader.report(span, format!("Port {label} ({value}) must be greater than 0"), None);
        }
    }
    let mut to = None;
    if let Some(At { value, span }) = reader.number("to", any) {
        // 0 and -1 are Nomad's words for "the same as the host's port".
        to = u16::try_from(value).ok().filter(|port| *port != 0);
        if value > i64::from(u16::MAX) {
            let message = format!("Port {label:?} cannot be mapped to a port ({value}) greater than 65535");
            reader.report(span, message, None);
        } else if value < -1 {
            reader.report(span, format!("Port {label:?} cannot be mapped to negative value {value}"), None);
        }
    }
    Port { label, static_port, to }
}

/// Names become parts of file, cgroup and variable names: letters, digits, `-`, `_` and inner `.`.
fn check_name(reader: &Reader<'_>, what: &str, name: &At<String>) {
    let text = name.value.as_str();
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let message = if text.is_empty() {
        format!("{what} is empty")
    } else if text.len() > MAX_NAME {
        format!("{what} is longer than {MAX_NAME} bytes")
    } else if text.contains('/') {
        format!("{what} cannot include slashes")
    } else if text.contains(' ') {
        format!("{what} contains a space")
    } else if !text.bytes().all(fine) || text.starts_with(['.', '-']) {
        format!("{what} {text:?} is not usable as a name")
    } else {
        return;
    };
    let hint = "use letters, digits, \"-\", \"_\" and \".\", starting with a letter or digit";
    reader.report(name.span.clone(), message, Some(hint.to_owned()));
}
