//! `format()`: the verbs of Go's `fmt` that job files use.

use super::convert::{to_number, to_text};
use super::eval::not_known_yet;
use super::{Problem, Value};
use crate::Template;
use std::ops::Range;

/// Widest field and most decimals: enough for any text meant for people.
const MAX_WIDTH: usize = 256;

/// Flags, width and precision between `%` and the verb.
#[derive(Default)]
struct Spec {
    left: bool,
    zero: bool,
    plus: bool,
    width: usize,
    precision: Option<usize>,
}

/// `format(spec, values…)`.
pub(super) fn format(
    pattern: &str,
    values: &[(Value, Option<Range<usize>>)],
    span: Option<Range<usize>>,
) -> Result<Template, Problem> {
    let fail = |message: String| Problem::new(span.clone(), message);
    let mut out = Template::default();
    let mut values = values.iter();
    let mut rest = pattern;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let (spec, tail) = spec(&rest[at + 1..]).map_err(&fail)?;
        let verb = tail.chars().next().ok_or_else(|| fail("format() ends after \"%\"".to_owned()))?;
        rest = &tail[verb.len_utf8()..];
        if verb == '%' {
            out.push_str("%");
            continue;
        }
        let (value, at) = values.next().ok_or_else(|| fail(format!("format() has no argument for \"%{verb}\"")))?;
        out.append(&one(verb, &spec, value, at.clone())?);
    }
    out.push_str(rest);
    match values.next() {
        Some((_, at)) => Err(Problem::new(at.clone(), "format() has more arguments than verbs")),
        None => Ok(out),
    }
}

fn spec(text: &str) -> Result<(Spec, &str), String> {
    let mut spec = Spec::default();
    let flags = text.bytes().take_while(|byte| b"-0+".contains(byte)).count();
    for flag in text[..flags].bytes() {
        match flag {
            b'-' => spec.left = true,
            b'0' => spec.zero = true,
            _ => spec.plus = true,
        }
    }
    let (width, rest) = number(&text[flags..])?;
    spec.width = width.unwrap_or(0);
    let Some(rest) = rest.strip_prefix('.') else { return Ok((spec, rest)) };
    let (precision, rest) = number(rest)?;
    spec.precision = Some(precision.unwrap_or(0));
    Ok((spec, rest))
}

fn number(text: &str) -> Result<(Option<usize>, &str), String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, rest) = text.split_at(digits);
    if digits.is_empty() {
        return Ok((None, rest));
    }
    match digits.parse() {
        Ok(number) if number <= MAX_WIDTH => Ok((Some(number), rest)),
        _ => Err(format!("format() takes a width of at most {MAX_WIDTH}")),
    }
}

fn one(verb: char, spec: &Spec, value: &Value, at: Option<Range<usize>>) -> Result<Template, Problem> {
    let wrong =
        |wanted: &str| Problem::new(at.clone(), format!("\"%{verb}\" needs {wanted}, this is {}", value.kind()));
    let plain = spec.width == 0 && spec.precision.is_none();
    let text = match verb {
        's' | 'v' if plain && matches!(value, Value::Text(_)) => {
            return to_text(value).ok_or_else(|| wrong("a string"));
        }
        's' | 'q' => known(to_text(value).ok_or_else(|| wrong("a string"))?, at.clone())?,
        'v' => match to_text(value) {
            Some(text) => known(text, at.clone())?,
            None => value.to_json().map_err(|_| not_known_yet(at.clone(), "\"%v\" of a collection"))?.to_string(),
        },
        'd' => {
            let number = to_number(value).ok_or_else(|| wrong("a whole number"))?;
            number.as_i64().map(|number| signed(spec, number.to_string())).ok_or_else(|| wrong("a whole number"))?
        }
        'f' | 'g' | 'e' => {
            let number = to_number(value).and_then(|number| number.as_f64()).ok_or_else(|| wrong("a number"))?;
            let precision = spec.precision.unwrap_or(6);
            signed(
                spec,
                match verb {
                    'f' => format!("{number:.precision$}"),
                    'e' => return Err(Problem::new(at, "\"%e\" is not supported by culvert yet")),
                    _ => number.to_string(),
                },
            )
        }
        'x' | 'X' => {
            let number = to_number(value).and_then(|number| number.as_u64());
            let number = number.ok_or_else(|| wrong("a whole number that is not negative"))?;
            if verb == 'x' { format!("{number:x}") } else { format!("{number:X}") }
        }
        't' => match value {
            Value::Bool(value) => value.to_string(),
            _ => return Err(wrong("a bool")),
        },
        other => return Err(Problem::new(at, format!("format() does not know \"%{other}\""))),
    };
    let text = match (verb, spec.precision) {
        ('q', _) => serde_json::Value::String(text).to_string(),
        ('s' | 'v', Some(precision)) => text.chars().take(precision).collect(),
        _ => text,
    };
    Ok(Template::literal(pad(spec, text, matches!(verb, 'd' | 'f' | 'g' | 'x' | 'X'))))
}

fn known(text: Template, at: Option<Range<usize>>) -> Result<String, Problem> {
    text.as_literal().map(ToOwned::to_owned).ok_or_else(|| not_known_yet(at, "a field of fixed width"))
}

fn signed(spec: &Spec, digits: String) -> String {
    if spec.plus && !digits.starts_with('-') { format!("+{digits}") } else { digits }
}

fn pad(spec: &Spec, text: String, numeric: bool) -> String {
    let missing = spec.width.saturating_sub(text.chars().count());
    if spec.left {
        format!("{text}{}", " ".repeat(missing))
    } else if spec.zero && numeric {
        let sign = usize::from(text.starts_with(['-', '+']));
        format!("{}{}{}", &text[..sign], "0".repeat(missing), &text[sign..])
    } else {
        format!("{}{text}", " ".repeat(missing))
    }
}
