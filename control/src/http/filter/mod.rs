//! `?filter=`: the expression language of Consul's list endpoints.
//!
//! A subset of go-bexpr: `==`, `!=`, `in`, `not in`, `contains`, `not contains`, `is empty`, `is not empty`, `and`, `or`,
//! `not`, parentheses, quoted and back-quoted strings. Selectors are those of the endpoint's [`Schema`]. What is not
//! supported (`matches`, quantifiers) is refused by name: a filter that is not understood must never let everything pass.

mod eval;
mod parse;
mod schema;

use serde_json::Value;

pub(super) use self::schema::{AGENT_SERVICE, CATALOG_SERVICE, HEALTH_CHECK, INTENTION, NODE, SERVICE_ENTRY, Schema};

/// Longest expression, in bytes.
pub(super) const MAX_LENGTH: usize = 4096;
/// Deepest nesting of parentheses and `not`, and most operands in a chain.
pub(super) const MAX_DEPTH: usize = 64;

/// Why an expression was refused. The text goes to the client.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum FilterError {
    #[error("Failed to create boolean expression evaluator: filter of {0} bytes exceeds the limit of {MAX_LENGTH}")]
    TooLong(usize),
    #[error("Failed to create boolean expression evaluator: 1:{column} ({offset}): {what}")]
    Syntax { column: usize, offset: usize, what: String },
    #[error("Failed to create boolean expression evaluator: Selector {0:?} is not valid")]
    Selector(String),
    #[error(
        "Failed to create boolean expression evaluator: Invalid match operator {operator:?} for selector {selector:?}"
    )]
    Operator { selector: String, operator: &'static str },
    #[error(
        "Failed to create boolean expression evaluator: Failed to coerce value {value:?} for selector {selector:?}"
    )]
    Value { selector: String, value: String },
}

/// A checked expression.
#[derive(Clone, Debug)]
pub(super) struct Filter(eval::Node);

impl Filter {
    /// Parses `text` for items of `schema`.
    pub(super) fn parse(text: &str, schema: Schema) -> Result<Self, FilterError> {
        if text.len() > MAX_LENGTH {
            return Err(FilterError::TooLong(text.len()));
        }
        Ok(Self(eval::Node::bind(parse::parse(text)?, schema)?))
    }

    /// Does the item, as the endpoint would print it, pass?
    pub(super) fn matches(&self, item: &Value) -> bool {
        self.0.matches(item)
    }

    /// Nodes from the root to the deepest leaf.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn depth(&self) -> usize {
        self.0.depth()
    }
}

#[cfg(test)]
mod tests;
