//! JSON objects read field by field: nothing in them is overlooked.

use std::fmt;

use serde_json::{Map, Value};

use super::file::BootstrapError;

/// An object of which fields are taken until none is left; [`Object::finish`] refuses the rest by name.
pub(super) struct Object {
    path: String,
    fields: Map<String, Value>,
}

impl Object {
    /// The outermost object.
    pub(super) fn root(value: Value) -> Result<Self, BootstrapError> {
        Self::new(String::new(), value)
    }

    pub(super) fn new(path: String, value: Value) -> Result<Self, BootstrapError> {
        match value {
            Value::Object(fields) => Ok(Self { path, fields }),
            _ => Err(BootstrapError::field(path, "must be an object")),
        }
    }

    /// Where this object is.
    pub(super) fn at(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    pub(super) fn error(&self, field: &str, problem: impl fmt::Display) -> BootstrapError {
        BootstrapError::field(self.at(field), problem)
    }

    /// Takes a field by its snake case name, in either spelling. `null` is absence.
    pub(super) fn take(&mut self, field: &str) -> Result<Option<Value>, BootstrapError> {
        let camel = camel_case(field);
        let snake = self.fields.shift_remove(field);
        let other = if camel == field { None } else { self.fields.shift_remove(&camel) };
        match (snake, other) {
            (Some(_), Some(_)) => Err(self.error(field, format!("given twice, also as {camel}"))),
            (value, other) => Ok(value.or(other).filter(|value| !value.is_null())),
        }
    }

    /// Takes fields whose value has no effect here.
    pub(super) fn ignore(&mut self, fields: &[&str]) -> Result<(), BootstrapError> {
        fields.iter().try_for_each(|field| self.take(field).map(drop))
    }

    pub(super) fn object(&mut self, field: &str) -> Result<Option<Self>, BootstrapError> {
        self.take(field)?.map(|value| Self::new(self.at(field), value)).transpose()
    }

    pub(super) fn required_object(&mut self, field: &str) -> Result<Self, BootstrapError> {
        self.object(field)?.ok_or_else(|| self.error(field, "missing"))
    }

    pub(super) fn text(&mut self, field: &str) -> Result<Option<String>, BootstrapError> {
        match self.take(field)? {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(field, "must be a string")),
        }
    }

    pub(super) fn required_text(&mut self, field: &str) -> Result<String, BootstrapError> {
        self.text(field)?.filter(|text| !text.is_empty()).ok_or_else(|| self.error(field, "missing"))
    }

    /// Takes a text that can have only one value here.
    pub(super) fn expect_text(&mut self, field: &str, expected: &str) -> Result<(), BootstrapError> {
        match self.required_text(field)? {
            text if text == expected => Ok(()),
            _ => Err(self.error(field, format!("must be {expected:?}"))),
        }
    }

    /// Takes a list of objects; a single object counts as a list of one, as protobuf's JSON is lenient about it.
    pub(super) fn list(&mut self, field: &str) -> Result<Vec<Self>, BootstrapError> {
        let values = match self.take(field)? {
            None => Vec::new(),
            Some(Value::Array(values)) => values,
            Some(object @ Value::Object(_)) => vec![object],
            Some(_) => return Err(self.error(field, "must be a list")),
        };
        let at = self.at(field);
        values.into_iter().enumerate().map(|(index, value)| Self::new(format!("{at}[{index}]"), value)).collect()
    }

    /// The only element of a list.
    pub(super) fn only(&mut self, field: &str) -> Result<Self, BootstrapError> {
        let list = self.list(field)?;
        let count = list.len();
        let mut list = list.into_iter();
        match (list.next(), count) {
            (Some(only), 1) => Ok(only),
            _ => Err(self.error(field, format!("must have exactly one element, not {count}"))),
        }
    }

    /// Everything that is left.
    pub(super) fn rest(self) -> Map<String, Value> {
        self.fields
    }

    /// Refuses what was not taken.
    pub(super) fn finish(self) -> Result<(), BootstrapError> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(field) => Err(self.error(field, "not supported by culvert")),
        }
    }
}

/// `load_assignment` as `loadAssignment`.
fn camel_case(snake: &str) -> String {
    let mut words = snake.split('_');
    let mut camel = words.next().unwrap_or_default().to_owned();
    for word in words {
        let mut letters = word.chars();
        camel.extend(letters.next().map(|letter| letter.to_ascii_uppercase()));
        camel.push_str(letters.as_str());
    }
    camel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_two_spellings() {
        assert_eq!(camel_case("http2_protocol_options"), "http2ProtocolOptions");
        assert_eq!(camel_case("name"), "name");
    }
}
