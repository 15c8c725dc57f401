//! Syntax tree to verdict.

use serde_json::Value;

use super::FilterError;
use super::parse::{Expression, Operator};
use super::schema::{Schema, Type};

/// A checked tree: every selector exists, every operator suits its type, every value has been read.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Or(Box<Node>, Box<Node>),
    And(Box<Node>, Box<Node>),
    Not(Box<Node>),
    Text {
        path: Vec<String>,
        test: Operator,
        value: String,
    },
    Number {
        path: Vec<String>,
        equal: bool,
        value: i64,
    },
    Bool {
        path: Vec<String>,
        equal: bool,
        value: bool,
    },
    /// A list of strings or the keys of a map.
    Collection {
        path: Vec<String>,
        test: Operator,
        value: String,
    },
}

impl Node {
    pub(super) fn bind(expression: Expression, schema: Schema) -> Result<Self, FilterError> {
        let bind = |inner: Box<Expression>| Ok::<_, FilterError>(Box::new(Self::bind(*inner, schema)?));
        match expression {
            Expression::Or(left, right) => Ok(Self::Or(bind(left)?, bind(right)?)),
            Expression::And(left, right) => Ok(Self::And(bind(left)?, bind(right)?)),
            Expression::Not(inner) => Ok(Self::Not(bind(inner)?)),
            Expression::Match { selector, operator, value } => bind_match(selector, operator, value, schema),
        }
    }

    pub(super) fn matches(&self, item: &Value) -> bool {
        match self {
            Self::Or(left, right) => left.matches(item) || right.matches(item),
            Self::And(left, right) => left.matches(item) && right.matches(item),
            Self::Not(inner) => !inner.matches(item),
            Self::Text { path, test, value } => {
                // What JSON leaves out is empty text; a key that a map does not have equals nothing, not even "".
                let found = find(item, path);
                let text = found.and_then(Value::as_str).unwrap_or_default();
                match test {
                    Operator::Equal => text == value && (found.is_some() || !is_map_key(path)),
                    Operator::NotEqual => text != value || (found.is_none() && is_map_key(path)),
                    Operator::Contains => text.contains(value.as_str()),
                    Operator::Empty => text.is_empty(),
                }
            }
            Self::Number { path, equal, value } => {
                (find(item, path).and_then(Value::as_i64).unwrap_or_default() == *value) == *equal
            }
            Self::Bool { path, equal, value } => {
                (find(item, path).and_then(Value::as_bool).unwrap_or_default() == *value) == *equal
            }
            Self::Collection { path, test, value } => match (find(item, path), test) {
                (Some(Value::Array(list)), Operator::Empty) => list.is_empty(),
                (Some(Value::Object(map)), Operator::Empty) => map.is_empty(),
                (Some(Value::Array(list)), _) => list.iter().any(|item| item.as_str() == Some(value)),
                (Some(Value::Object(map)), _) => map.contains_key(value),
                (_, test) => *test == Operator::Empty,
            },
        }
    }

    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Or(left, right) | Self::And(left, right) => 1 + left.depth().max(right.depth()),
            Self::Not(inner) => 1 + inner.depth(),
            Self::Text { .. } | Self::Number { .. } | Self::Bool { .. } | Self::Collection { .. } => 1,
        }
    }
}

/// Marks, as a last empty part that no selector has, a path that ends inside a map.
fn is_map_key(path: &[String]) -> bool {
    path.last().is_some_and(String::is_empty)
}

fn find<'a>(item: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().filter(|part| !part.is_empty()).try_fold(item, |value, part| value.get(part))
}

fn bind_match(mut path: Vec<String>, operator: Operator, value: String, schema: Schema) -> Result<Node, FilterError> {
    let selector = path.join(".");
    let refused = |operator| FilterError::Operator { selector: selector.clone(), operator };
    let name = match operator {
        Operator::Equal => "Equal",
        Operator::NotEqual => "Not Equal",
        Operator::Contains => "In",
        Operator::Empty => "Is Empty",
    };
    match resolve(&path, schema) {
        None | Some(Resolved::Field(Type::Object(_))) => Err(FilterError::Selector(selector)),
        Some(Resolved::MapKey) => {
            path.push(String::new());
            Ok(Node::Text { path, test: operator, value })
        }
        Some(Resolved::Field(Type::Text)) => Ok(Node::Text { path, test: operator, value }),
        Some(Resolved::Field(Type::List | Type::Map)) => match operator {
            Operator::Contains | Operator::Empty => Ok(Node::Collection { path, test: operator, value }),
            Operator::Equal | Operator::NotEqual => Err(refused(name)),
        },
        Some(Resolved::Field(kind @ (Type::Number | Type::Bool))) => {
            if !matches!(operator, Operator::Equal | Operator::NotEqual) {
                return Err(refused(name));
            }
            let equal = operator == Operator::Equal;
            let unread = || FilterError::Value { selector: selector.clone(), value: value.clone() };
            if kind == Type::Number {
                let value = value.parse().map_err(|_| unread())?;
                Ok(Node::Number { path, equal, value })
            } else {
                let value = value.parse().map_err(|_| unread())?;
                Ok(Node::Bool { path, equal, value })
            }
        }
    }
}

enum Resolved {
    Field(Type),
    MapKey,
}

fn resolve(path: &[String], schema: Schema) -> Option<Resolved> {
    let (first, rest) = path.split_first()?;
    let (_, kind) = schema.iter().find(|(name, _)| name == first)?;
    match (kind, rest) {
        (kind, []) => Some(Resolved::Field(*kind)),
        (Type::Object(schema), rest) => resolve(rest, schema),
        (Type::Map, [_]) => Some(Resolved::MapKey),
        _ => None,
    }
}
