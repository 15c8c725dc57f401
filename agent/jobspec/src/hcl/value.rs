//! Values of expressions.

use crate::Template;
use hcl_edit::Number;
use std::collections::BTreeMap;

/// What an expression yields. Strings may hold references that only an allocation resolves.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(Number),
    Text(Template),
    List(Vec<Value>),
    Map(BTreeMap<String, Value>),
}

impl Value {
    /// How errors call it.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a bool",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }

    /// Bytes of memory that it holds, roughly.
    pub(crate) fn size(&self) -> usize {
        let held = match self {
            Self::Null | Self::Bool(_) | Self::Number(_) => 0,
            Self::Text(text) => text.size(),
            Self::List(items) => items.iter().map(Self::size).sum(),
            Self::Map(items) => items.iter().map(|(key, value)| size_of::<String>() + key.len() + value.size()).sum(),
        };
        size_of::<Self>() + held
    }

    /// Collections inside collections; 0 for a value that is none.
    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::Null | Self::Bool(_) | Self::Number(_) | Self::Text(_) => 0,
            Self::List(items) => 1 + items.iter().map(Self::depth).max().unwrap_or(0),
            Self::Map(items) => 1 + items.values().map(Self::depth).max().unwrap_or(0),
        }
    }

    /// For free-form configuration that travels as JSON. `Err` names the kind of value that JSON text cannot carry.
    pub(crate) fn to_json(&self) -> Result<serde_json::Value, &'static str> {
        Ok(match self {
            Self::Null => serde_json::Value::Null,
            Self::Bool(value) => (*value).into(),
            Self::Number(number) => number_to_json(number),
            Self::Text(text) => match text.as_literal() {
                Some(text) => text.into(),
                None => return Err("a string that is known only when an allocation runs"),
            },
            Self::List(items) => items.iter().map(Self::to_json).collect::<Result<Vec<_>, _>>()?.into(),
            Self::Map(items) => {
                let mut map = serde_json::Map::new();
                for (key, value) in items {
                    map.insert(key.clone(), value.to_json()?);
                }
                serde_json::Value::Object(map)
            }
        })
    }
}

fn number_to_json(number: &Number) -> serde_json::Value {
    if let Some(number) = number.as_u64() {
        number.into()
    } else if let Some(number) = number.as_i64() {
        number.into()
    } else {
        number.as_f64().into()
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(Template::literal(text))
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(Template::literal(text))
    }
}
