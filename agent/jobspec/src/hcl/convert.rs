//! Conversions between values, and the type constraints of `variable` blocks.

use super::{Problem, Value};
use crate::Template;
use hcl_edit::expr::Expression;
use hcl_edit::{Number, Span as _};
use std::collections::{BTreeMap, HashSet};

/// A string from a string, number or bool, as HCL converts.
pub(crate) fn to_text(value: &Value) -> Option<Template> {
    match value {
        Value::Text(text) => Some(text.clone()),
        Value::Number(number) => Some(Template::literal(number.to_string())),
        Value::Bool(value) => Some(Template::literal(value.to_string())),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

/// A number from a number or a string of digits.
pub(crate) fn to_number(value: &Value) -> Option<Number> {
    match value {
        Value::Number(number) => Some(*number),
        Value::Text(text) => {
            let text = text.as_literal()?.trim();
            // Rust also reads "inf" and "nan", which HCL does not.
            let looks_like_one = text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
            if let (true, Ok(number)) = (looks_like_one, text.parse::<u64>()) {
                return Some(Number::from(number));
            }
            looks_like_one.then(|| text.parse().ok()).flatten().and_then(Number::from_f64)
        }
        _ => None,
    }
}

/// A whole number.
pub(crate) fn to_integer(value: &Value) -> Option<i64> {
    to_number(value)?.as_i64()
}

/// A bool from a bool or one of the words.
pub(crate) fn to_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::Text(text) => match text.as_literal()? {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// `type` of a variable.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Type {
    Any,
    Text,
    Number,
    Bool,
    List(Box<Type>),
    Set(Box<Type>),
    Map(Box<Type>),
    Tuple(Vec<Type>),
    Object(BTreeMap<String, Type>),
}

const TYPES: &str = "string, number, bool, any, list(…), set(…), map(…), tuple([…]) or object({…})";

impl Type {
    /// Reads a type expression, for example `list(string)`.
    pub(crate) fn read(expression: &Expression) -> Result<Self, Problem> {
        let wrong = |what: &str| {
            Problem::new(expression.span(), format!("{what} is not a type")).hint(format!("a type is {TYPES}"))
        };
        match expression {
            Expression::Variable(name) => match name.as_str() {
                "string" => Ok(Self::Text),
                "number" => Ok(Self::Number),
                "bool" => Ok(Self::Bool),
                "any" => Ok(Self::Any),
                "list" => Ok(Self::List(Box::new(Self::Any))),
                "map" => Ok(Self::Map(Box::new(Self::Any))),
                "set" => Ok(Self::Set(Box::new(Self::Any))),
                other => Err(wrong(&format!("{other:?}"))),
            },
            Expression::FuncCall(call) if !call.name.is_namespaced() && call.args.len() == 1 => {
                let argument = call.args.get(0).ok_or_else(|| wrong("an empty call"))?;
                match (call.name.name.as_str(), argument) {
                    ("list", item) => Ok(Self::List(Box::new(Self::read(item)?))),
                    ("set", item) => Ok(Self::Set(Box::new(Self::read(item)?))),
                    ("map", item) => Ok(Self::Map(Box::new(Self::read(item)?))),
                    ("tuple", Expression::Array(items)) => {
                        Ok(Self::Tuple(items.iter().map(Self::read).collect::<Result<_, _>>()?))
                    }
                    ("object", Expression::Object(items)) => {
                        let mut fields = BTreeMap::new();
                        for (key, value) in items.iter() {
                            let key = key.as_ident().ok_or_else(|| wrong("an object with a computed key"))?;
                            fields.insert(key.to_string(), Self::read(value.expr())?);
                        }
                        Ok(Self::Object(fields))
                    }
                    (name, _) => Err(wrong(&format!("{name:?} of this argument"))),
                }
            }
            Expression::String(text) => {
                Err(wrong(&format!("{:?} in quotes", text.as_str())).hint("write the type without quotes"))
            }
            _ => Err(wrong("this expression")),
        }
    }

    /// Converts `value`; `Err` says what was expected.
    pub(crate) fn convert(&self, value: Value) -> Result<Value, String> {
        let found = value.kind();
        let wrong = |wanted: &str| format!("{wanted} is required, but this is {found}");
        if value == Value::Null {
            return Ok(value);
        }
        match (self, value) {
            (Self::Any, value) => Ok(value),
            (Self::Text, value) => to_text(&value).map(Value::Text).ok_or_else(|| wrong("a string")),
            (Self::Number, value) => to_number(&value).map(Value::Number).ok_or_else(|| wrong("a number")),
            (Self::Bool, value) => to_bool(&value).map(Value::Bool).ok_or_else(|| wrong("a bool")),
            (Self::List(item), Value::List(items)) => {
                Ok(Value::List(items.into_iter().map(|value| item.convert(value)).collect::<Result<_, _>>()?))
            }
            (Self::Set(item), Value::List(items)) => {
                // The printed form is the key: comparing each with each takes too long for a large hostile list.
                let mut seen = HashSet::new();
                let mut distinct = Vec::new();
                for value in items {
                    let value = item.convert(value)?;
                    if seen.insert(format!("{value:?}")) {
                        distinct.push(value);
                    }
                }
                Ok(Value::List(distinct))
            }
            (Self::List(_) | Self::Set(_), _) => Err(wrong("a list")),
            (Self::Tuple(types), Value::List(items)) if types.len() == items.len() => {
                let pairs = types.iter().zip(items);
                Ok(Value::List(pairs.map(|(item, value)| item.convert(value)).collect::<Result<_, _>>()?))
            }
            (Self::Tuple(types), _) => Err(wrong(&format!("a tuple of {} elements", types.len()))),
            (Self::Map(item), Value::Map(items)) => {
                let entry = |(key, value)| Ok((key, item.convert(value)?));
                Ok(Value::Map(items.into_iter().map(entry).collect::<Result<_, String>>()?))
            }
            (Self::Object(fields), Value::Map(mut items)) => {
                let mut out = BTreeMap::new();
                for (key, item) in fields {
                    let value = items.remove(key).ok_or_else(|| format!("attribute {key:?} is required"))?;
                    out.insert(
                        key.clone(),
                        item.convert(value).map_err(|error| format!("attribute {key:?}: {error}"))?,
                    );
                }
                Ok(Value::Map(out))
            }
            (Self::Map(_) | Self::Object(_), _) => Err(wrong("a map")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_rust_reads_as_numbers_are_strings_in_hcl() {
        for text in ["inf", "nan", "infinity", "", "0x10", "1_000", "e"] {
            assert_eq!(to_number(&text.into()), None, "{text}");
        }
        assert_eq!(to_integer(&" 42 ".into()), Some(42));
        assert_eq!(to_integer(&"-3".into()), Some(-3));
        assert_eq!(to_integer(&"1.5".into()), None);
    }
}
