//! Text to syntax tree.

use super::{FilterError, MAX_DEPTH};

/// The tree, not yet checked against a schema.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Expression {
    Or(Box<Expression>, Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Not(Box<Expression>),
    Match { selector: Vec<String>, operator: Operator, value: String },
}

/// What is asked of a field. The negated forms are a `Not` around these, except for `!=`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Operator {
    Equal,
    NotEqual,
    /// The field contains the value; `value in field` is the same.
    Contains,
    Empty,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Token {
    Word(String),
    Quoted(String),
    Open,
    Close,
    Equal,
    NotEqual,
}

pub(super) fn parse(text: &str) -> Result<Expression, FilterError> {
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens: &tokens, at: 0, end: text.len(), text };
    let expression = parser.or(0)?;
    match parser.tokens.get(parser.at) {
        None => Ok(expression),
        Some((offset, _)) => Err(parser.error(*offset, "expected \"and\", \"or\" or the end of the filter")),
    }
}

fn syntax(text: &str, offset: usize, what: impl Into<String>) -> FilterError {
    let column = text.get(..offset).map_or(offset, |before| before.chars().count()) + 1;
    FilterError::Syntax { column, offset, what: what.into() }
}

/// Characters of an unquoted selector or value. Brackets belong to it: `Meta["key"]`.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | ':' | '*')
}

fn tokens(text: &str) -> Result<Vec<(usize, Token)>, FilterError> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let offset = text.len() - rest.len();
        let (token, length) = match first {
            c if c.is_whitespace() => {
                rest = &rest[c.len_utf8()..];
                continue;
            }
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '=' if rest.starts_with("==") => (Token::Equal, 2),
            '!' if rest.starts_with("!=") => (Token::NotEqual, 2),
            '"' | '`' => {
                let (value, length) = quoted(text, offset)?;
                (Token::Quoted(value), length)
            }
            c if is_word(c) => word(text, offset)?,
            c => return Err(syntax(text, offset, format!("unexpected character {c:?}"))),
        };
        tokens.push((offset, token));
        rest = &rest[length..];
    }
    Ok(tokens)
}

/// A string in double quotes (with `\"` and `\\`) or back quotes (verbatim); returns its value and its length in the text.
fn quoted(text: &str, offset: usize) -> Result<(String, usize), FilterError> {
    let mut value = String::new();
    let mut characters = text[offset..].char_indices();
    let quote = characters.next().map_or('"', |(_, quote)| quote);
    while let Some((at, c)) = characters.next() {
        match c {
            c if c == quote => return Ok((value, at + c.len_utf8())),
            '\\' if quote == '"' => match characters.next() {
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                Some((_, 'n')) => value.push('\n'),
                Some((_, 't')) => value.push('\t'),
                _ => return Err(syntax(text, offset + at, "unknown escape in a string: use \\\", \\\\, \\n or \\t")),
            },
            c => value.push(c),
        }
    }
    Err(syntax(text, offset, "Unterminated string literal"))
}

/// An unquoted word, where `["key"]` continues a selector. Parts are joined by a unit separator that no word holds.
fn word(text: &str, offset: usize) -> Result<(Token, usize), FilterError> {
    let mut value = String::new();
    let mut at = offset;
    loop {
        let rest = &text[at..];
        let plain = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        value.push_str(&rest[..plain]);
        at += plain;
        if !text[at..].starts_with("[\"") {
            return Ok((Token::Word(value), at - offset));
        }
        let (key, length) = quoted(text, at + 1)?;
        at += 1 + length;
        if !text[at..].starts_with(']') {
            return Err(syntax(text, at, "expected \"]\""));
        }
        at += 1;
        value.push(PART);
        value.push_str(&key.replace(PART, " "));
        value.push(PART);
    }
}

/// Encloses a key that came in brackets, and so may hold dots.
const PART: char = '\u{1f}';

/// Splits a selector word into its path.
fn path(word: &str) -> Vec<String> {
    let mut parts = Vec::new();
    for (n, piece) in word.split(PART).enumerate() {
        if n % 2 == 1 {
            parts.push(piece.to_owned());
        } else {
            parts.extend(piece.split('.').filter(|part| !part.is_empty()).map(str::to_owned));
        }
    }
    parts
}

struct Parser<'a> {
    tokens: &'a [(usize, Token)],
    at: usize,
    end: usize,
    text: &'a str,
}

