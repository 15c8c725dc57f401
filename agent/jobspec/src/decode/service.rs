//! `service` and `check`.

use super::connect::decode_connect;
use super::reader::{At, EMPTY, Reader, Schema};
use crate::hcl::to_text;
use crate::{Check, CheckKind, CheckStatus, HttpCheck, Job, PortRef, Service, Template};
use culvert_types::{MAX_SERVICE_NAME, ServiceName};
use hcl_edit::structure::Block;
use std::collections::BTreeMap;
use std::time::Duration;

/// Shortest `interval` and `timeout` of a check.
const MIN_CHECK_TIME: Duration = Duration::from_secs(1);

/// Longest `interval` and `timeout` of a check.
const MAX_CHECK_TIME: Duration = Duration::from_secs(24 * 3600);

/// Most repetitions that a check may ask for before it changes its mind.
const MAX_THRESHOLD: i64 = 1000;

/// Longest body that a check sends, in bytes.
const MAX_BODY: usize = 64 * 1024;

const SERVICE: Schema = Schema {
    block: "service",
    attributes: &["address_mode", "name", "port", "provider", "tags"],
    maps: &["meta"],
    once: &["connect"],
    repeated: &["check"],
    refused: &[
        "address",
        "canary_meta",
        "canary_tags",
        "check_restart",
        "cluster",
        "dynamic",
        "enable_tag_override",
        "identity",
        "kind",
        "on_update",
        "tagged_addresses",
        "task",
        "weights",
    ],
};

const CHECK: Schema = Schema {
    block: "check",
    attributes: &[
        "address_mode",
        "body",
        "failures_before_critical",
        "failures_before_warning",
        "initial_status",
        "interval",
        "method",
        "name",
        "path",
        "port",
        "protocol",
        "success_before_passing",
        "timeout",
        "type",
    ],
    maps: &["header"],
    refused: &[
        "args",
        "check_restart",
        "command",
        "dynamic",
        "expose",
        "grpc_service",
        "grpc_use_tls",
        "notes",
        "on_update",
        "task",
        "tls_server_name",
        "tls_skip_verify",
    ],
    ..EMPTY
};

/// Reads service number `index` of `group`.
pub(super) fn decode_service(
    group: &Reader<'_>,
    index: usize,
    block: &Block,
    job: &Job,
    group_name: &str,
) -> Option<Service> {
    let reader = group.inner(&SERVICE, block, &format!("service.{index}"));
    if let Some(provider) = reader.literal("provider")
        && provider.value != "consul"
    {
        if provider.value == "nomad" && reader.block("connect").is_some() {
            reader.report(provider.span, "Service with provider nomad cannot include Connect blocks", None);
        } else {
            reader.refuse_word("service provider", &provider, &["nomad"], "\"consul\"");
        }
    }
    if let Some(mode) = reader.literal("address_mode")
        && mode.value != "auto"
    {
        reader.refuse_word("address_mode", &mode, &["host", "driver", "alloc", "alloc_ipv6"], "\"auto\"");
    }
    let base = format!("{}-{group_name}", job.id);
    let given = reader.template("name").map(|name| {
        // The words that need no allocation (Nomad: "interpolation of service names").
        let known = |reference: &str| match reference {
            "JOB" => Some(job.id.as_str()),
            "TASKGROUP" => Some(group_name),
            "TASK" => Some("group"),
            "BASE" => Some(base.as_str()),
            _ => None,
        };
        At { value: name.value.substitute(known), span: name.span }
    });
    let name = given.unwrap_or_else(|| At { value: Template::literal(base.clone()), span: reader.span.clone() });
    check_service_name(&reader, &name);
    let connect = reader.block("connect").and_then(|block| decode_connect(&reader, block));
    let checks = reader.blocks("check").into_iter().enumerate();
    Some(Service {
        port: port_ref(&reader),
        tags: reader.templates("tags").map(|tags| tags.value).unwrap_or_default(),
        meta: reader.template_map("meta"),
        checks: checks.filter_map(|(index, block)| decode_check(&reader, index, block, &name.value)).collect(),
        connect,
        name: name.value,
    })
}

