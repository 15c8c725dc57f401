//! String matchers as xDS knows them (`envoy.type.matcher.v3.StringMatcher`).

use std::fmt;

use regex::bytes::{Regex, RegexBuilder};

/// Longest pattern of any kind, in bytes. A SPIFFE ID has at most 2048.
pub const MAX_PATTERN: usize = 4096;
/// Largest compiled regular expression, in bytes.
pub const MAX_REGEX_PROGRAM: usize = 1 << 20;
/// Largest lazily built automaton of one regular expression, in bytes.
pub const MAX_REGEX_CACHE: usize = 1 << 20;

/// Why a string matcher is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MatcherError {
    /// Longer than [`MAX_PATTERN`].
    #[error("pattern of {0} bytes is longer than {MAX_PATTERN}")]
    TooLong(usize),
    /// An empty prefix, suffix or substring matches everything, which nobody means.
    #[error("empty pattern")]
    Empty,
    /// Not a regular expression, or one that needs more than [`MAX_REGEX_PROGRAM`].
    #[error("regular expression {pattern:?}: {reason}")]
    Regex {
        /// The pattern as sent.
        pattern: String,
        /// What the compiler says.
        reason: String,
    },
}

#[derive(Clone)]
enum Pattern {
    Exact,
    Prefix,
    Suffix,
    Contains,
    Regex(Regex),
    /// A regular expression of the form that intentions take. A compiled one needs tens of kilobytes, and a listener has
    /// one per source service.
    Simple(Box<[Token]>),
}

/// A part of a simple expression.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Token {
    /// This byte.
    Byte(u8),
    /// `.`: one byte, not the end of a line.
    Any,
    /// `[^/]+`, before a `/` or the end.
    Segment,
}

/// Matches a whole string. Regular expressions run in linear time and must match the whole string, as RE2's full match.
#[derive(Clone)]
pub struct StringMatcher {
    /// As sent; lower case if `ignore_case`.
    text: Box<str>,
    pattern: Pattern,
    ignore_case: bool,
}

impl StringMatcher {
    /// Matches this string and no other.
    ///
    /// # Errors
    /// [`MatcherError::TooLong`].
    pub fn exact(text: &str, ignore_case: bool) -> Result<Self, MatcherError> {
        Self::literal(text, Pattern::Exact, ignore_case)
    }

    /// Matches strings that begin so.
    ///
    /// # Errors
    /// [`MatcherError::TooLong`], [`MatcherError::Empty`].
    pub fn prefix(text: &str, ignore_case: bool) -> Result<Self, MatcherError> {
        Self::literal(text, Pattern::Prefix, ignore_case)
    }

    /// Matches strings that end so.
    ///
    /// # Errors
    /// [`MatcherError::TooLong`], [`MatcherError::Empty`].
    pub fn suffix(text: &str, ignore_case: bool) -> Result<Self, MatcherError> {
        Self::literal(text, Pattern::Suffix, ignore_case)
    }

    /// Matches strings with this in it.
    ///
    /// # Errors
    /// [`MatcherError::TooLong`], [`MatcherError::Empty`].
    pub fn contains(text: &str, ignore_case: bool) -> Result<Self, MatcherError> {
        Self::literal(text, Pattern::Contains, ignore_case)
    }

    /// Matches strings that the expression matches from the first to the last byte. Classes such as `\w` mean ASCII, as in RE2.
    ///
    /// # Errors
    /// [`MatcherError::TooLong`], [`MatcherError::Regex`].
    pub fn regex(pattern: &str) -> Result<Self, MatcherError> {
        if pattern.len() > MAX_PATTERN {
            return Err(MatcherError::TooLong(pattern.len()));
        }
        if let Some(tokens) = simple(pattern) {
            return Ok(Self { text: pattern.into(), pattern: Pattern::Simple(tokens), ignore_case: false });
        }
        // Alone first: `a)(b` is no expression, but would be one between our parentheses.
        compile(pattern, pattern)?;
        let regex = compile(pattern, &format!(r"\A(?:{pattern})\z"))?;
        Ok(Self { text: pattern.into(), pattern: Pattern::Regex(regex), ignore_case: false })
    }

