//! `task`, its `config`, `resources`, `logs` and `restart`.

use super::connect::connect_of;
use super::reader::{At, EMPTY, Reader, Schema, header};
use crate::hcl::Scope;
use crate::{Command, Driver, Logs, Resources, RestartMode, RestartPolicy, Task};
use hcl_edit::Span as _;
use hcl_edit::structure::{Block, Body, Structure};
use serde_json::{Map, Value};
use std::time::Duration;

/// Longest `kill_timeout`: a stop must end.
pub const MAX_KILL_TIMEOUT: Duration = Duration::from_secs(3600);

/// Shortest `interval` of a restart policy (Nomad's).
const MIN_RESTART_INTERVAL: Duration = Duration::from_secs(5);

/// Longest `interval` and `delay` of a restart policy.
const MAX_RESTART_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);

const TASK: Schema = Schema {
    block: "task",
    attributes: &["driver", "kill_signal", "kill_timeout", "user"],
    maps: &["env", "meta"],
    once: &["config", "logs", "resources", "restart"],
    repeated: &["service"],
    refused: &[
        "action",
        "affinity",
        "artifact",
        "constraint",
        "consul",
        "csi_plugin",
        "dispatch_payload",
        "dynamic",
        "identity",
        "kind",
        "leader",
        "lifecycle",
        "scaling",
        "schedule",
        "secret",
        "shutdown_delay",
        "template",
        "vault",
        "volume_mount",
    ],
};

const COMMAND: Schema = Schema {
    block: "config",
    attributes: &["args", "command"],
    refused: &[
        "cap_add",
        "cap_drop",
        "cgroup_v1_override",
        "cgroup_v2_override",
        "denied_envvars",
        "dynamic",
        "ipc_mode",
        "no_cgroups",
        "oom_score_adj",
        "pid_mode",
        "work_dir",
    ],
    ..EMPTY
};

const RESOURCES: Schema = Schema {
    block: "resources",
    attributes: &["cpu", "memory"],
    refused: &["cores", "custom", "device", "dynamic", "iops", "memory_max", "network", "numa", "secrets"],
    ..EMPTY
};

const LOGS: Schema =
    Schema { block: "logs", attributes: &["max_file_size", "max_files"], refused: &["disabled", "enabled"], ..EMPTY };

const RESTART: Schema = Schema {
    block: "restart",
    attributes: &["attempts", "delay", "interval", "mode"],
    refused: &["render_templates"],
    ..EMPTY
};

/// Drivers that Nomad has or had, and its plugins'.
const OTHER_DRIVERS: &[&str] = &[
    "containerd-driver",
    "exec2",
    "firecracker-task-driver",
    "java",
    "lxc",
    "mock_driver",
    "podman",
    "qemu",
    "rkt",
    "virt",
];

/// Signals of Linux that a task may be asked to stop with (signal(7)).
const SIGNALS: &[&str] = &[
    "SIGABRT",
    "SIGALRM",
    "SIGCONT",
    "SIGHUP",
    "SIGINT",
    "SIGIO",
    "SIGKILL",
    "SIGPIPE",
    "SIGPROF",
    "SIGQUIT",
    "SIGSTOP",
    "SIGTERM",
    "SIGTRAP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGUSR1",
    "SIGUSR2",
    "SIGVTALRM",
    "SIGWINCH",
    "SIGXCPU",
    "SIGXFSZ",
];

/// Reads task number `index` of `group`; `restart` is the group's policy.
pub(super) fn decode_task(
    group: &Reader<'_>,
    index: usize,
    block: &Block,
    name: String,
    restart: RestartPolicy,
) -> Option<Task> {
    let reader = group.inner(&TASK, block, &format!("task.{index}"));
    for service in reader.blocks("service") {
        refuse_service(&reader, service);
    }
    let task = Task {
        user: reader.literal("user").map(|user| user.value).filter(|user| !user.is_empty()),
        env: env(&reader),
        meta: reader.template_map("meta"),
        resources: reader.block("resources").map(|block| decode_resources(&reader, block)).unwrap_or_default(),
        logs: reader.block("logs").map(|block| decode_logs(&reader, block)).unwrap_or_default(),
        restart: reader.block("restart").map_or(restart, |block| decode_restart(&reader, block, restart)),
        kill_timeout: kill_timeout(&reader),
        kill_signal: kill_signal(&reader),
        driver: decode_driver(&reader)?,
        name,
    };
    Some(task)
}

