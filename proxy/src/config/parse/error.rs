//! Where in a resource something is wrong, and what.

use std::fmt;

/// Why a resource is refused: the path of the field inside it, and what is wrong with it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{path}{}{problem}", if path.is_empty() { "" } else { ": " })]
pub struct ResourceError {
    /// For example `filter_chains[0].filters[1].idle_timeout`; empty if it is about the resource as a whole.
    pub path: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What can be wrong with a field.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Problem {
    /// It would change behaviour, and culvert does not do it.
    #[error("not supported by culvert")]
    Unsupported,
    /// It has to be there.
    #[error("missing")]
    Missing,
    /// It cannot be what was meant.
    #[error("{0}")]
    Invalid(String),
    /// It is larger than culvert accepts.
    #[error("more than {limit} {unit}")]
    TooMany {
        /// What is counted.
        unit: &'static str,
        /// The limit.
        limit: usize,
    },
}

/// A field's place in a resource, kept on the stack: text is made of it only when something is wrong.
#[derive(Clone, Copy)]
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    name: &'a str,
    index: Option<usize>,
}

impl<'a> Path<'a> {
    pub(super) const ROOT: Path<'static> = Path { parent: None, name: "", index: None };

    pub(super) fn field(&'a self, name: &'a str) -> Path<'a> {
        Path { parent: Some(self), name, index: None }
    }

    pub(super) fn item(&'a self, name: &'a str, index: usize) -> Path<'a> {
        Path { parent: Some(self), name, index: Some(index) }
    }

    pub(super) fn unsupported(&self) -> ResourceError {
        self.error(Problem::Unsupported)
    }

    pub(super) fn missing(&self) -> ResourceError {
        self.error(Problem::Missing)
    }

    pub(super) fn invalid(&self, what: impl fmt::Display) -> ResourceError {
        self.error(Problem::Invalid(what.to_string()))
    }

    pub(super) fn too_many(&self, unit: &'static str, limit: usize) -> ResourceError {
        self.error(Problem::TooMany { unit, limit })
    }

    fn error(&self, problem: Problem) -> ResourceError {
        ResourceError { path: self.to_string(), problem }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
            if parent.parent.is_some() {
                f.write_str(".")?;
            }
        }
        f.write_str(self.name)?;
        self.index.map_or(Ok(()), |index| write!(f, "[{index}]"))
    }
}
