//! `connect`, `sidecar_service`, `proxy` and `upstreams`.

use super::reader::{At, EMPTY, Reader, Schema, header};
use crate::hcl::Value;
use crate::{Connect, Proxy, SidecarService, Upstream};
use culvert_types::ServiceName;
use hcl_edit::structure::Block;
use serde_json::Map;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

const CONNECT: Schema = Schema {
    block: "connect",
    once: &["sidecar_service"],
    refused: &["dynamic", "gateway", "native", "sidecar_task"],
    ..EMPTY
};

const SIDECAR_SERVICE: Schema = Schema {
    block: "sidecar_service",
    attributes: &["tags"],
    maps: &["meta"],
    once: &["proxy"],
    refused: &["disable_default_tcp_check", "dynamic", "port"],
    ..EMPTY
};

const PROXY: Schema = Schema {
    block: "proxy",
    attributes: &["local_service_address", "local_service_port"],
    maps: &["config"],
    repeated: &["upstreams"],
    refused: &["dynamic", "expose", "transparent_proxy"],
    ..EMPTY
};

const UPSTREAMS: Schema = Schema {
    block: "upstreams",
    attributes: &["destination_name", "destination_type", "local_bind_address", "local_bind_port"],
    maps: &["config"],
    refused: &[
        "datacenter",
        "destination_namespace",
        "destination_partition",
        "destination_peer",
        "dynamic",
        "local_bind_socket_mode",
        "local_bind_socket_path",
        "mesh_gateway",
    ],
    ..EMPTY
};

/// Kind of value that a key of a free `config` takes.
#[derive(Clone, Copy)]
enum Setting {
    /// A whole number of at least 1.
    Count,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A map with these keys.
    Group(&'static [(&'static str, Setting)]),
    /// Known to Consul, not honoured here.
    Refused,
}

/// `proxy { config {} }`. `encryption` is culvert's own.
const PROXY_CONFIG: &[(&str, Setting)] = &[
    ("encryption", Setting::Word(&["always", "between-nodes"])),
    ("protocol", Setting::Word(&["tcp"])),
    ("local_connect_timeout_ms", Setting::Count),
    ("max_inbound_connections", Setting::Count),
    ("balance_inbound_connections", Setting::Refused),
    ("bind_address", Setting::Refused),
    ("bind_port", Setting::Refused),
    ("local_idle_timeout_ms", Setting::Refused),
    ("local_request_timeout_ms", Setting::Refused),
];

/// `upstreams { config {} }`.
const UPSTREAM_CONFIG: &[(&str, Setting)] = &[
    ("connect_timeout_ms", Setting::Count),
    (
        "limits",
        Setting::Group(&[
            ("max_connections", Setting::Count),
            ("max_pending_requests", Setting::Refused),
            ("max_concurrent_requests", Setting::Refused),
        ]),
    ),
    ("protocol", Setting::Word(&["tcp"])),
    ("balance_outbound_connections", Setting::Refused),
    ("passive_health_check", Setting::Refused),
];

/// Reads the `connect` block of a service.
pub(super) fn decode_connect(service: &Reader<'_>, block: &Block) -> Option<Connect> {
    let reader = service.inner(&CONNECT, block, "connect");
    let Some(sidecar) = reader.block("sidecar_service") else {
        let asked = ["native", "gateway", "sidecar_task"];
        if !block.body.iter().any(|part| {
            part.as_attribute().is_some_and(|part| asked.contains(&part.key.as_str()))
                || part.as_block().is_some_and(|part| asked.contains(&part.ident.as_str()))
        }) {
            let message = "Consul Connect must be exclusively native, make use of a sidecar, or represent a Gateway";
            reader.report(reader.span.clone(), message, Some("add sidecar_service {}".to_owned()));
        }
        return None;
    };
    let reader = reader.inner(&SIDECAR_SERVICE, sidecar, "sidecar_service");
    let proxy = reader.block("proxy").map(|block| decode_proxy(&reader, block)).unwrap_or_default();
    Some(Connect {
        sidecar: SidecarService {
            tags: reader.templates("tags").map(|tags| tags.value),
            meta: reader.template_map("meta"),
            proxy,
        },
    })
}

fn decode_proxy(sidecar: &Reader<'_>, block: &Block) -> Proxy {
    let reader = sidecar.inner(&PROXY, block, "proxy");
    let upstreams = reader.blocks("upstreams").into_iter().enumerate();
    Proxy {
        local_service_address: address(&reader, "local_service_address"),
        local_service_port: port(&reader, "local_service_port").map(|at| at.value),
        upstreams: upstreams.filter_map(|(index, block)| decode_upstream(&reader, index, block)).collect(),
        config: settings(&reader, PROXY_CONFIG),
    }
}