/// Services of tasks: Nomad's words when it asks for the mesh, which Nomad refuses too.
fn refuse_service(reader: &Reader<'_>, block: &Block) {
    let hint = Some("move the service from the task to its group".to_owned());
    if let Some(span) = connect_of(block) {
        let name = block.body.get_attribute("name").and_then(|name| name.value.as_str()).unwrap_or_default();
        let message =
            format!("service {name:?} cannot have \"connect\" block, only services defined in a \"group\" block can");
        reader.report(span, message, hint);
    } else {
        reader.report(header(block), "\"service\" in \"task\" is not supported by culvert yet", hint);
    }
}

fn env(reader: &Reader<'_>) -> std::collections::BTreeMap<String, crate::Template> {
    let env = reader.template_map("env");
    for name in env.keys().filter(|name| name.is_empty() || name.contains(['=', '\0'])) {
        let span = reader.session.span(&format!("{}.env.{name}", reader.path));
        reader.report(span, format!("{name:?} cannot be the name of an environment variable"), None);
    }
    env
}

fn decode_driver(reader: &Reader<'_>) -> Option<Driver> {
    let Some(driver) = reader.literal("driver") else {
        if !reader.has("driver") {
            let hint = "add driver = \"exec\"".to_owned();
            reader.report(reader.span.clone(), "Missing task driver", Some(hint));
        }
        return None;
    };
    let config = reader.block("config");
    match driver.value.as_str() {
        "exec" => decode_command(reader, config).map(Driver::Exec),
        "raw_exec" => decode_command(reader, config).map(Driver::RawExec),
        "docker" => {
            Some(Driver::Docker(config.map(|block| free(reader, reader.scope, &block.body)).unwrap_or_default()))
        }
        _ => {
            reader.refuse_word("driver", &driver, OTHER_DRIVERS, "\"exec\" and \"raw_exec\"");
            None
        }
    }
}

fn decode_command(task: &Reader<'_>, config: Option<&Block>) -> Option<Command> {
    let Some(block) = config else {
        let hint = "add config { command = … }".to_owned();
        task.report(task.span.clone(), "\"task\" requires \"config\" with a \"command\"", Some(hint));
        return None;
    };
    let reader = task.inner(&COMMAND, block, "config");
    if !reader.has("command") {
        reader.missing("command");
    }
    let args = reader.templates("args").map(|args| args.value).unwrap_or_default();
    let command = reader.template("command")?;
    let texts = std::iter::once(&command.value).chain(&args);
    if texts.into_iter().any(|text| text.to_string().contains('\0')) {
        reader.report(command.span, "a command and its arguments cannot hold a zero byte", None);
        return None;
    }
    if command.value.is_empty() {
        reader.report(command.span, "\"command\" is empty", None);
        return None;
    }
    Some(Command { command: command.value, args })
}

/// `config` of a driver that is not run: kept as written, for `plan` and `check_runnable`.
fn free(reader: &Reader<'_>, scope: Scope<'_>, body: &Body) -> Map<String, Value> {
    let mut map = Map::new();
    for structure in body.iter() {
        match structure {
            Structure::Attribute(attribute) => match scope.evaluate(&attribute.value) {
                Ok(value) => {
                    map.insert(attribute.key.to_string(), as_written(&value));
                }
                Err(problem) => reader.session.report(problem),
            },
            Structure::Block(block) => {
                let inner = Value::Object(free(reader, scope, &block.body));
                match map.entry(block.ident.to_string()).or_insert_with(|| Value::Array(Vec::new())) {
                    Value::Array(items) => items.push(inner),
                    _ => {
                        let message = format!("{:?} is an argument and a block", block.ident.as_str());
                        reader.report(block.ident.span(), message, None);
                    }
                }
            }
        }
    }
    map
}

/// JSON with `${…}` as the job file writes it.
fn as_written(value: &crate::hcl::Value) -> Value {
    match value {
        crate::hcl::Value::Text(text) => Value::String(text.to_string()),
        crate::hcl::Value::List(items) => Value::Array(items.iter().map(as_written).collect()),
        crate::hcl::Value::Map(items) => {
            Value::Object(items.iter().map(|(key, value)| (key.clone(), as_written(value))).collect())
        }
        other => other.to_json().unwrap_or(Value::Null),
    }
}

