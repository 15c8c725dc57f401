//! A job as named fields and objects, with the names of Nomad's plan.

use crate::{
    Check, CheckKind, Driver, Group, Job, Port, PortRef, SIDECAR_DRIVER, Service, Sidecar, Task, Template, Upstream,
    format_go_duration,
};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// A block. Fields that are empty are left out: unset and empty look the same to a reader.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) name: String,
    /// Tells blocks of one name apart, for example a service's name.
    pub(super) key: String,
    pub(super) fields: BTreeMap<String, String>,
    pub(super) objects: Vec<Node>,
}

impl Node {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    fn key(mut self, key: impl ToString) -> Self {
        self.key = key.to_string();
        self
    }

    fn field(mut self, name: &str, value: impl ToString) -> Self {
        let value = value.to_string();
        if !value.is_empty() {
            self.fields.insert(name.to_owned(), value);
        }
        self
    }

    fn option(self, name: &str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.field(name, value),
            None => self,
        }
    }

    /// `Env[KEY]`.
    fn map(mut self, name: &str, values: &BTreeMap<String, Template>) -> Self {
        for (key, value) in values {
            self = self.field(&format!("{name}[{key}]"), value);
        }
        self
    }

    /// `args[0]`.
    fn list(mut self, name: &str, values: &[Template]) -> Self {
        for (index, value) in values.iter().enumerate() {
            self = self.field(&format!("{name}[{index}]"), value);
        }
        self
    }

    fn object(mut self, node: Node) -> Self {
        self.objects.push(node);
        self
    }

    fn all(mut self, nodes: impl IntoIterator<Item = Node>) -> Self {
        self.objects.extend(nodes);
        self
    }

    /// Adds a block only if it says something.
    fn filled(self, node: Node) -> Self {
        if node.fields.is_empty() && node.objects.is_empty() { self } else { self.object(node) }
    }

    /// A free map, flattened: `limits[max_connections]`.
    fn json(mut self, prefix: &str, values: &Map<String, Value>) -> Self {
        for (key, value) in values {
            let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}[{key}]") };
            self = match value {
                Value::Object(inner) => self.json(&name, inner),
                Value::String(text) => self.field(&name, text),
                other => self.field(&name, other),
            };
        }
        self
    }
}

pub(super) fn job(job: &Job) -> Node {
    let mut datacenters = Node::new("Datacenters");
    for (index, name) in job.datacenters.iter().enumerate() {
        datacenters = datacenters.field(&format!("Datacenters[{index}]"), name);
    }
    Node::new("Job")
        .field("ID", &job.id)
        .field("Name", &job.id)
        .field("Namespace", &job.namespace)
        .field("Priority", job.priority)
        .field("Region", &job.region)
        .field("Type", "service")
        .map("Meta", &job.meta)
        .object(datacenters)
}

pub(super) fn group(group: &Group) -> Node {
    let network = Node::new("Network").field("Mode", "bridge").all(group.network.ports.iter().map(port));
    Node::new("Task Group")
        .field("Count", group.count)
        .map("Meta", &group.meta)
        .object(network)
        .all(group.services.iter().map(service))
}

fn port(port: &Port) -> Node {
    let name = if port.static_port.is_some() { "Static Port" } else { "Dynamic Port" };
    Node::new(name).key(&port.label).field("Label", &port.label).option("Value", port.static_port).option("To", port.to)
}

fn port_label(port: &PortRef) -> String {
    match port {
        PortRef::Label(label) => label.clone(),
        PortRef::Number(number) => number.to_string(),
    }
}

