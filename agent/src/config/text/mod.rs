//! Reads configuration text: HCL 1, the literal part of HCL 2, and JSON, by one grammar.
//!
//! Consul's agent files are HCL 1: a block may stand inside an object in a list, values may follow `=` or a brace, objects may
//! be separated by commas or by lines. HCL 2 files for the agent and JSON are written in the same pieces, so one reader takes
//! them all. There are no expressions: `${…}` in a string stays as it is, as in Consul. Every node keeps its place.

use std::fmt;

/// Longest text that is read.
pub const MAX_TEXT: usize = 1024 * 1024;
/// Deepest nesting of lists and objects.
const MAX_DEPTH: usize = 32;

/// Line and column, both from 1; columns count characters.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Where a text stops making sense.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{place}: {message}")]
pub(super) struct TextError {
    /// Where.
    pub(super) place: Place,
    /// What was expected.
    pub(super) message: String,
}

/// A value and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// Its first character.
    pub(super) place: Place,
    /// What it is.
    pub(super) value: Value,
}

/// A value as written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// `null`
    Null,
    /// `true`, `false`
    Bool(bool),
    /// A whole number.
    Integer(i64),
    /// Any other number.
    Float(f64),
    /// A string or heredoc.
    Text(String),
    /// `[…]`
    List(Vec<Node>),
    /// `{…}` or the body of a block, in the order of the text; keys may repeat.
    Object(Vec<Entry>),
}

impl Value {
    /// What it is, for messages.
    #[must_use]
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "a block",
        }
    }
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// The name.
    pub(super) key: String,
    /// Where the name begins.
    pub(super) place: Place,
    /// Its value.
    pub(super) node: Node,
}

/// Reads a whole text.
///
/// # Errors
/// [`TextError`] with the place and what was expected there.
pub(super) fn read(text: &str) -> Result<Vec<Entry>, TextError> {
    let mut reader = Reader { rest: text, place: Place { line: 1, column: 1 }, depth: 0 };
    if text.len() > MAX_TEXT {
        return Err(reader.error(format!("the text is longer than {MAX_TEXT} bytes")));
    }
    reader.blanks()?;
    let braces = reader.take('{');
    let entries = reader.entries(braces.then_some('}'))?;
    reader.blanks()?;
    match reader.peek() {
        None => Ok(entries),
        Some(found) => Err(reader.error(format!("expected the end of the text, found {found:?}"))),
    }
}

struct Reader<'a> {
    rest: &'a str,
    place: Place,
    depth: usize,
}