impl Parser<'_> {
    fn error(&self, offset: usize, what: &str) -> FilterError {
        syntax(self.text, offset, what)
    }

    fn offset(&self) -> usize {
        self.tokens.get(self.at).map_or(self.end, |(offset, _)| *offset)
    }

    fn deeper(&self, depth: usize) -> Result<usize, FilterError> {
        if depth < MAX_DEPTH {
            Ok(depth + 1)
        } else {
            Err(self.error(self.offset(), "the filter is nested too deeply"))
        }
    }

    /// Takes the next token if it is this word.
    fn keyword(&mut self, word: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some((_, Token::Word(next))) if next == word);
        self.at += usize::from(found);
        found
    }

    fn or(&mut self, depth: usize) -> Result<Expression, FilterError> {
        let depth = self.deeper(depth)?;
        let left = self.and(depth)?;
        if !self.keyword("or") {
            return Ok(left);
        }
        Ok(Expression::Or(Box::new(left), Box::new(self.or(depth)?)))
    }

    fn and(&mut self, depth: usize) -> Result<Expression, FilterError> {
        let depth = self.deeper(depth)?;
        let left = self.not(depth)?;
        if !self.keyword("and") {
            return Ok(left);
        }
        Ok(Expression::And(Box::new(left), Box::new(self.and(depth)?)))
    }

    fn not(&mut self, depth: usize) -> Result<Expression, FilterError> {
        let depth = self.deeper(depth)?;
        // `not` may also be a value: `not in Tags` asks whether "not" is in Tags only when quoted, as in go-bexpr.
        if self.keyword("not") {
            return Ok(Expression::Not(Box::new(self.not(depth)?)));
        }
        if matches!(self.tokens.get(self.at), Some((_, Token::Open))) {
            self.at += 1;
            let inner = self.or(depth)?;
            if !matches!(self.tokens.get(self.at), Some((_, Token::Close))) {
                return Err(self.error(self.offset(), "expected \")\""));
            }
            self.at += 1;
            return Ok(inner);
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expression, FilterError> {
        let start = self.offset();
        let Some((_, left)) = self.tokens.get(self.at).cloned() else {
            return Err(self.error(start, "expected a selector or a value"));
        };
        self.at += 1;
        if matches!(&left, Token::Word(word) if word == "any" || word == "all")
            && matches!(self.tokens.get(self.at), Some((_, Token::Word(_))))
        {
            return Err(self.error(start, "\"any\" and \"all\" are not supported in filters"));
        }
        match self.operator(start)? {
            (Verb::In, negated) => {
                let value = self.value_of(start, left)?;
                let selector = self.selector()?;
                Ok(negate(negated, Expression::Match { selector, operator: Operator::Contains, value }))
            }
            (Verb::Empty, negated) => {
                let selector = self.selector_of(start, &left)?;
                let value = String::new();
                Ok(negate(negated, Expression::Match { selector, operator: Operator::Empty, value }))
            }
            (Verb::Compare(operator), negated) => {
                let selector = self.selector_of(start, &left)?;
                let offset = self.offset();
                let right = self.tokens.get(self.at).map(|(_, token)| token.clone());
                let right = right.ok_or_else(|| self.error(offset, "expected a value"))?;
                self.at += 1;
                let value = self.value_of(offset, right)?;
                Ok(negate(negated, Expression::Match { selector, operator, value }))
            }
        }
    }

    fn operator(&mut self, start: usize) -> Result<(Verb, bool), FilterError> {
        let offset = self.offset();
        match self.tokens.get(self.at) {
            Some((_, Token::Equal)) => {
                self.at += 1;
                return Ok((Verb::Compare(Operator::Equal), false));
            }
            Some((_, Token::NotEqual)) => {
                self.at += 1;
                return Ok((Verb::Compare(Operator::NotEqual), false));
            }
            _ => {}
        }
        if self.keyword("is") {
            let negated = self.keyword("not");
            return if self.keyword("empty") {
                Ok((Verb::Empty, negated))
            } else {
                Err(self.error(self.offset(), "expected \"empty\" or \"not empty\""))
            };
        }
        let negated = self.keyword("not");
        if self.keyword("in") {
            return Ok((Verb::In, negated));
        }
        if self.keyword("contains") {
            return Ok((Verb::Compare(Operator::Contains), negated));
        }
        if self.keyword("matches") {
            return Err(self.error(offset, "the operator \"matches\" is not supported in filters"));
        }
        let what = "expected an operator (==, !=, in, not in, contains, not contains, is empty, is not empty)";
        Err(self.error(if offset == self.end { start } else { offset }, what))
    }

    fn selector(&mut self) -> Result<Vec<String>, FilterError> {
        let offset = self.offset();
        let Some((_, token)) = self.tokens.get(self.at).cloned() else {
            return Err(self.error(offset, "expected a selector"));
        };
        self.at += 1;
        self.selector_of(offset, &token)
    }

    fn selector_of(&self, offset: usize, token: &Token) -> Result<Vec<String>, FilterError> {
        match token {
            Token::Word(word) => Ok(path(word)),
            _ => Err(self.error(offset, "expected a selector, such as Service or Meta.key")),
        }
    }

    fn value_of(&self, offset: usize, token: Token) -> Result<String, FilterError> {
        match token {
            Token::Quoted(value) => Ok(value),
            Token::Word(word) if !word.contains(PART) => Ok(word),
            _ => Err(self.error(offset, "expected a value")),
        }
    }
}

enum Verb {
    Compare(Operator),
    In,
    Empty,
}

fn negate(negated: bool, expression: Expression) -> Expression {
    if negated { Expression::Not(Box::new(expression)) } else { expression }
}
