//! Which selectors an endpoint's items have, and of which type. The names are Consul's.

/// Type of a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::http) enum Type {
    Text,
    Number,
    Bool,
    /// List of strings.
    List,
    /// Strings by string.
    Map,
    /// An object with fields of its own.
    Object(Schema),
}

/// Fields by name.
pub(in crate::http) type Schema = &'static [(&'static str, Type)];

use Type::{Bool, List, Map, Number, Object, Text};

const WEIGHTS: Schema = &[("Passing", Number), ("Warning", Number)];
const CONNECT: Schema = &[("Native", Bool)];
const PROXY: Schema = &[
    ("DestinationServiceName", Text),
    ("DestinationServiceID", Text),
    ("LocalServiceAddress", Text),
    ("LocalServicePort", Number),
    ("Mode", Text),
];

/// `/v1/agent/services`.
pub(in crate::http) const AGENT_SERVICE: Schema = &[
    ("Kind", Text),
    ("ID", Text),
    ("Service", Text),
    ("Tags", List),
    ("Meta", Map),
    ("Port", Number),
    ("Address", Text),
    ("EnableTagOverride", Bool),
    ("Weights", Object(WEIGHTS)),
    ("Proxy", Object(PROXY)),
    ("Connect", Object(CONNECT)),
];

/// `/v1/catalog/nodes`.
pub(in crate::http) const NODE: Schema =
    &[("ID", Text), ("Node", Text), ("Address", Text), ("Datacenter", Text), ("Meta", Map)];

/// `/v1/health/service/:name` and `/v1/health/connect/:name`.
pub(in crate::http) const SERVICE_ENTRY: Schema = &[("Node", Object(NODE)), ("Service", Object(AGENT_SERVICE))];

/// `/v1/agent/checks`, `/v1/health/{node,checks,state}`.
pub(in crate::http) const HEALTH_CHECK: Schema = &[
    ("Node", Text),
    ("CheckID", Text),
    ("Name", Text),
    ("Status", Text),
    ("Notes", Text),
    ("Output", Text),
    ("ServiceID", Text),
    ("ServiceName", Text),
    ("ServiceTags", List),
    ("Type", Text),
];

/// `/v1/catalog/{service,connect}/:name`.
pub(in crate::http) const CATALOG_SERVICE: Schema = &[
    ("ID", Text),
    ("Node", Text),
    ("Address", Text),
    ("Datacenter", Text),
    ("NodeMeta", Map),
    ("ServiceKind", Text),
    ("ServiceID", Text),
    ("ServiceName", Text),
    ("ServiceTags", List),
    ("ServiceMeta", Map),
    ("ServiceAddress", Text),
    ("ServicePort", Number),
    ("ServiceEnableTagOverride", Bool),
    ("ServiceWeights", Object(WEIGHTS)),
    ("ServiceProxy", Object(PROXY)),
    ("ServiceConnect", Object(CONNECT)),
];

/// `/v1/connect/intentions`.
pub(in crate::http) const INTENTION: Schema = &[
    ("ID", Text),
    ("Description", Text),
    ("SourceNS", Text),
    ("SourceName", Text),
    ("DestinationNS", Text),
    ("DestinationName", Text),
    ("SourceType", Text),
    ("Action", Text),
    ("Precedence", Number),
    ("Meta", Map),
];