/// Checks the parts of a name that are known now; the rest is checked when an allocation has it.
fn check_service_name(reader: &Reader<'_>, name: &At<Template>) {
    let literal = name.value.as_literal();
    let fine = match literal {
        Some(text) => is_service_name(text),
        None => true,
    };
    if !fine {
        let message = format!(
            "Service name must be valid per RFC 1123 and can contain only alphanumeric characters or dashes and must be no longer than {MAX_SERVICE_NAME} characters: {:?}",
            literal.unwrap_or_default()
        );
        reader.report(name.span.clone(), message, None);
    }
}

/// What the mesh takes, as one RFC 1123 label: letters, digits and inner dashes.
fn is_service_name(text: &str) -> bool {
    ServiceName::new(text).is_ok() && !text.contains(['_', '.'])
}

/// `port = "http"`, `port = "9001"` or `port = 9001`.
fn port_ref(reader: &Reader<'_>) -> Option<PortRef> {
    let At { value: text, span } = reader.literal("port")?;
    if text.is_empty() {
        return None;
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(PortRef::Label(text));
    }
    match text.parse() {
        Ok(port) if port > 0 => Some(PortRef::Number(port)),
        _ => {
            reader.report(span, format!("port {text} is not between 1 and 65535"), None);
            // Any number: without one, "has no port" would be reported as well.
            Some(PortRef::Number(u16::MAX))
        }
    }
}

fn decode_check(service: &Reader<'_>, index: usize, block: &Block, service_name: &Template) -> Option<Check> {
    let reader = service.inner(&CHECK, block, &format!("check.{index}"));
    let name = reader.template("name").map(|name| name.value).unwrap_or_else(|| {
        let mut name = Template::literal("service: \"");
        name.append(service_name);
        name.push_str("\" check");
        name
    });
    let invalid = |span, message: &str| reader.report(span, format!("Check {name} invalid: {message}"), None);
    if let Some(mode) = reader.literal("address_mode")
        && mode.value != "alloc"
    {
        if mode.value == "auto" {
            invalid(mode.span, "invalid address_mode \"auto\" - auto only valid for services");
        } else {
            reader.refuse_word("address_mode", &mode, &["host", "driver", "alloc_ipv6"], "\"alloc\"");
        }
    }
    let kind = decode_kind(&reader, &name)?;
    let (interval, timeout) = (check_time(&reader, "interval"), check_time(&reader, "timeout"));
    let threshold =
        |field: &str| reader.number(field, 0..=MAX_THRESHOLD).and_then(|at| u32::try_from(at.value).ok()).unwrap_or(0);
    let initial_status = match reader.literal("initial_status") {
        None => CheckStatus::Critical,
        Some(status) => match status.value.as_str() {
            "" | "critical" => CheckStatus::Critical,
            "passing" => CheckStatus::Passing,
            "warning" => CheckStatus::Warning,
            other => {
                let message = format!(
                    "invalid initial check state ({other}), must be one of \"passing\", \"warning\", \"critical\" or empty"
                );
                invalid(status.span, &message);
                CheckStatus::Critical
            }
        },
    };
    Some(Check {
        kind,
        port: port_ref(&reader),
        interval,
        timeout,
        initial_status,
        success_before_passing: threshold("success_before_passing"),
        failures_before_critical: threshold("failures_before_critical"),
        failures_before_warning: threshold("failures_before_warning"),
        name,
    })
}

fn check_time(reader: &Reader<'_>, field: &str) -> Duration {
    let Some(At { value, span }) = reader.duration(field) else {
        if !reader.has(field) {
            let capital = if field == "interval" { "Interval" } else { "Timeout" };
            let message = format!("missing required value {field}. {capital} cannot be less than 1s");
            reader.report(reader.span.clone(), message, Some(format!("add {field} = \"5s\"")));
        }
        return MIN_CHECK_TIME;
    };
    let shown = crate::format_go_duration(value);
    if value < MIN_CHECK_TIME {
        let message = match field {
            "interval" => format!("interval ({shown}) cannot be lower than 1s"),
            _ => format!("timeout ({shown}) is lower than required minimum timeout 1s"),
        };
        reader.report(span, message, None);
    } else if value > MAX_CHECK_TIME {
        let most = crate::format_go_duration(MAX_CHECK_TIME);
        reader.report(span, format!("{field} ({shown}) cannot be higher than {most}"), None);
    }
    value
}

