//! Intentions on the wire.

use std::collections::BTreeMap;

use culvert_types::{NameError, UnknownAction};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::value::{Timestamp, is_default};

/// An intention, in and out. Output-only fields are ignored on the way in, as Consul does.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/connect/intentions")]
pub struct Intention {
    #[serde(rename = "ID", skip_serializing_if = "String::is_empty")]
    pub id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    #[serde(rename = "SourceNS")]
    pub source_ns: String,
    pub source_name: String,
    #[serde(rename = "DestinationNS")]
    pub destination_ns: String,
    pub destination_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source_partition: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_partition: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source_peer: String,
    pub source_type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub action: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub permissions: Vec<Value>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub default_addr: String,
    #[serde(skip_serializing_if = "is_default")]
    pub default_port: u16,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
    pub precedence: u8,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hash: String,
    pub create_index: u64,
    pub modify_index: u64,
}

/// Names or action of an intention that mean nothing.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum IntentionConversionError {
    /// Source or destination.
    #[error("{side}: {error}")]
    Name {
        /// Which one.
        side: &'static str,
        /// What is wrong with it.
        error: NameError,
    },
    /// The action.
    #[error(transparent)]
    Action(#[from] UnknownAction),
}

impl TryFrom<&Intention> for culvert_types::Intention {
    type Error = IntentionConversionError;

    fn try_from(wire: &Intention) -> Result<Self, IntentionConversionError> {
        let name = |side, text: &str| text.parse().map_err(|error| IntentionConversionError::Name { side, error });
        Ok(Self {
            source: name("SourceName", &wire.source_name)?,
            destination: name("DestinationName", &wire.destination_name)?,
            action: wire.action.parse()?,
        })
    }
}

/// Answer of `POST /v1/connect/intentions`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct IntentionCreated {
    /// UUID of the new intention.
    #[serde(rename = "ID")]
    pub id: String,
}

/// Answer of `GET /v1/connect/intentions/check`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct IntentionCheck {
    /// May the source call the destination?
    pub allowed: bool,
}