fn decode_resources(task: &Reader<'_>, block: &Block) -> Resources {
    let reader = task.inner(&RESOURCES, block, "resources");
    let read = |field: &str, least: u32, name: &str, default: u32| {
        let Some(At { value, span }) = reader.number(field, i64::MIN..=i64::from(i32::MAX)) else { return default };
        match u32::try_from(value) {
            Ok(value) if value >= least => value,
            _ => {
                reader.report(span, format!("minimum {name} value is {least}; got {value}"), None);
                default
            }
        }
    };
    let Resources { cpu_mhz, memory_mb } = Resources::default();
    Resources { cpu_mhz: read("cpu", 1, "CPU", cpu_mhz), memory_mb: read("memory", 10, "MemoryMB", memory_mb) }
}

fn decode_logs(task: &Reader<'_>, block: &Block) -> Logs {
    let reader = task.inner(&LOGS, block, "logs");
    let mut logs = Logs::default();
    if let Some(At { value, span }) = reader.number("max_files", i64::MIN..=1000) {
        match u32::try_from(value) {
            Ok(value) if value > 0 => logs.max_files = value,
            _ => reader.report(span, format!("minimum number of files is 1; got {value}"), None),
        }
    }
    if let Some(At { value, span }) = reader.number("max_file_size", i64::MIN..=1024 * 1024) {
        match u32::try_from(value) {
            Ok(value) if value > 0 => logs.max_file_size_mb = value,
            _ => reader.report(span, format!("minimum file size is 1MB; got {value}"), None),
        }
    }
    logs
}

/// Reads a `restart` block of a group or task; what it leaves out is as in `base`.
pub(super) fn decode_restart(parent: &Reader<'_>, block: &Block, base: RestartPolicy) -> RestartPolicy {
    let reader = parent.inner(&RESTART, block, "restart");
    let mut policy = base;
    if let Some(attempts) = reader.number("attempts", 0..=1_000_000).and_then(|at| u32::try_from(at.value).ok()) {
        policy.attempts = attempts;
    }
    if let Some(mode) = reader.literal("mode") {
        match mode.value.as_str() {
            "fail" => policy.mode = RestartMode::Fail,
            "delay" => policy.mode = RestartMode::Delay,
            other => {
                let hint = "\"fail\" or \"delay\"".to_owned();
                reader.report(mode.span, format!("Unsupported restart mode: {other:?}"), Some(hint));
            }
        }
    }
    for field in ["interval", "delay"] {
        let Some(At { value, span }) = reader.duration(field) else { continue };
        let shown = crate::format_go_duration(value);
        if value > MAX_RESTART_INTERVAL {
            let most = crate::format_go_duration(MAX_RESTART_INTERVAL);
            reader.report(span, format!("{field} can not be more than {most} (got {shown})"), None);
        } else if field == "delay" {
            policy.delay = value;
        } else if value < MIN_RESTART_INTERVAL {
            reader.report(span, format!("Interval can not be less than 5s (got {shown})"), None);
        } else {
            policy.interval = value;
        }
    }
    if policy.mode == RestartMode::Delay && policy.attempts == 0 {
        let hint = Some("mode = \"fail\" never restarts".to_owned());
        reader.report(reader.span.clone(), "Restart policy \"delay\" with 0 attempts is ambiguous", hint);
    } else if policy.delay.saturating_mul(policy.attempts) > policy.interval {
        let (attempts, interval) = (policy.attempts, crate::format_go_duration(policy.interval));
        let delay = crate::format_go_duration(policy.delay);
        let message = format!(
            "Nomad can't restart the TaskGroup {attempts} times in an interval of {interval} with a delay of {delay}"
        );
        reader.report(reader.span.clone(), message, Some("make interval longer or delay shorter".to_owned()));
    }
    policy
}

fn kill_timeout(reader: &Reader<'_>) -> Duration {
    let default = Duration::from_secs(5);
    let Some(At { value, span }) = reader.duration("kill_timeout") else { return default };
    if value > MAX_KILL_TIMEOUT {
        let (most, shown) = (crate::format_go_duration(MAX_KILL_TIMEOUT), crate::format_go_duration(value));
        reader.report(span, format!("kill_timeout can be at most {most}; got {shown}"), None);
    }
    value.min(MAX_KILL_TIMEOUT)
}

fn kill_signal(reader: &Reader<'_>) -> String {
    let default = || "SIGINT".to_owned();
    let Some(At { value, span }) = reader.literal("kill_signal") else { return default() };
    let name = value.to_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    if SIGNALS.contains(&name.as_str()) {
        return name;
    }
    let hint = super::closest(&name, SIGNALS.iter().copied()).map(|close| format!("did you mean {close:?}?"));
    reader.report(span, format!("unknown signal: {value:?}"), hint);
    default()
}