    fn literal(text: &str, pattern: Pattern, ignore_case: bool) -> Result<Self, MatcherError> {
        if text.len() > MAX_PATTERN {
            return Err(MatcherError::TooLong(text.len()));
        }
        if text.is_empty() && !matches!(pattern, Pattern::Exact) {
            return Err(MatcherError::Empty);
        }
        let text = if ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
        Ok(Self { text: text.into(), pattern, ignore_case })
    }

    /// Does `value` match?
    #[must_use]
    pub fn matches(&self, value: &str) -> bool {
        if self.ignore_case { self.matches_cased(&value.to_ascii_lowercase()) } else { self.matches_cased(value) }
    }

    fn matches_cased(&self, value: &str) -> bool {
        match &self.pattern {
            Pattern::Exact => *value == *self.text,
            Pattern::Prefix => value.starts_with(&*self.text),
            Pattern::Suffix => value.ends_with(&*self.text),
            Pattern::Contains => value.contains(&*self.text),
            Pattern::Regex(regex) => regex.is_match(value.as_bytes()),
            Pattern::Simple(tokens) => matches_simple(tokens, value.as_bytes()),
        }
    }

    fn kind(&self) -> &'static str {
        match self.pattern {
            Pattern::Exact => "exact",
            Pattern::Prefix => "prefix",
            Pattern::Suffix => "suffix",
            Pattern::Contains => "contains",
            Pattern::Regex(_) | Pattern::Simple(_) => "safe_regex",
        }
    }
}

/// Reads `pattern` if it is nothing but literals, `.` and `[^/]+`, with or without anchors:
/// `^spiffe://<trust domain>/ns/default/dc/[^/]+/svc/web$`.
fn simple(pattern: &str) -> Option<Box<[Token]>> {
    const SEGMENT: &[u8] = b"[^/]+";
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    // `\$` is a literal: the loop sees a backslash at the end then, and gives up.
    let mut rest = pattern.strip_suffix('$').unwrap_or(pattern).as_bytes();
    let mut tokens = Vec::with_capacity(rest.len());
    loop {
        rest = match rest {
            [] => return Some(tokens.into()),
            [b'[', ..] => {
                let after = rest.strip_prefix(SEGMENT)?;
                if !matches!(after, [] | [b'/', ..]) || tokens.last() == Some(&Token::Segment) {
                    return None;
                }
                tokens.push(Token::Segment);
                after
            }
            [b'.', after @ ..] => {
                tokens.push(Token::Any);
                after
            }
            [b'\\', byte, after @ ..] if byte.is_ascii_punctuation() && !matches!(byte, b'<' | b'>') => {
                tokens.push(Token::Byte(*byte));
                after
            }
            [b'\\' | b'^' | b'$' | b'*' | b'+' | b'?' | b'(' | b')' | b'|' | b']' | b'{' | b'}', ..] => return None,
            [byte, after @ ..] => {
                tokens.push(Token::Byte(*byte));
                after
            }
        };
        // What a quantifier follows is no literal.
        if matches!(rest, [b'*' | b'+' | b'?' | b'{', ..]) {
            return None;
        }
    }
}

fn matches_simple(tokens: &[Token], value: &[u8]) -> bool {
    let mut rest = value;
    for token in tokens {
        let taken = match token {
            Token::Byte(byte) => usize::from(rest.first() == Some(byte)),
            Token::Any => usize::from(rest.first().is_some_and(|byte| *byte != b'\n')),
            Token::Segment => rest.iter().take_while(|byte| **byte != b'/').count(),
        };
        if taken == 0 {
            return false;
        }
        rest = &rest[taken..];
    }
    rest.is_empty()
}

fn compile(original: &str, pattern: &str) -> Result<Regex, MatcherError> {
    RegexBuilder::new(pattern)
        .unicode(false)
        .size_limit(MAX_REGEX_PROGRAM)
        .dfa_size_limit(MAX_REGEX_CACHE)
        .build()
        .map_err(|error| MatcherError::Regex { pattern: original.to_owned(), reason: error.to_string() })
}

impl PartialEq for StringMatcher {
    fn eq(&self, other: &Self) -> bool {
        self.kind() == other.kind() && self.ignore_case == other.ignore_case && self.text == other.text
    }
}