fn decode_upstream(proxy: &Reader<'_>, index: usize, block: &Block) -> Option<Upstream> {
    let reader = proxy.inner(&UPSTREAMS, block, &format!("upstreams.{index}"));
    if let Some(kind) = reader.literal("destination_type")
        && !matches!(kind.value.as_str(), "" | "service")
    {
        reader.refuse_word("destination_type", &kind, &["prepared_query"], "\"service\"");
    }
    for required in ["destination_name", "local_bind_port"].into_iter().filter(|field| !reader.has(field)) {
        reader.missing(required);
    }
    let destination = reader.literal("destination_name");
    if let Some(name) = &destination
        && let Err(error) = ServiceName::new(&name.value)
    {
        let message = format!("{:?} is not the name of a service", name.value);
        reader.report(name.span.clone(), message, Some(error.to_string()));
    }
    let bind = address(&reader, "local_bind_address").unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    if !bind.is_loopback() {
        // Anyone who reaches the workload could otherwise call with its identity.
        let span = reader.expression("local_bind_address").and_then(hcl_edit::Span::span);
        let hint = "127.0.0.1, another address of 127.0.0.0/8, or ::1".to_owned();
        reader.report(span, format!("local_bind_address {bind} is not a loopback address"), Some(hint));
    }
    let (local_bind_port, config) = (port(&reader, "local_bind_port"), settings(&reader, UPSTREAM_CONFIG));
    Some(Upstream {
        destination_name: destination?.value,
        local_bind_address: bind,
        local_bind_port: local_bind_port?.value,
        config,
    })
}

fn address(reader: &Reader<'_>, name: &str) -> Option<IpAddr> {
    let At { value: text, span } = reader.literal(name)?;
    match text.parse() {
        Ok(address) => Some(address),
        Err(_) => {
            reader.report(span, format!("\"{name}\" is not an IP address: {text:?}"), None);
            None
        }
    }
}

fn port(reader: &Reader<'_>, name: &str) -> Option<At<u16>> {
    let At { value, span } = reader.number(name, 1..=i64::from(u16::MAX))?;
    u16::try_from(value).ok().map(|value| At { value, span })
}

/// A free `config`, key by key against what culvert honours.
fn settings(reader: &Reader<'_>, known: &[(&str, Setting)]) -> Map<String, serde_json::Value> {
    let mut config = Map::new();
    for (key, value, span) in reader.entries("config") {
        if let Some(value) = setting(reader, known, &key, &value, span) {
            config.insert(key, value);
        }
    }
    config
}

fn setting(
    reader: &Reader<'_>,
    known: &[(&str, Setting)],
    key: &str,
    value: &Value,
    span: Option<Range<usize>>,
) -> Option<serde_json::Value> {
    let kind = known.iter().find(|(name, _)| *name == key).map(|(_, kind)| *kind);
    let refused = |hint: Option<String>| {
        reader.report(span.clone(), format!("config {key:?} is not supported by culvert yet"), hint);
    };
    let wrong = |wanted: String| {
        reader.report(span.clone(), format!("config {key:?} must be {wanted}, this is {}", value.kind()), None);
    };
    match kind {
        None if key.starts_with("envoy_") => refused(Some("there is no Envoy behind this sidecar".to_owned())),
        None => {
            let names = || known.iter().map(|(name, _)| *name);
            let hint = super::closest(key, names()).map(|close| format!("did you mean {close:?}?"));
            reader.report(span, format!("config has no setting {key:?}"), hint);
        }
        Some(Setting::Refused) => refused(None),
        Some(Setting::Count) => match crate::hcl::to_integer(value) {
            Some(number) if (1..=i64::from(u32::MAX)).contains(&number) => return Some(number.into()),
            Some(number) => {
                let message = format!("config {key:?} must be between 1 and {}; got {number}", u32::MAX);
                reader.report(span, message, None);
            }
            None => wrong("a whole number".to_owned()),
        },
        Some(Setting::Word(words)) => {
            let text = crate::hcl::to_text(value);
            match text.as_ref().and_then(crate::Template::as_literal) {
                Some(word) if words.contains(&word) => return Some(word.into()),
                Some(word) => {
                    let message = format!("config {key:?} cannot be {word:?}");
                    reader.report(span, message, Some(format!("culvert supports {}", words.join(", "))));
                }
                None => wrong("a string".to_owned()),
            }
        }
        Some(Setting::Group(inner)) => {
            // Consul's documentation writes it as a map, older ones as a list of one map.
            let map = match value {
                Value::Map(map) => Some(map),
                Value::List(items) => match items.as_slice() {
                    [Value::Map(map)] => Some(map),
                    _ => None,
                },
                _ => None,
            };
            let Some(map) = map else {
                wrong("a map".to_owned());
                return None;
            };
            let entry = |(key, value): (&String, &Value)| {
                setting(reader, inner, key, value, span.clone()).map(|value| (key.clone(), value))
            };
            return Some(serde_json::Value::Object(map.iter().filter_map(entry).collect()));
        }
    }
    None
}

/// Whether a task's service asks for the mesh, and where.
pub(super) fn connect_of(block: &Block) -> Option<Option<Range<usize>>> {
    block.body.get_blocks("connect").next().map(header)
}
