//! Who asks: the node that a stream introduces itself as, and its token.

use std::fmt;

use envoy_types::pb::envoy::config::core::v3::Node as PbNode;
use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use serde_json::{Map, Value as Json};
use tonic::metadata::{Ascii, MetadataValue};
use zeroize::Zeroizing;

/// How we call ourselves. Consul chooses by version what it sends to a user agent `envoy`; others get what all understand.
const USER_AGENT: &str = "culvert";

/// The proxy on whose behalf a stream is opened.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// Catalog ID of the proxy, for example `count-api-sidecar-proxy`.
    pub id: String,
    /// The service behind it.
    pub cluster: String,
    /// What else the control plane wants to know: `namespace`, `partition`, `node_name`.
    pub metadata: Map<String, Json>,
}

impl Node {
    /// A node without metadata.
    #[must_use]
    pub fn new(id: impl Into<String>, cluster: impl Into<String>) -> Self {
        Self { id: id.into(), cluster: cluster.into(), metadata: Map::new() }
    }

    /// Adds a text to the metadata.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.to_owned(), Json::String(value.to_owned()));
        self
    }

    /// The form on the wire.
    pub(super) fn to_pb(&self) -> PbNode {
        PbNode {
            id: self.id.clone(),
            cluster: self.cluster.clone(),
            metadata: Some(to_struct(&self.metadata)),
            user_agent_name: USER_AGENT.to_owned(),
            user_agent_version_type: Some(UserAgentVersionType::UserAgentVersion(env!("CARGO_PKG_VERSION").to_owned())),
            ..PbNode::default()
        }
    }
}

fn to_struct(map: &Map<String, Json>) -> Struct {
    Struct { fields: map.iter().map(|(key, value)| (key.clone(), to_value(value))).collect() }
}

fn to_value(json: &Json) -> Value {
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(flag) => Kind::BoolValue(*flag),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(list) => Kind::ListValue(ListValue { values: list.iter().map(to_value).collect() }),
        Json::Object(map) => Kind::StructValue(to_struct(map)),
    };
    Value { kind: Some(kind) }
}

/// An ACL token. Wiped when dropped, never printed.
#[derive(Clone, Eq, PartialEq)]
pub struct Token(Zeroizing<String>);

/// A token with bytes that a gRPC header cannot carry.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the token has characters other than visible ASCII")]
pub struct BadToken;

impl Token {
    /// Takes a token as it stands in a configuration; `None` if it is empty, which means that there is none.
    ///
    /// # Errors
    /// [`BadToken`].
    pub fn new(text: String) -> Result<Option<Self>, BadToken> {
        let text = Zeroizing::new(text);
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadToken);
        }
        Ok((!text.is_empty()).then_some(Self(text)))
    }

    /// The header's value, marked so that it is neither logged nor indexed by header compression.
    pub(super) fn header(&self) -> Option<MetadataValue<Ascii>> {
        let mut value = MetadataValue::try_from(self.0.as_str()).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_not_printed_and_cannot_break_a_header() {
        let token = Token::new("s3cret".to_owned()).expect("ascii").expect("not empty");
        assert_eq!(format!("{token:?}"), "Token(…)");
        assert_eq!(format!("{:?}", token.header().expect("header")), "Sensitive");
        assert_eq!(Token::new(String::new()), Ok(None));
        assert_eq!(Token::new("a\r\nb".to_owned()), Err(BadToken));
    }

    #[test]
    fn a_node_carries_its_metadata() {
        let node = Node::new("web-sidecar-proxy", "web").with("node_name", "n1").to_pb();
        assert_eq!((node.id.as_str(), node.cluster.as_str()), ("web-sidecar-proxy", "web"));
        let metadata = node.metadata.expect("metadata");
        assert_eq!(metadata.fields["node_name"].kind, Some(Kind::StringValue("n1".to_owned())));
    }
}
