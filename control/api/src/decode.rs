//! Reads JSON the way Consul does, for every body alike.
//!
//! Rules: a key matches a field in any letter case and with underscores between words (`TaggedAddresses`,
//! `taggedaddresses`, `tagged_addresses`); of keys that mean the same field the last one wins; `null` leaves the zero value;
//! an unknown key is refused by name. It is a serde deserializer over `serde_json::Value`: serde tells it the field list of
//! each structure, so the rules are written once and no type knows about them. Keys of maps (`Meta`, `Config`) stay as sent.

use std::fmt;

use serde::de::value::{BorrowedStrDeserializer, StringDeserializer};
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::Value;

/// Why a body was refused. Prints what follows `Request decode failed: ` in Consul's answers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DecodeError {
    /// Not JSON, or more than one value.
    Syntax(String),
    /// A key that the structure does not have.
    UnknownField {
        /// The key as sent.
        name: String,
    },
    /// A value of the wrong type or outside its range.
    Value {
        /// Where, for example `Connect.SidecarService.Port`; empty for the body itself.
        path: String,
        /// What is wrong.
        message: String,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(message) => f.write_str(message),
            Self::UnknownField { name } => write!(f, "json: unknown field {name:?}"),
            Self::Value { path, message } if path.is_empty() => write!(f, "json: {message}"),
            Self::Value { path, message } => write!(f, "json: {path}: {message}"),
        }
    }
}

impl std::error::Error for DecodeError {}

impl de::Error for DecodeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Value { path: String::new(), message: message.to_string() }
    }
}

impl From<DecodeError> for crate::ApiError {
    fn from(error: DecodeError) -> Self {
        Self::bad_request(format_args!("Request decode failed: {error}"))
    }
}

/// Decodes a request body; unknown keys are refused.
///
/// # Errors
/// [`DecodeError`] naming the key or the place.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    T::deserialize(Wire { value: parse(body)?, unknown: Unknown::Refuse })
}

/// Decodes an answer: keys that this version does not know are skipped, everything else as in [`decode`].
///
/// # Errors
/// [`DecodeError`] naming the place.
pub fn decode_known<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    T::deserialize(Wire { value: parse(body)?, unknown: Unknown::Skip })
}

/// [`decode`] for JSON that is already parsed.
///
/// # Errors
/// [`DecodeError`] naming the key or the place.
pub fn decode_value<T: DeserializeOwned>(value: Value) -> Result<T, DecodeError> {
    T::deserialize(Wire { value, unknown: Unknown::Refuse })
}

fn parse(body: &[u8]) -> Result<Value, DecodeError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(DecodeError::Syntax("EOF".to_owned())); // what Go's decoder says of an empty body
    }
    serde_json::from_slice(body).map_err(|error| DecodeError::Syntax(error.to_string()))
}

#[derive(Clone, Copy)]
enum Unknown {
    Refuse,
    Skip,
}

/// One JSON value on its way into a type.
struct Wire {
    value: Value,
    unknown: Unknown,
}

impl Wire {
    fn with(&self, value: Value) -> Self {
        Self { value, unknown: self.unknown }
    }

    fn refuse<T>(&self, expected: &dyn de::Expected) -> Result<T, DecodeError> {
        let unexpected = match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Number(_) => Unexpected::Other("number"),
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        };
        Err(de::Error::invalid_type(unexpected, expected))
    }
}

/// Does `key` name `field`? ASCII case is ignored, and so are single underscores between words.
fn names(key: &str, field: &str) -> bool {
    if key.eq_ignore_ascii_case(field) {
        return true;
    }
    let snake = !key.starts_with('_') && !key.ends_with('_') && !key.contains("__");
    snake && key.bytes().filter(|byte| *byte != b'_').map(|byte| byte.to_ascii_lowercase()).eq(lower(field))
}

fn lower(field: &str) -> impl Iterator<Item = u8> + '_ {
    field.bytes().filter(|byte| *byte != b'_').map(|byte| byte.to_ascii_lowercase())
}

