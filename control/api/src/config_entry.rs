//! Config entries on the wire: those that culvert shows.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::value::Timestamp;

/// `service-intentions`: every intention towards one destination.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see its documentation of config entries")]
pub struct ServiceIntentions {
    pub kind: String,
    pub name: String,
    pub sources: Vec<SourceIntention>,
    pub create_index: u64,
    pub modify_index: u64,
}

/// What one source may do.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see its documentation of config entries")]
pub struct SourceIntention {
    pub name: String,
    pub action: String,
    pub precedence: u8,
    pub r#type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    #[serde(rename = "LegacyID", skip_serializing_if = "String::is_empty")]
    pub legacy_id: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub legacy_meta: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub legacy_create_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub legacy_update_time: Option<Timestamp>,
}
