//! `culvert connect ca`: the certificate authority's settings, in Consul's words, and the rotation of its root.

use std::fs::File;
use std::io::Read as _;

use anyhow::Context as _;
use culvert_api::{CaConfiguration, CaRoots, decode};
use hyper::Method;

use super::args::{CaArgs, CaCommand, CaSetConfigArgs};
use super::connection::{Target, client};
use super::{OK, Session};

/// Longest file of settings that is read.
const MAX_FILE: u64 = 1024 * 1024;

const CONFIGURATION: &str = "/v1/connect/ca/configuration";

pub(super) async fn ca(command: CaCommand, session: &mut Session<'_>) -> anyhow::Result<u8> {
    match command {
        CaCommand::GetConfig(args) => get(&args, session).await,
        CaCommand::SetConfig(args) => set(&args, session).await,
        CaCommand::Rotate(args) => rotate(&args, session).await,
    }
}

async fn get(args: &CaArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let target = Target::new(CONFIGURATION).consul(&args.consul, &session.env);
    let settings = client(&args.consul.http, &session.env)?.get::<CaConfiguration>(target.as_str()).await;
    session.output.json(&settings.context("Error querying CA configuration")?)?;
    Ok(OK)
}

async fn set(args: &CaSetConfigArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let file = || format!("Error: file {:?}", args.config_file);
    let mut text = Vec::new();
    File::open(&args.config_file).and_then(|open| open.take(MAX_FILE).read_to_end(&mut text)).with_context(file)?;
    let settings: CaConfiguration = decode(&text).with_context(file)?;
    let target = Target::new(CONFIGURATION).consul(&args.consul, &session.env);
    let client = client(&args.consul.http, &session.env)?;
    let set = client.bytes(Method::PUT, target.as_str(), Some(&settings)).await;
    set.context("Error setting CA configuration")?;
    session.output.line("Configuration updated!")?;
    Ok(OK)
}

async fn rotate(args: &CaArgs, session: &mut Session<'_>) -> anyhow::Result<u8> {
    let target = Target::new("/v1/culvert/ca/rotate").consul(&args.consul, &session.env);
    let client = client(&args.consul.http, &session.env)?;
    let roots = client.call::<CaRoots>(Method::PUT, target.as_str(), None::<&()>).await;
    let roots = roots.context("Error rotating the root")?;
    let (active, trusted) = (&roots.active_root_id, roots.roots.len());
    session.output.line(format_args!("Root rotated: {active} signs, {trusted} roots are trusted"))?;
    Ok(OK)
}
