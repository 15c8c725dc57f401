//! `culvert intention`: Consul's verbs, output and exit codes.

use std::fs::File;
use std::io::Read as _;
use std::time::SystemTime;

use anyhow::{Context as _, anyhow, bail};
use culvert_api::client::{Client, ClientError};
use culvert_api::{Intention, IntentionCheck, IntentionCreated, decode};
use hyper::Method;
use serde_json::Value;
use time::OffsetDateTime;
use time::macros::format_description;

use super::args::{ConsulArgs, IntentionCommand, IntentionCreateArgs, IntentionMatchArgs, PairArgs};
use super::connection::{Target, client};
use super::output::{Table, pairs};
use super::{OK, Session, key_value};

/// Exit code of `check` for a connection that is not allowed.
const DENIED: u8 = 1;
/// Exit code of `list` when there is nothing to list.
const EMPTY: u8 = 2;
/// Longest intention file that is read.
const MAX_FILE: u64 = 1024 * 1024;

const EXACT: &str = "/v1/connect/intentions/exact";
const ALL: &str = "/v1/connect/intentions";

pub(super) async fn run(command: IntentionCommand, session: &mut Session<'_>) -> anyhow::Result<u8> {
    match command {
        IntentionCommand::Create(args) => create(&args, session).await,
        IntentionCommand::Check(args) => check(&args, session).await,
        IntentionCommand::Match(args) => matching(&args, session).await,
        IntentionCommand::Get(args) => get(&args.consul, &args.args, session).await,
        IntentionCommand::List(args) => list(&args.consul, session).await,
        IntentionCommand::Delete(args) => delete(&args.consul, &args.args, session).await,
    }
}

async fn create(args: &IntentionCreateArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    if args.allow && args.deny {
        bail!("Only one of -allow or -deny may be specified.");
    }
    let intentions = if args.file { from_files(args)? } else { vec![from_args(args)?] };
    let client = client(&args.consul.http, &session.env)?;
    for intention in intentions {
        let exact = exact(&source(&intention), &destination(&intention)).consul(&args.consul, &session.env);
        if args.replace
            && look_up(&client, &exact).await.with_context(|| replacing("looking up", &intention))?.is_some()
        {
            let replaced = client.call::<Value>(Method::PUT, exact.as_str(), Some(&intention)).await;
            replaced.with_context(|| replacing("replacing", &intention))?;
            continue; // Consul says nothing here either
        }
        let all = Target::new(ALL).consul(&args.consul, &session.env);
        let created = client.call::<IntentionCreated>(Method::POST, all.as_str(), Some(&intention)).await;
        created.with_context(|| format!("Error creating intention \"{}\"", summary(&intention)))?;
        session.output.line(format_args!("Created: {}", summary(&intention)))?;
    }
    Ok(OK)
}

fn replacing(doing: &str, intention: &Intention) -> String {
    let purpose = if doing == "looking up" { " for replacement" } else { "" };
    let (source, destination) = (source(intention), destination(intention));
    format!("Error {doing} intention{purpose} with source {source:?} and destination {destination:?}")
}

fn from_args(args: &IntentionCreateArgs) -> anyhow::Result<Intention> {
    let [source, destination] = &args.args[..] else {
        bail!("Error: Must specify two arguments: source and destination");
    };
    let ([source_partition, source_ns, source_name], [destination_partition, destination_ns, destination_name]) =
        (target(source)?, target(destination)?);
    let mut intention = Intention {
        source_partition,
        source_ns,
        source_name,
        destination_partition,
        destination_ns,
        destination_name,
        source_type: "consul".to_owned(),
        action: if args.deny { "deny" } else { "allow" }.to_owned(),
        ..Intention::default()
    };
    for pair in &args.meta {
        let (key, value) = key_value("meta", pair)?;
        intention.meta.insert(key.to_owned(), value.to_owned());
    }
    Ok(intention)
}

/// Partition, namespace and name of `web`, `default/web` or `default/default/web`. The agent refuses others than `default`.
fn target(text: &str) -> anyhow::Result<[String; 3]> {
    let parts: Vec<&str> = text.split('/').collect();
    let parts = match parts[..] {
        [name] => ["", "", name],
        [namespace, name] => ["", namespace, name],
        [partition, namespace, name] => [partition, namespace, name],
        _ => bail!("Error: {text:?} has more than three parts: partition/namespace/name"),
    };
    Ok(parts.map(str::to_owned))
}

fn from_files(args: &IntentionCreateArgs) -> anyhow::Result<Vec<Intention>> {
    if args.allow || args.deny || !args.meta.is_empty() {
        bail!("-allow, -deny and -meta cannot be combined with -file: the files say it");
    }
    if args.args.is_empty() {
        bail!("Error: Must specify at least one file");
    }
    args.args.iter().map(|path| from_file(path).with_context(|| format!("Error: file {path:?}"))).collect()
}

fn from_file(path: &str) -> anyhow::Result<Intention> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_FILE).read_to_end(&mut text)?;
    let mut intention: Intention = decode(&text)?;
    if intention.source_type.is_empty() {
        "consul".clone_into(&mut intention.source_type);
    }
    Ok(intention)
}