fn decode_kind(reader: &Reader<'_>, name: &Template) -> Option<CheckKind> {
    let Some(kind) = reader.literal("type") else {
        if !reader.has("type") {
            reader.missing("type");
        }
        return None;
    };
    match kind.value.as_str() {
        "http" => decode_http(reader, name).map(CheckKind::Http),
        "tcp" => {
            for field in ["path", "method", "body", "protocol"].into_iter().filter(|field| reader.has(field)) {
                let span = reader.expression(field).and_then(hcl_edit::Span::span);
                reader.report(span, format!("\"{field}\" has no meaning for a tcp check"), None);
            }
            if let Some((_, _, span)) = reader.entries("header").into_iter().next() {
                reader.report(span, "\"header\" has no meaning for a tcp check", None);
            }
            Some(CheckKind::Tcp)
        }
        "grpc" | "script" => {
            reader.refuse_word("check type", &kind, &["grpc", "script"], "\"http\" and \"tcp\"");
            None
        }
        other => {
            let message =
                format!("invalid check type ({other:?}), must be one of \"grpc\", \"http\", \"tcp\", \"script\"");
            reader.report(kind.span, message, Some("culvert supports \"http\" and \"tcp\"".to_owned()));
            None
        }
    }
}

fn decode_http(reader: &Reader<'_>, name: &Template) -> Option<HttpCheck> {
    let invalid = |span, message: &str| reader.report(span, format!("Check {name} invalid: {message}"), None);
    if let Some(protocol) = reader.literal("protocol")
        && protocol.value != "http"
    {
        reader.refuse_word("protocol", &protocol, &["https"], "\"http\"");
    }
    let path = match reader.template("path") {
        Some(path) if !path.value.is_empty() => path,
        _ => {
            invalid(reader.span.clone(), "http type must have http path");
            return None;
        }
    };
    let shown = path.value.to_string();
    if !shown.starts_with('/') || shown.starts_with("//") {
        invalid(path.span.clone(), "http type must have relative http path");
    } else if !is_visible(&shown) {
        invalid(path.span.clone(), "path holds a blank or a control character");
    }
    let method = reader.literal("method").unwrap_or_else(|| At { value: "GET".to_owned(), span: None });
    if !is_token(&method.value) {
        invalid(method.span, &format!("{:?} is not an HTTP method", method.value));
    }
    let body = reader.template("body");
    if let Some(body) = body.as_ref().filter(|body| body.value.size() > MAX_BODY) {
        invalid(body.span.clone(), &format!("body is longer than {MAX_BODY} bytes"));
    }
    let headers = headers(reader, name);
    Some(HttpCheck {
        path: path.value,
        method: method.value,
        headers,
        body: body.map(|at| at.value).unwrap_or_default(),
    })
}

/// `header { Accept = ["text/plain"] }`.
fn headers(reader: &Reader<'_>, name: &Template) -> BTreeMap<String, Vec<Template>> {
    let mut headers = BTreeMap::new();
    for (key, value, span) in reader.entries("header") {
        let texts: Option<Vec<Template>> = match &value {
            crate::hcl::Value::List(items) => items.iter().map(to_text).collect(),
            _ => None,
        };
        let message = match &texts {
            None => format!("header {key:?} must be a list of strings"),
            Some(_) if !is_token(&key) => format!("{key:?} is not the name of a header"),
            Some(values) if values.iter().any(|value| value.to_string().contains(['\r', '\n', '\0'])) => {
                format!("header {key:?} holds a line break")
            }
            Some(_) => {
                reader.session.place(&format!("{}.header.{key}", reader.path), span);
                headers.insert(key, texts.unwrap_or_default());
                continue;
            }
        };
        reader.report(span, format!("Check {name} invalid: {message}"), None);
    }
    headers
}

/// A token of RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.len() <= MAX_SERVICE_NAME && text.bytes().all(fine)
}

fn is_visible(text: &str) -> bool {
    text.chars().all(|c| !c.is_whitespace() && !c.is_control())
}