fn service(service: &Service) -> Node {
    let node = Node::new("Service")
        .key(format!("{} {:?}", service.name, service.port))
        .field("Name", &service.name)
        .option("PortLabel", service.port.as_ref().map(port_label))
        .filled(Node::new("Tags").list("Tags", &service.tags))
        .filled(Node::new("Meta").map("Meta", &service.meta))
        .all(service.checks.iter().map(check));
    let Some(connect) = &service.connect else { return node };
    let (sidecar, proxy) = (&connect.sidecar, &connect.sidecar.proxy);
    let proxy = Node::new("ConsulProxy")
        .option("LocalServiceAddress", proxy.local_service_address)
        .option("LocalServicePort", proxy.local_service_port)
        .filled(Node::new("Config").json("", &proxy.config))
        .all(proxy.upstreams.iter().map(upstream));
    let sidecar = Node::new("SidecarService")
        .filled(Node::new("Tags").list("Tags", sidecar.tags.as_deref().unwrap_or_default()))
        .filled(Node::new("Meta").map("Meta", &sidecar.meta))
        .filled(proxy);
    node.object(Node::new("ConsulConnect").field("Native", false).object(sidecar))
}

fn upstream(upstream: &Upstream) -> Node {
    Node::new("ConsulUpstreams")
        .key(&upstream.destination_name)
        .field("DestinationName", &upstream.destination_name)
        .field("LocalBindAddress", upstream.local_bind_address)
        .field("LocalBindPort", upstream.local_bind_port)
        .filled(Node::new("Config").json("", &upstream.config))
}

fn check(check: &Check) -> Node {
    let node = Node::new("Check")
        .key(&check.name)
        .field("Name", &check.name)
        .option("PortLabel", check.port.as_ref().map(port_label))
        .field("Interval", format_go_duration(check.interval))
        .field("Timeout", format_go_duration(check.timeout))
        .field("InitialStatus", check.initial_status.as_str())
        .field("SuccessBeforePassing", check.success_before_passing)
        .field("FailuresBeforeCritical", check.failures_before_critical)
        .field("FailuresBeforeWarning", check.failures_before_warning);
    match &check.kind {
        CheckKind::Tcp => node.field("Type", "tcp"),
        CheckKind::Http(http) => {
            let headers = http.headers.iter();
            let headers = headers.fold(Node::new("Header"), |node, (name, values)| node.list(name, values));
            node.field("Type", "http")
                .field("Path", &http.path)
                .field("Method", &http.method)
                .field("Body", &http.body)
                .filled(headers)
        }
    }
}

pub(super) fn task(task: &Task) -> Node {
    let config = match &task.driver {
        Driver::Exec(command) | Driver::RawExec(command) => {
            Node::new("Config").field("command", &command.command).list("args", &command.args)
        }
        Driver::Docker(config) => Node::new("Config").json("", config),
    };
    let restart = Node::new("RestartPolicy")
        .field("Attempts", task.restart.attempts)
        .field("Delay", format_go_duration(task.restart.delay))
        .field("Interval", format_go_duration(task.restart.interval))
        .field("Mode", task.restart.mode.as_str());
    Node::new("Task")
        .field("Driver", task.driver.as_str())
        .option("User", task.user.as_ref())
        .field("KillTimeout", format_go_duration(task.kill_timeout))
        .field("KillSignal", &task.kill_signal)
        .map("Env", &task.env)
        .map("Meta", &task.meta)
        .filled(config)
        .object(Node::new("Resources").field("CPU", task.resources.cpu_mhz).field("MemoryMB", task.resources.memory_mb))
        .object(
            Node::new("LogConfig")
                .field("MaxFiles", task.logs.max_files)
                .field("MaxFileSizeMB", task.logs.max_file_size_mb),
        )
        .object(restart)
}

/// What culvert does in the place of Nomad's injected task.
pub(super) fn sidecar(sidecar: &Sidecar<'_>) -> Node {
    let proxy = &sidecar.connect.sidecar.proxy;
    let upstreams = proxy.upstreams.iter().map(|upstream| {
        let bind = std::net::SocketAddr::new(upstream.local_bind_address, upstream.local_bind_port);
        Node::new("Upstream").key(&upstream.destination_name).field(&upstream.destination_name, bind)
    });
    Node::new("Task")
        .field("Driver", SIDECAR_DRIVER)
        .field("Kind", &sidecar.kind)
        .option("LocalService", sidecar.local_service())
        .filled(Node::new("Config").json("", &proxy.config))
        .all(upstreams)
}
