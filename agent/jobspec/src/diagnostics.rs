//! Errors with their place: what, where, and what to do, printed as HCL's own tools do.

use serde::{Deserialize, Serialize};
use std::fmt;

/// At most this many errors are kept of one file; more are only counted.
pub const MAX_DIAGNOSTICS: usize = 50;

/// At most this many bytes of a source line are kept and shown.
pub const MAX_SNIPPET: usize = 200;

/// A place in a job file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Location {
    /// The file as the user named it.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// How many characters of `text` are meant, at least 1.
    pub width: usize,
    /// The line, without its end; cut to [`MAX_SNIPPET`] bytes.
    pub text: String,
}

impl Location {
    /// The place of `span` (bytes) in `source`.
    #[must_use]
    pub fn new(file: &str, source: &str, span: std::ops::Range<usize>) -> Self {
        let start = floor_boundary(source, span.start);
        let line_start = source[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = source[start..].find('\n').map_or(source.len(), |at| start + at);
        let line = source[..start].bytes().filter(|byte| *byte == b'\n').count() + 1;
        let text = source[line_start..line_end].trim_end_matches('\r');
        let column = source[line_start..start].chars().count() + 1;
        let end = floor_boundary(source, span.end).clamp(start, line_end);
        let width = source[start..end].trim_end().chars().count().max(1);
        let text = text[..floor_boundary(text, MAX_SNIPPET)].to_owned();
        Self { file: file.to_owned(), line, column, width, text }
    }
}

/// The largest character boundary of `text` that is not after `at`.
fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, .. } = self;
        writeln!(f, "  on {file} line {line}, column {column}:")?;
        let number = format!("{line:>4}");
        // A tab would move the caret: both lines show it as one blank.
        writeln!(f, "{number}: {}", self.text.replace(['\t', '\r'], " "))?;
        let shown = self.text.chars().count();
        if *column > shown + 1 {
            return Ok(());
        }
        let width = self.width.min((shown + 1 - column).max(1));
        writeln!(f, "{:indent$}{}", "", "^".repeat(width), indent = number.len() + 2 + column - 1)
    }
}

/// One error in a job.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Diagnostic {
    /// What is wrong, in one sentence.
    pub message: String,
    /// Where; `None` for what no line holds (a `-var` option, a file that is too large).
    pub location: Option<Location>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Error: {}", self.message)?;
        if let Some(location) = &self.location {
            write!(f, "\n{location}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}\n")?;
        }
        Ok(())
    }
}

/// Why a job file was refused: one or more errors, in the order of the file.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
pub struct Diagnostics {
    errors: Vec<Diagnostic>,
    omitted: usize,
}

impl Diagnostics {
    /// A single error.
    #[must_use]
    pub fn single(error: Diagnostic) -> Self {
        Self { errors: vec![error], omitted: 0 }
    }

    /// Adds an error; after [`MAX_DIAGNOSTICS`] it is only counted.
    pub fn push(&mut self, error: Diagnostic) {
        if self.errors.len() < MAX_DIAGNOSTICS {
            self.errors.push(error);
        } else {
            self.omitted += 1;
        }
    }

    /// The errors that were kept.
    #[must_use]
    pub fn errors(&self) -> &[Diagnostic] {
        &self.errors
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// Counts errors that were not kept.
    pub(crate) fn omit(&mut self, count: usize) {
        self.omitted += count;
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        if self.omitted > 0 {
            writeln!(f, "\n… and {} more errors", self.omitted)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prints_as_hcl_tools_do() {
        let source = "job \"x\" {\n  colour = 1\n}\n";
        let error = Diagnostic {
            message: "unsupported".into(),
            location: Some(Location::new("a.nomad.hcl", source, 12..18)),
            hint: Some("say count".into()),
        };
        let expected = "Error: unsupported\n\n  on a.nomad.hcl line 2, column 3:\n   2:   colour = 1\n        ^^^^^^\n\n  hint: say count\n";
        assert_eq!(Diagnostics::single(error).to_string(), expected);
    }

    proptest! {
        #[test]
        fn any_span_of_any_text_can_be_shown(source in "[a-zµ€\n\r\t ]{0,300}", start in 0usize..400, len in 0usize..400) {
            let location = Location::new("f", &source, start..start + len);
            prop_assert!(location.line >= 1 && location.column >= 1 && location.width >= 1);
            let _ = location.to_string();
        }
    }
}
