//! What culvert's control plane adds for culvert's worker: `filter_metadata["culvert"]`, which Envoy ignores.
//!
//! Keys that this version does not know are hints for a newer one and are left alone, unlike unknown configuration.

use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use culvert_types::{Intention, IntentionSubject};
use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};

use super::error::{Path, ResourceError};
use crate::config::Explain;

/// The key under which our metadata stands.
const NAMESPACE: &str = "culvert";
/// Most intentions that one listener can bring along.
const MAX_INTENTIONS: usize = 10_000;

/// Our part of `metadata`.
fn ours(metadata: Option<&Metadata>) -> Option<&Struct> {
    metadata?.filter_metadata.get(NAMESPACE)
}

/// Node and workload address of an endpoint.
pub(super) fn endpoint(
    metadata: Option<&Metadata>,
    path: &Path<'_>,
) -> Result<(Option<String>, Option<SocketAddr>), ResourceError> {
    let Some(fields) = ours(metadata) else { return Ok((None, None)) };
    let path = path.field("filter_metadata[culvert]");
    let node = text(fields, "node", &path)?.map(str::to_owned);
    let workload = text(fields, "workload", &path)?.map(|text| parse(text, &path.field("workload"))).transpose()?;
    Ok((node, workload))
}

/// The intentions behind a listener.
pub(super) fn explain(metadata: Option<&Metadata>, path: &Path<'_>) -> Result<Option<Explain>, ResourceError> {
    let Some(fields) = ours(metadata) else { return Ok(None) };
    let path = path.field("filter_metadata[culvert]");
    let Some(destination) = text(fields, "destination", &path)? else { return Ok(None) };
    let destination = parse(destination, &path.field("destination"))?;
    let default = required(fields, "default", &path)?;
    let default = parse(default, &path.field("default"))?;
    let listed = match fields.fields.get("intentions").and_then(|value| value.kind.as_ref()) {
        None => &[][..],
        Some(Kind::ListValue(list)) => &list.values,
        Some(_) => return Err(path.field("intentions").invalid("not a list")),
    };
    if listed.len() > MAX_INTENTIONS {
        return Err(path.field("intentions").too_many("intentions", MAX_INTENTIONS));
    }
    let intentions = listed.iter().enumerate().map(|(index, value)| intention(value, &path.item("intentions", index)));
    Ok(Some(Explain { destination, default, intentions: intentions.collect::<Result<Arc<[_]>, _>>()? }))
}

fn intention(value: &Value, path: &Path<'_>) -> Result<Intention, ResourceError> {
    let Some(Kind::StructValue(fields)) = &value.kind else { return Err(path.invalid("not an object")) };
    let source: IntentionSubject = parse(required(fields, "source", path)?, &path.field("source"))?;
    let destination = parse(required(fields, "destination", path)?, &path.field("destination"))?;
    let action = parse(required(fields, "action", path)?, &path.field("action"))?;
    Ok(Intention { source, destination, action })
}

fn required<'a>(fields: &'a Struct, key: &str, path: &Path<'_>) -> Result<&'a str, ResourceError> {
    text(fields, key, path)?.ok_or_else(|| path.field(key).missing())
}

fn text<'a>(fields: &'a Struct, key: &str, path: &Path<'_>) -> Result<Option<&'a str>, ResourceError> {
    match fields.fields.get(key).and_then(|value| value.kind.as_ref()) {
        None => Ok(None),
        Some(Kind::StringValue(text)) => Ok(Some(text)),
        Some(_) => Err(path.field(key).invalid("not a string")),
    }
}

fn parse<T: FromStr<Err: std::fmt::Display>>(text: &str, path: &Path<'_>) -> Result<T, ResourceError> {
    text.parse().map_err(|error| path.invalid(error))
}
