//! Commands about the agent itself: `status`, `services`, `reload`, `leave`.

use std::collections::BTreeMap;

use anyhow::Context as _;
use culvert_api::{AgentService, AgentStatus};
use hyper::Method;

use super::args::{PlainArgs, ServicesArgs, StatusArgs};
use super::connection::{Target, client};
use super::output::{Colour, Output, Table, pairs};
use super::{OK, Session};

pub(super) async fn status(args: &StatusArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let status = client(&args.http, &session.env)?.get::<AgentStatus>("/v1/culvert/status").await;
    let status = status.context("Error querying the agent's status")?;
    if args.json {
        session.output.json(&status)?;
    } else {
        print_status(&status, &mut session.output)?;
    }
    Ok(OK)
}

fn print_status(status: &AgentStatus, output: &mut Output<'_>) -> std::io::Result<()> {
    let ebpf = match (status.ebpf.active, &status.ebpf.reason) {
        (true, _) => format!("active, {} direct routes", status.ebpf.routes),
        (false, Some(reason)) => format!("off: {reason}"),
        (false, None) => "off".to_owned(),
    };
    let worker = match status.worker.pid {
        Some(pid) => format!("pid {pid}, restarted {} times", status.worker.restarts),
        None => format!("not running, restarted {} times", status.worker.restarts),
    };
    let rows = [
        ("Version", status.version.clone()),
        ("Node", status.node.clone()),
        ("Datacenter", status.datacenter.clone()),
        ("Trust Domain", status.trust_domain.clone()),
        ("Encryption", status.encryption.clone()),
        ("Default Policy", status.default_policy.clone()),
        ("eBPF", ebpf),
        ("Worker", worker),
        ("Jobs", status.jobs.to_string()),
        ("Allocations", status.allocations.to_string()),
    ];
    pairs(output, " = ", &rows)?;
    if status.worker.proxies.is_empty() {
        return Ok(());
    }
    output.line("\nProxies")?;
    let mut table = Table::new(&["ID", "Ready", "Config", "Certificate Until"]);
    for proxy in &status.worker.proxies {
        let version = proxy.xds_version.as_deref().unwrap_or("none");
        let until = proxy.certificate_not_after.map_or_else(|| "none".to_owned(), |time| time.to_string());
        table.row([&proxy.id, &proxy.ready, &version, &until]);
    }
    table.print(output)?;
    for (proxy, nack) in status.worker.proxies.iter().filter_map(|proxy| Some((proxy, proxy.nack.as_ref()?))) {
        let text = format!("{} refuses {}: {}", proxy.id, nack.resource, nack.reason);
        output.line(output.paint(Colour::Yellow, text))?;
    }
    for proxy in status.worker.proxies.iter().filter(|proxy| proxy.failures > 0) {
        let text = format!("{} failed in the worker and was started again, {} times", proxy.id, proxy.failures);
        output.line(output.paint(Colour::Yellow, text))?;
    }
    Ok(())
}

pub(super) async fn services(args: &ServicesArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let target = Target::new("/v1/agent/services").consul(&args.consul, &session.env);
    let services =
        client(&args.consul.http, &session.env)?.get::<BTreeMap<String, AgentService>>(target.as_str()).await;
    let services = services.context("Error querying the agent's services")?;
    if args.json {
        session.output.json(&services)?;
        return Ok(OK);
    }
    let mut table = Table::new(&["Service", "Kind", "Address", "ID"]);
    let mut services: Vec<&AgentService> = services.values().collect();
    services.sort_by(|a, b| (&a.service, &a.id).cmp(&(&b.service, &b.id)));
    for service in services {
        let kind = if service.kind.is_empty() { "typical" } else { &service.kind };
        let address = if service.address.contains(':') {
            format!("[{}]:{}", service.address, service.port)
        } else {
            format!("{}:{}", service.address, service.port)
        };
        table.row([&service.service, &kind, &address, &service.id]);
    }
    if table.is_empty() {
        session.output.error("There are no services.");
    } else {
        table.print(&mut session.output)?;
    }
    Ok(OK)
}

pub(super) async fn reload(args: &PlainArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client = client(&args.http, &session.env)?;
    let answer = client.bytes(Method::PUT, "/v1/agent/reload", None::<&()>).await;
    answer.context("Error reloading")?;
    session.output.line("Configuration reload triggered")?;
    Ok(OK)
}

pub(super) async fn leave(args: &PlainArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let client = client(&args.http, &session.env)?;
    let answer = client.bytes(Method::PUT, "/v1/agent/leave", None::<&()>).await;
    answer.context("Error leaving")?;
    session.output.line("Graceful leave complete")?;
    Ok(OK)
}
