//! HCL2 expressions: values, evaluation, functions, type constraints.
//!
//! Everything that a file can make grow is limited: its size and nesting by [`crate::MAX_SOURCE`] and the parser, the
//! work and memory of evaluation by [`Budget`], so that a hostile file costs a bounded amount and never the process.

mod convert;
mod eval;
mod format;
mod functions;
mod operate;
mod strings;
mod traverse;
mod value;

pub(crate) use convert::{Type, to_bool, to_integer, to_text};
pub(crate) use eval::{Budget, Scope};
pub(crate) use value::Value;

use std::ops::Range;

/// An error at a place of the job file; it becomes a [`crate::Diagnostic`] when the source is at hand.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) span: Option<Range<usize>>,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Problem {
    pub(crate) fn new(span: Option<Range<usize>>, message: impl Into<String>) -> Self {
        Self { span, message: message.into(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