impl Reader<'_> {
    fn error(&self, message: String) -> TextError {
        TextError { place: self.place, message }
    }

    fn unexpected(&self, wanted: &str) -> TextError {
        match self.peek() {
            Some(found) => self.error(format!("expected {wanted}, found {found:?}")),
            None => self.error(format!("expected {wanted}, found the end of the text")),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.rest = &self.rest[next.len_utf8()..];
        if next == '\n' {
            self.place = Place { line: self.place.line + 1, column: 1 };
        } else {
            self.place.column += 1;
        }
        Some(next)
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.next();
        }
        found
    }

    /// Skips blanks, line ends and comments.
    fn blanks(&mut self) -> Result<(), TextError> {
        loop {
            if self.rest.starts_with('#') || self.rest.starts_with("//") {
                while self.peek().is_some_and(|next| next != '\n') {
                    self.next();
                }
            } else if self.rest.starts_with("/*") {
                let open = self.place;
                while !self.rest.starts_with("*/") {
                    if self.next().is_none() {
                        return Err(TextError { place: open, message: "this comment has no end".to_owned() });
                    }
                }
                self.next();
                self.next();
            } else if self.peek().is_some_and(char::is_whitespace) || self.rest.starts_with('\u{feff}') {
                self.next();
            } else {
                return Ok(());
            }
        }
    }

    /// Entries up to `close`, or to the end of the text.
    fn entries(&mut self, close: Option<char>) -> Result<Vec<Entry>, TextError> {
        let mut entries = Vec::new();
        loop {
            self.blanks()?;
            match (self.peek(), close) {
                (None, None) => return Ok(entries),
                (Some(next), Some(close)) if next == close => {
                    self.next();
                    return Ok(entries);
                }
                _ => entries.push(self.entry()?),
            }
            self.blanks()?;
            self.take(',');
        }
    }

    /// `key = value`, `"key": value`, `key { … }` or `key "label" { … }`.
    fn entry(&mut self) -> Result<Entry, TextError> {
        let place = self.place;
        let key = self.key()?;
        self.blanks()?;
        if self.take('=') || self.take(':') {
            self.blanks()?;
            return Ok(Entry { key, place, node: self.value()? });
        }
        let node = match self.peek() {
            Some('{') => self.value()?,
            Some('"') => {
                // A labelled block is an object with the label as its only key.
                let label = self.nested(Self::entry)?;
                Node { place: label.place, value: Value::Object(vec![label]) }
            }
            _ => return Err(self.unexpected("\"=\" or a block")),
        };
        Ok(Entry { key, place, node })
    }

    fn key(&mut self) -> Result<String, TextError> {
        match self.peek() {
            Some('"') => self.quoted(),
            Some(first) if first.is_alphabetic() || first == '_' => Ok(self.word()),
            _ => Err(self.unexpected("a key")),
        }
    }

    fn word(&mut self) -> String {
        let end = self.rest.find(|next: char| !(next.is_alphanumeric() || matches!(next, '_' | '-' | '.')));
        let word = self.rest[..end.unwrap_or(self.rest.len())].to_owned();
        for _ in word.chars() {
            self.next();
        }
        word
    }

    /// Runs `inner` one level deeper.
    fn nested<T>(&mut self, inner: impl FnOnce(&mut Self) -> Result<T, TextError>) -> Result<T, TextError> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn value(&mut self) -> Result<Node, TextError> {
        let place = self.place;
        let value = match self.peek() {
            Some('"') => Value::Text(self.quoted()?),
            Some('[') => self.nested(Self::list)?,
            Some('{') => {
                self.next();
                Value::Object(self.nested(|reader| reader.entries(Some('}')))?)
            }
            Some('<') if self.rest.starts_with("<<") => Value::Text(self.heredoc()?),
            Some(first) if first.is_ascii_digit() || first == '-' => self.number()?,
            Some(first) if first.is_alphabetic() => match self.word().as_str() {
                "true" => Value::Bool(true),
                "false" => Value::Bool(false),
                "null" => Value::Null,
                word => {
                    let message = format!("expected a value, found {word:?}: strings stand in quotes");
                    return Err(TextError { place, message });
                }
            },
            _ => return Err(self.unexpected("a value")),
        };
        Ok(Node { place, value })
    }

    fn list(&mut self) -> Result<Value, TextError> {
        self.next();
        let mut elements = Vec::new();
        loop {
            self.blanks()?;
            if self.take(']') {
                return Ok(Value::List(elements));
            }
            elements.push(self.value()?);
            self.blanks()?;
            if !self.take(',') && self.peek() != Some(']') {
                return Err(self.unexpected("\",\" or \"]\""));
            }
        }
    }

    fn number(&mut self) -> Result<Value, TextError> {
        let place = self.place;
        let end = self.rest.find(|next: char| !(next.is_ascii_alphanumeric() || matches!(next, '-' | '+' | '.')));
        let text = self.rest[..end.unwrap_or(self.rest.len())].to_owned();
        for _ in text.chars() {
            self.next();
        }
        let digits = text.strip_prefix('-').unwrap_or(&text);
        let shaped = digits.starts_with(|first: char| first.is_ascii_digit());
        let value = if shaped && digits.bytes().all(|byte| byte.is_ascii_digit()) {
            text.parse().ok().map(Value::Integer)
        } else if shaped && digits.bytes().all(|byte| byte.is_ascii_digit() || b".eE+-".contains(&byte)) {
            text.parse().ok().filter(|number: &f64| number.is_finite()).map(Value::Float)
        } else {
            None
        };
        value.ok_or_else(|| TextError { place, message: format!("{text:?} is no number") })
    }

    fn quoted(&mut self) -> Result<String, TextError> {
        let open = self.place;
        self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                Some('\n') | None => {
                    return Err(TextError { place: open, message: "this string has no end".to_owned() });
                }
                Some(other) => text.push(other),
            }
        }
    }

    fn escape(&mut self) -> Result<char, TextError> {
        let place = self.place;
        let refused = |what: String| TextError { place, message: what };
        match self.next() {
            Some('n') => Ok('\n'),
            Some('t') => Ok('\t'),
            Some('r') => Ok('\r'),
            Some('b') => Ok('\u{8}'),
            Some('f') => Ok('\u{c}'),
            Some(same @ ('"' | '\\' | '/')) => Ok(same),
            Some('u') => {
                let first = self.hex(4)?;
                // JSON writes characters beyond the basic plane as two surrogates.
                let pair = (0xd800..0xdc00).contains(&first) && self.rest.starts_with("\\u");
                let code = if pair {
                    self.next();
                    self.next();
                    let second = self.hex(4)?;
                    let low = second.checked_sub(0xdc00).filter(|low| *low < 0x400);
                    low.map(|low| 0x10000 + ((first - 0xd800) << 10) + low)
                } else {
                    Some(first)
                };
                code.and_then(char::from_u32).ok_or_else(|| refused("no such character".to_owned()))
            }
            Some('U') => char::from_u32(self.hex(8)?).ok_or_else(|| refused("no such character".to_owned())),
            Some(other) => Err(refused(format!("unknown escape \\{other}"))),
            None => Err(refused("this string has no end".to_owned())),
        }
    }

    fn hex(&mut self, digits: usize) -> Result<u32, TextError> {
        let mut code = 0_u32;
        for _ in 0..digits {
            let digit = self.peek().and_then(|next| next.to_digit(16));
            let digit = digit.ok_or_else(|| self.unexpected("a hexadecimal digit"))?;
            self.next();
            code = code.wrapping_shl(4) | digit;
        }
        Ok(code)
    }

    /// `<<END` … `END`, or `<<-END` without the indentation that all lines share.
    fn heredoc(&mut self) -> Result<String, TextError> {
        let open = self.place;
        self.next();
        self.next();
        let flush = self.take('-');
        let marker = self.word();
        self.take('\r');
        if marker.is_empty() || !self.take('\n') {
            return Err(TextError { place: open, message: "expected <<MARKER and the end of the line".to_owned() });
        }
        let mut lines = Vec::new();
        loop {
            if self.rest.is_empty() {
                return Err(TextError { place: open, message: format!("this text has no line {marker}") });
            }
            let end = self.rest.find('\n').unwrap_or(self.rest.len());
            let line = self.rest[..end].trim_end_matches('\r').to_owned();
            let last = line.trim() == marker;
            for _ in self.rest[..end].chars().collect::<Vec<_>>() {
                self.next();
            }
            if last {
                break; // the line's end stays, as after any value
            }
            self.next();
            lines.push(line);
        }
        let indent = |line: &String| line.len() - line.trim_start_matches([' ', '\t']).len();
        let shared = lines.iter().filter(|line| !line.trim().is_empty()).map(indent).min().filter(|_| flush);
        let cut = |line: &String| line.get(shared.unwrap_or(0)..).unwrap_or_default().to_owned() + "\n";
        Ok(lines.iter().map(cut).collect())
    }
}

#[cfg(test)]
mod tests;