/// The entries of an object under the names of the structure's fields, in the order of first appearance.
fn entries(wire: Wire, fields: &'static [&'static str]) -> Result<Vec<(&'static str, Wire)>, DecodeError> {
    let unknown = wire.unknown;
    let Value::Object(object) = wire.value else {
        return wire.refuse(&"an object");
    };
    let mut entries: Vec<(&'static str, Wire)> = Vec::with_capacity(object.len());
    for (key, value) in object {
        let exact = fields.iter().find(|field| **field == key);
        let Some(field) = exact.or_else(|| fields.iter().find(|field| names(&key, field))) else {
            match unknown {
                Unknown::Refuse => return Err(DecodeError::UnknownField { name: key }),
                Unknown::Skip => continue,
            }
        };
        if value.is_null() {
            continue;
        }
        match entries.iter_mut().find(|(name, _)| name == field) {
            Some((_, earlier)) => earlier.value = value,
            None => entries.push((field, Wire { value, unknown })),
        }
    }
    Ok(entries)
}

/// Puts `segment` before the place that `error` names.
fn within(segment: &str, error: DecodeError) -> DecodeError {
    match error {
        DecodeError::Value { path, message } if path.is_empty() => {
            DecodeError::Value { path: segment.to_owned(), message }
        }
        DecodeError::Value { path, message } => {
            let dot = if path.starts_with('[') { "" } else { "." };
            DecodeError::Value { path: format!("{segment}{dot}{path}"), message }
        }
        other => other,
    }
}

struct Fields {
    entries: std::vec::IntoIter<(&'static str, Wire)>,
    current: Option<(&'static str, Wire)>,
}

impl<'de> de::MapAccess<'de> for Fields {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DecodeError> {
        self.current = self.entries.next();
        let Some((field, _)) = &self.current else { return Ok(None) };
        seed.deserialize(BorrowedStrDeserializer::new(field)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, DecodeError> {
        let (field, wire) = self.current.take().expect("serde asks for a value only after a key");
        seed.deserialize(wire).map_err(|error| within(field, error))
    }
}

struct Entries {
    entries: serde_json::map::IntoIter,
    current: Option<(String, Value)>,
    unknown: Unknown,
}

impl<'de> de::MapAccess<'de> for Entries {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DecodeError> {
        self.current = self.entries.next();
        let Some((key, _)) = &self.current else { return Ok(None) };
        let key: StringDeserializer<DecodeError> = key.clone().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, DecodeError> {
        let (key, value) = self.current.take().expect("serde asks for a value only after a key");
        seed.deserialize(Wire { value, unknown: self.unknown }).map_err(|error| within(&key, error))
    }
}

struct Elements {
    elements: std::iter::Enumerate<std::vec::IntoIter<Value>>,
    unknown: Unknown,
}

impl<'de> de::SeqAccess<'de> for Elements {
    type Error = DecodeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, DecodeError> {
        let Some((index, value)) = self.elements.next() else { return Ok(None) };
        let element = seed.deserialize(Wire { value, unknown: self.unknown });
        element.map(Some).map_err(|error| within(&format!("[{index}]"), error))
    }
}

/// `null` where a scalar is asked for is Go's zero value.
macro_rules! null_is_zero {
    ($($method:ident => $zero:expr),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
            if self.value.is_null() { self.with($zero).deserialize_any(visitor) } else { self.deserialize_any(visitor) }
        }
    )*};
}

impl<'de> Deserializer<'de> for Wire {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        let unknown = self.unknown;
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(value), _, _) => visitor.visit_u64(value),
                (None, Some(value), _) => visitor.visit_i64(value),
                (None, None, Some(value)) => visitor.visit_f64(value),
                (None, None, None) => Err(de::Error::custom(format_args!("number {number} is out of range"))),
            },
            Value::String(text) => visitor.visit_string(text),
            Value::Array(elements) => {
                visitor.visit_seq(Elements { elements: elements.into_iter().enumerate(), unknown })
            }
            Value::Object(object) => visitor.visit_map(Entries { entries: object.into_iter(), current: None, unknown }),
        }
    }

    null_is_zero! {
        deserialize_bool => Value::Bool(false),
        deserialize_u8 => Value::from(0), deserialize_u16 => Value::from(0),
        deserialize_u32 => Value::from(0), deserialize_u64 => Value::from(0),
        deserialize_i8 => Value::from(0), deserialize_i16 => Value::from(0),
        deserialize_i32 => Value::from(0), deserialize_i64 => Value::from(0),
        deserialize_f32 => Value::from(0), deserialize_f64 => Value::from(0),
        deserialize_str => Value::from(""), deserialize_string => Value::from(""),
        deserialize_seq => Value::Array(Vec::new()),
        deserialize_map => Value::Object(serde_json::Map::new()),
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        let entries = if self.value.is_null() { Vec::new() } else { entries(self, fields)? };
        visitor.visit_map(Fields { entries: entries.into_iter(), current: None })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        let Value::String(variant) = self.value else {
            return self.refuse(&"a string");
        };
        let variant: StringDeserializer<DecodeError> = variant.into_deserializer();
        visitor.visit_enum(variant)
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}
