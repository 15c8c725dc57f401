//! Text with parts that only an allocation knows: `http://${NOMAD_UPSTREAM_ADDR_count_api}/`.
//!
//! `${var.x}`, `${local.x}` and function calls are gone when a job is parsed; what is left refers to the task's
//! environment (`NOMAD_…`, `env["X"]`) or to the node (`node.…`, `attr.…`, `meta.…`).

use crate::{Environment, MAX_VALUE};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A text with references. Neighbouring literals are joined, so equal texts are equal values.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Template(Vec<Part>);

/// One part of a [`Template`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Part {
    /// Stands for itself.
    Literal(String),
    /// What stands between `${` and `}`: `NOMAD_ALLOC_ID`, `env["HOME"]`, `node.unique.name`, `meta.rack`.
    Reference {
        /// The text between the braces, without blanks.
        #[serde(rename = "ref")]
        name: String,
    },
}

/// Why a text could not be made for an allocation.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TemplateError {
    /// Neither the allocation nor its node has this value.
    #[error("{field} {template:?} refers to ${{{reference}}}, which this allocation does not have")]
    Unresolved {
        /// Which field holds the text, for example `service name`.
        field: &'static str,
        /// The text as written.
        template: String,
        /// The unknown reference.
        reference: String,
    },
    /// Longer than any process could be given.
    #[error("{field} would be longer than {MAX_VALUE} bytes")]
    TooLong {
        /// Which field holds the text.
        field: &'static str,
    },
}

impl Template {
    /// A text without references.
    #[must_use]
    pub fn literal(text: impl Into<String>) -> Self {
        let mut template = Self::default();
        template.push_str(&text.into());
        template
    }

    /// A single reference, for example `NOMAD_ALLOC_INDEX`.
    #[must_use]
    pub fn reference(name: impl Into<String>) -> Self {
        Self(vec![Part::Reference { name: name.into() }])
    }

    /// The parts in order; no two literals follow each other and none is empty.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.0
    }

    /// The whole text if it holds no reference.
    #[must_use]
    pub fn as_literal(&self) -> Option<&str> {
        match self.0.as_slice() {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// What it refers to, in order.
    pub fn references(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Literal(_) => None,
            Part::Reference { name } => Some(name.as_str()),
        })
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes that the parts hold: what a limit on memory has to count.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0
            .iter()
            .map(|part| match part {
                Part::Literal(text) | Part::Reference { name: text } => text.len(),
            })
            .sum()
    }

    /// Adds text at the end.
    pub fn push_str(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        if let Some(Part::Literal(last)) = self.0.last_mut() {
            last.push_str(text);
        } else {
            self.0.push(Part::Literal(text.to_owned()));
        }
    }

    /// Adds all parts of `other` at the end.
    pub fn append(&mut self, other: &Template) {
        for part in &other.0 {
            match part {
                Part::Literal(text) => self.push_str(text),
                Part::Reference { .. } => self.0.push(part.clone()),
            }
        }
    }

    /// The text in `environment`; what it does not know stays as written, as Nomad does in task environments.
    ///
    /// # Errors
    /// [`TemplateError::TooLong`] beyond [`MAX_VALUE`]: a short text can refer to a long value many times.
    pub fn render(&self, field: &'static str, environment: &Environment) -> Result<String, TemplateError> {
        let mut out = String::new();
        for part in &self.0 {
            let pieces = match part {
                Part::Literal(text) => [text.as_str(), "", ""],
                Part::Reference { name } => match environment.lookup(name) {
                    Some(value) => [value, "", ""],
                    None => ["${", name, "}"],
                },
            };
            if out.len() + pieces.iter().map(|piece| piece.len()).sum::<usize>() > MAX_VALUE {
                return Err(TemplateError::TooLong { field });
            }
            out.extend(pieces);
        }
        Ok(out)
    }

    /// As [`Template::render`], for fields where a name left unresolved would register nonsense.
    ///
    /// # Errors
    /// [`TemplateError::Unresolved`] names `field` and the reference that `environment` does not have; else as `render`.
    pub fn render_strict(&self, field: &'static str, environment: &Environment) -> Result<String, TemplateError> {
        match self.references().find(|name| environment.lookup(name).is_none()) {
            None => self.render(field, environment),
            Some(reference) => {
                Err(TemplateError::Unresolved { field, template: self.to_string(), reference: reference.to_owned() })
            }
        }
    }

    /// Replaces references that `known` has by their text.
    pub(crate) fn substitute<'a>(&self, known: impl Fn(&str) -> Option<&'a str>) -> Template {
        let mut out = Template::default();
        for part in &self.0 {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Reference { name } => match known(name) {
                    Some(text) => out.push_str(text),
                    None => out.0.push(part.clone()),
                },
            }
        }
        out
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.0 {
            match part {
                Part::Literal(text) => f.write_str(text)?,
                Part::Reference { name } => write!(f, "${{{name}}}")?,
            }
        }
        Ok(())
    }
}

impl From<&str> for Template {
    /// A literal.
    fn from(text: &str) -> Self {
        Self::literal(text)
    }
}

/// What a reference points at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Target<'a> {
    /// A variable of the task's environment.
    Variable(&'a str),
    /// A property of the node: `node.…`, `attr.…`, `meta.…`.
    Node(&'a str),
}

/// Reads the text between `${` and `}`.
pub(crate) fn target(reference: &str) -> Target<'_> {
    if let Some(name) = reference.strip_prefix("env[\"").and_then(|rest| rest.strip_suffix("\"]")) {
        return Target::Variable(name);
    }
    match reference.split_once('.') {
        Some(("env", name)) => Target::Variable(name),
        Some(_) => Target::Node(reference),
        None => Target::Variable(reference),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_json() {
        let mut template = Template::literal("cost: $");
        template.append(&Template::reference("NOMAD_ALLOC_INDEX"));
        template.push_str("/${literal}");
        let json = serde_json::to_string(&template).expect("serialise");
        assert_eq!(json, r#"["cost: $",{"ref":"NOMAD_ALLOC_INDEX"},"/${literal}"]"#);
        assert_eq!(serde_json::from_str::<Template>(&json).expect("read back"), template);
    }

    #[test]
    fn references_point_at_the_environment_or_the_node() {
        assert_eq!(target("NOMAD_ALLOC_ID"), Target::Variable("NOMAD_ALLOC_ID"));
        assert_eq!(target("env[\"HOME\"]"), Target::Variable("HOME"));
        assert_eq!(target("env.HOME"), Target::Variable("HOME"));
        assert_eq!(target("attr.kernel.name"), Target::Node("attr.kernel.name"));
    }
}