async fn check(args: &PairArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let [source, destination] = &args.args[..] else {
        bail!("Error: command requires exactly two arguments: src and dst");
    };
    let target = Target::new("/v1/connect/intentions/check").with("source", source).with("destination", destination);
    let target = target.consul(&args.consul, &session.env);
    let answer = client(&args.consul.http, &session.env)?.get::<IntentionCheck>(target.as_str()).await;
    let allowed = answer.context("Error checking the connection")?.allowed;
    session.output.line(if allowed { "Allowed" } else { "Denied" })?;
    Ok(if allowed { OK } else { DENIED })
}

async fn matching(args: &IntentionMatchArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    if args.source && args.destination {
        bail!("Error: only one of -source or -destination may be specified");
    }
    let [name] = &args.args[..] else {
        bail!("Error: command requires exactly one argument: src or dst");
    };
    let by = if args.source { "source" } else { "destination" };
    let target = Target::new("/v1/connect/intentions/match").with("by", by).with("name", name);
    let target = target.consul(&args.consul, &session.env);
    let answer = client(&args.consul.http, &session.env)?
        .get::<std::collections::BTreeMap<String, Vec<Intention>>>(target.as_str())
        .await;
    for intention in answer.context("Error matching the connection")?.remove(name).unwrap_or_default() {
        session.output.line(summary(&intention))?;
    }
    Ok(OK)
}

async fn get(consul: &ConsulArgs, args: &[String], session: &mut Session<'_>) -> anyhow::Result<u8> {
    let target = one(args)?.consul(consul, &session.env);
    let client = client(&consul.http, &session.env)?;
    let found = look_up(&client, &target).await.context("Error reading the intention")?;
    let intention = found.ok_or_else(|| not_found(args))?;
    let mut rows: Vec<(String, String)> =
        vec![("Source:".into(), source(&intention)), ("Destination:".into(), destination(&intention))];
    for (name, value) in
        [("Action:", &intention.action), ("ID:", &intention.id), ("Description:", &intention.description)]
    {
        if !value.is_empty() {
            rows.push((name.to_owned(), value.clone()));
        }
    }
    rows.extend(intention.meta.iter().map(|(key, value)| (format!("Meta[{key}]:"), value.clone())));
    rows.push(("Created At:".into(), rfc850(intention.created_at.0)));
    let rows: Vec<(&str, String)> = rows.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    pairs(&mut session.output, "  ", &rows)?;
    Ok(OK)
}

async fn list(consul: &ConsulArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let target = Target::new(ALL).consul(consul, &session.env);
    let intentions = client(&consul.http, &session.env)?.get::<Vec<Intention>>(target.as_str()).await;
    let mut table = Table::new(&["ID", "Source", "Action", "Destination", "Precedence"]);
    for intention in intentions.context("Failed to retrieve the intentions list")? {
        let Intention { id, precedence, .. } = &intention;
        table.row([id, &source(&intention), &action(&intention), &destination(&intention), precedence]);
    }
    if table.is_empty() {
        session.output.error("There are no intentions.");
        return Ok(EMPTY);
    }
    table.print(&mut session.output)?;
    Ok(OK)
}

async fn delete(consul: &ConsulArgs, args: &[String], session: &mut Session<'_>) -> anyhow::Result<u8> {
    let target = one(args)?.consul(consul, &session.env);
    let deleted = client(&consul.http, &session.env)?.bytes(Method::DELETE, target.as_str(), None::<&()>).await;
    deleted.context("Error deleting the intention")?;
    session.output.line("Intention deleted.")?;
    Ok(OK)
}

/// The intention that the arguments name: a pair, or an ID.
fn one(args: &[String]) -> anyhow::Result<Target> {
    match args {
        [id] => Ok(Target::new(ALL).segment(id)),
        [source, destination] => Ok(exact(source, destination)),
        _ => bail!("Error: command requires exactly 1 or 2 args: an ID, or source and destination"),
    }
}

fn exact(source: &str, destination: &str) -> Target {
    Target::new(EXACT).with("source", source).with("destination", destination)
}

fn not_found(args: &[String]) -> anyhow::Error {
    match args {
        [source, destination] => anyhow!("Intention with source {source:?} and destination {destination:?} not found."),
        other => anyhow!("Intention with ID {:?} not found.", other.first().map_or("", String::as_str)),
    }
}

async fn look_up(client: &Client, target: &Target) -> Result<Option<Intention>, ClientError> {
    match client.get(target.as_str()).await {
        Ok(intention) => Ok(Some(intention)),
        Err(ClientError::Status { status: 404, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `web => api (allow)`
fn summary(intention: &Intention) -> String {
    format!("{} => {} ({})", source(intention), destination(intention), action(intention))
}

fn source(intention: &Intention) -> String {
    full_name(&intention.source_ns, &intention.source_name)
}

fn destination(intention: &Intention) -> String {
    full_name(&intention.destination_ns, &intention.destination_name)
}

/// Without the namespace `default`, as Consul prints it.
fn full_name(namespace: &str, name: &str) -> String {
    if matches!(namespace, "" | "default") { name.to_owned() } else { format!("{namespace}/{name}") }
}

fn action(intention: &Intention) -> String {
    match intention.permissions.len() {
        0 => intention.action.clone(),
        1 => "1 permission".to_owned(),
        several => format!("{several} permissions"),
    }
}

/// Go's `time.RFC850`, in UTC: `Saturday, 21-Nov-26 03:49:31 UTC`.
fn rfc850(time: SystemTime) -> String {
    let format =
        format_description!("[weekday], [day]-[month repr:short]-[year repr:last_two] [hour]:[minute]:[second] UTC");
    OffsetDateTime::from(time).format(format).unwrap_or_default()
}