impl Eq for StringMatcher {}

impl fmt::Debug for StringMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let case = if self.ignore_case { ", ignore_case" } else { "" };
        write!(f, "{}({:?}{case})", self.kind(), self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/dc1/svc/web";

    #[test]
    fn literal_patterns_match_what_their_names_say() {
        let table: [(StringMatcher, &[&str], &[&str]); 4] = [
            (StringMatcher::exact("a.b", false).expect("exact"), &["a.b"], &["", "axb", "a.b.c", "A.B"]),
            (StringMatcher::prefix("a.", false).expect("prefix"), &["a.", "a.b"], &["", "ba.", "ax"]),
            (StringMatcher::suffix(".b", false).expect("suffix"), &[".b", "a.b"], &["", ".ba", "xb"]),
            (StringMatcher::contains(".", false).expect("contains"), &[".", "a.b"], &["", "ab"]),
        ];
        for (matcher, yes, no) in table {
            assert!(yes.iter().all(|text| matcher.matches(text)), "{matcher:?}");
            assert!(!no.iter().any(|text| matcher.matches(text)), "{matcher:?}");
        }
    }

    #[test]
    fn ignore_case_covers_literals() {
        assert!(StringMatcher::exact("Web", true).expect("exact").matches("wEB"));
        assert!(!StringMatcher::exact("Web", false).expect("exact").matches("web"));
    }

    #[test]
    fn a_regular_expression_matches_the_whole_string() {
        let id = r"^spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/[^/]+/svc/web$";
        let matcher = StringMatcher::regex(id).expect("consul's pattern");
        assert!(matcher.matches(WEB));
        assert!(!matcher.matches(&format!("{WEB}2")));
        assert!(!matcher.matches(&format!("{WEB}\n")));
        assert!(!matcher.matches(&WEB.replace("dc1", "dc1/svc/x")));
        assert!(!StringMatcher::regex("web").expect("no anchors").matches(WEB));
        assert!(StringMatcher::regex("a|ab").expect("alternatives").matches("ab"));
    }

    #[test]
    fn the_patterns_of_intentions_need_no_automaton() {
        let escaped = WEB.replace('.', r"\.").replace("dc1", "[^/]+");
        for pattern in [format!("^{escaped}$"), format!("^{}$", WEB.replace("dc1", "[^/]+")), "[^/]+".to_owned()] {
            assert!(simple(&pattern).is_some(), "{pattern}");
        }
        for pattern in [r"\d", "a*", r"\", r"a\$", "^^", "[^/]+x", "[a]", "a$$", ".+", "(a)", r"\<a"] {
            assert!(simple(pattern).is_none(), "{pattern}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(4096))]

        #[test]
        fn simple_patterns_mean_what_the_compiler_says(
            pattern in r"\^?(a|b|/|\.|\[\^/\]\+|\\\.|\\-|\\\$|\\|\+|é|\$){0,6}\$?",
            value in "(a|b|c|/|\\.|-|\\$|\n|é){0,7}",
        ) {
            if simple(&pattern).is_some() {
                let regex = compile(&pattern, &format!(r"\A(?:{pattern})\z")).expect("a regular expression too");
                let matcher = StringMatcher::regex(&pattern).expect("simple");
                proptest::prop_assert_eq!(matcher.matches(&value), regex.is_match(value.as_bytes()));
            }
        }
    }

    #[test]
    fn classes_are_ascii() {
        assert!(!StringMatcher::regex(r"\w+").expect("class").matches("wéb"));
    }

    #[test]
    fn refuses_what_cannot_be_compiled_or_is_too_big() {
        for pattern in ["(", "a)(b", r"(?=x)", r"(a)\1", "(((a{1000}){1000}){1000})", "(?x)a #"] {
            assert!(matches!(StringMatcher::regex(pattern), Err(MatcherError::Regex { .. })), "{pattern}");
        }
        assert_eq!(StringMatcher::regex(&"a".repeat(MAX_PATTERN + 1)), Err(MatcherError::TooLong(MAX_PATTERN + 1)));
        assert_eq!(StringMatcher::prefix("", false), Err(MatcherError::Empty));
    }
}
