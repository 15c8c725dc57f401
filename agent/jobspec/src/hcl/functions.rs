//! The functions of job files. Those that Nomad has and culvert has not are refused by name.

use super::convert::{to_bool, to_number, to_text};
use super::eval::{Budget, not_known_yet};
use super::traverse::member;
use super::{Problem, Value, format};
use crate::Template;
use hcl_edit::Number;
use std::ops::Range;

/// What culvert evaluates.
const SUPPORTED: &[&str] = &[
    "coalesce",
    "concat",
    "contains",
    "format",
    "join",
    "jsonencode",
    "keys",
    "length",
    "lookup",
    "lower",
    "max",
    "merge",
    "min",
    "replace",
    "split",
    "tobool",
    "tolist",
    "tonumber",
    "tostring",
    "trimspace",
    "upper",
    "values",
];

/// What Nomad evaluates besides.
const UNSUPPORTED: &[&str] = &[
    "abs",
    "abspath",
    "anytrue",
    "alltrue",
    "base64decode",
    "base64encode",
    "basename",
    "bcrypt",
    "can",
    "ceil",
    "chomp",
    "chunklist",
    "cidrhost",
    "cidrnetmask",
    "cidrsubnet",
    "cidrsubnets",
    "coalescelist",
    "compact",
    "convert",
    "csvdecode",
    "dirname",
    "distinct",
    "element",
    "env",
    "file",
    "filebase64",
    "fileexists",
    "fileset",
    "flatten",
    "floor",
    "formatdate",
    "formatlist",
    "indent",
    "index",
    "jsondecode",
    "log",
    "md5",
    "parseint",
    "pathexpand",
    "pow",
    "range",
    "regex",
    "regex_replace",
    "reverse",
    "rsadecrypt",
    "setintersection",
    "setproduct",
    "setunion",
    "sha1",
    "sha256",
    "sha512",
    "signum",
    "slice",
    "sort",
    "split",
    "strlen",
    "strrev",
    "substr",
    "sum",
    "timeadd",
    "timestamp",
    "title",
    "tomap",
    "toset",
    "transpose",
    "trim",
    "trimprefix",
    "trimsuffix",
    "try",
    "urlencode",
    "uuidv4",
    "uuidv5",
    "vault_token",
    "consul_key",
    "yamldecode",
    "yamlencode",
    "zipmap",
];

type Argument = (Value, Option<Range<usize>>);
type Result<T, E = Problem> = std::result::Result<T, E>;

/// Calls `name`; `span` is where the name stands.
pub(super) fn call(name: &str, span: Option<Range<usize>>, arguments: Vec<Argument>, budget: &Budget) -> Result<Value> {
    let call = Call { name, span, arguments, budget };
    match name {
        "upper" => call.text(0, 1).map(|text| text.to_uppercase().into()),
        "lower" => call.text(0, 1).map(|text| text.to_lowercase().into()),
        "trimspace" => call.text(0, 1).map(|text| text.trim().into()),
        "replace" => call.replace(),
        "split" => {
            let (separator, text) = (call.text(0, 2)?, call.text(1, 2)?);
            // An empty separator splits into characters, as Go does.
            let pieces: Vec<Value> = if separator.is_empty() {
                text.chars().map(|c| c.to_string().into()).collect()
            } else {
                text.split(&separator).map(Value::from).collect()
            };
            Ok(Value::List(pieces))
        }
        "join" => call.join(),
        "format" => {
            let pattern = call.text_at(0)?;
            format::format(&pattern, call.arguments.get(1..).unwrap_or_default(), call.span.clone()).map(Value::Text)
        }
        "length" => call.length(),
        "concat" => call.concat(),
        "contains" => {
            let (items, wanted) = (call.list(0, 2)?, call.value(1, 2)?);
            Ok(Value::Bool(items.contains(wanted)))
        }
        "keys" => call.map(0, 1).map(|map| Value::List(map.into_keys().map(Value::from).collect())),
        "values" => call.map(0, 1).map(|map| Value::List(map.into_values().collect())),
        "lookup" => call.lookup(),
        "merge" => call.merge(),
        "coalesce" => call.coalesce(),
        "min" => call.extreme(|candidate, best| candidate < best),
        "max" => call.extreme(|candidate, best| candidate > best),
        "jsonencode" => {
            let value = call.value(0, 1)?;
            let json = value.to_json().map_err(|_| not_known_yet(call.at(0), "jsonencode()"))?;
            Ok(json.to_string().into())
        }
        "tostring" => {
            let value = call.value(0, 1)?;
            to_text(value).map(Value::Text).ok_or_else(|| call.wrong(0, "a string, number or bool"))
        }
        "tonumber" => to_number(call.value(0, 1)?).map(Value::Number).ok_or_else(|| call.wrong(0, "a number")),
        "tobool" => to_bool(call.value(0, 1)?).map(Value::Bool).ok_or_else(|| call.wrong(0, "\"true\" or \"false\"")),
        "tolist" => call.list(0, 1).map(|items| Value::List(items.to_vec())),
        unknown => Err(no_such_function(unknown, call.span)),
    }
}

fn no_such_function(name: &str, span: Option<Range<usize>>) -> Problem {
    if UNSUPPORTED.contains(&name) {
        let hint = format!("culvert knows {}", SUPPORTED.join(", "));
        return Problem::new(span, format!("function \"{name}\" is not supported by culvert yet")).hint(hint);
    }
    let problem = Problem::new(span, format!("there is no function named \"{name}\""));
    match crate::decode::closest(name, SUPPORTED.iter().copied()) {
        Some(close) => problem.hint(format!("did you mean \"{close}\"?")),
        None => problem,
    }
}

/// One call, for uniform errors.
struct Call<'a> {
    name: &'a str,
    span: Option<Range<usize>>,
    arguments: Vec<Argument>,
    budget: &'a Budget,
}

impl Call<'_> {
    fn at(&self, index: usize) -> Option<Range<usize>> {
        self.arguments.get(index).and_then(|(_, span)| span.clone()).or_else(|| self.span.clone())
    }

    fn wrong(&self, index: usize, wanted: &str) -> Problem {
        let kind = self.arguments.get(index).map_or("nothing", |(value, _)| value.kind());
        let name = self.name;
        Problem::new(self.at(index), format!("argument {} of {name}() must be {wanted}, this is {kind}", index + 1))
    }

    /// Argument `index` of a function that takes exactly `count`.
    fn value(&self, index: usize, count: usize) -> Result<&Value> {
        match self.arguments.get(index) {
            Some((value, _)) if self.arguments.len() == count => Ok(value),
            _ => {
                let (name, given) = (self.name, self.arguments.len());
                Err(Problem::new(self.span.clone(), format!("{name}() takes {count} arguments, here are {given}")))
            }
        }
    }

    fn text(&self, index: usize, count: usize) -> Result<String> {
        self.value(index, count)?;
        self.text_at(index)
    }

    fn text_at(&self, index: usize) -> Result<String> {
        let text = self.arguments.get(index).and_then(|(value, _)| to_text(value));
        let text = text.ok_or_else(|| self.wrong(index, "a string"))?;
        text.as_literal()
            .map(ToOwned::to_owned)
            .ok_or_else(|| not_known_yet(self.at(index), &format!("{}()", self.name)))
    }

    fn list(&self, index: usize, count: usize) -> Result<&[Value]> {
        match self.value(index, count)? {
            Value::List(items) => Ok(items),
            _ => Err(self.wrong(index, "a list")),
        }
    }

    fn map(&self, index: usize, count: usize) -> Result<std::collections::BTreeMap<String, Value>> {
        match self.value(index, count)? {
            Value::Map(items) => Ok(items.clone()),
            _ => Err(self.wrong(index, "a map")),
        }
    }

    fn replace(&self) -> Result<Value> {
        let (text, from, to) = (self.text(0, 3)?, self.text(1, 3)?, self.text(2, 3)?);
        if from.len() > 1 && from.starts_with('/') && from.ends_with('/') {
            let problem =
                Problem::new(self.at(1), "replace() with a /regular expression/ is not supported by culvert yet");
            return Err(problem);
        }
        // Counted before it is made: each match may grow by the length of `to`.
        let matches = if from.is_empty() { text.chars().count() + 1 } else { text.matches(&from).count() };
        self.budget.spend(text.len().saturating_add(matches.saturating_mul(to.len())), self.span.clone())?;
        Ok(text.replace(&from, &to).into())
    }

    fn join(&self) -> Result<Value> {
        let separator = self.text_at(0)?;
        let mut out = Template::default();
        let mut first = true;
        for index in 1..self.arguments.len().max(2) {
            let Some((Value::List(items), _)) = self.arguments.get(index) else {
                return Err(self.wrong(index, "a list of strings"));
            };
            self.budget.spend(items.len().saturating_mul(1 + separator.len()), self.span.clone())?;
            for item in items {
                if !first {
                    out.push_str(&separator);
                }
                first = false;
                out.append(&to_text(item).ok_or_else(|| self.wrong(index, "a list of strings"))?);
            }
        }
        Ok(Value::Text(out))
    }

    fn length(&self) -> Result<Value> {
        let length = match self.value(0, 1)? {
            Value::List(items) => items.len(),
            Value::Map(items) => items.len(),
            Value::Text(_) => self.text_at(0)?.chars().count(),
            _ => return Err(self.wrong(0, "a string, list or map")),
        };
        Ok(Value::Number(Number::from(length)))
    }

    fn concat(&self) -> Result<Value> {
        let mut all = Vec::new();
        for (index, (value, _)) in self.arguments.iter().enumerate() {
            let Value::List(items) = value else { return Err(self.wrong(index, "a list")) };
            all.extend(items.iter().cloned());
        }
        Ok(Value::List(all))
    }

    fn merge(&self) -> Result<Value> {
        let mut all = std::collections::BTreeMap::new();
        for (index, (value, _)) in self.arguments.iter().enumerate() {
            match value {
                Value::Map(items) => all.extend(items.clone()),
                Value::Null => {}
                _ => return Err(self.wrong(index, "a map")),
            }
        }
        Ok(Value::Map(all))
    }

    fn lookup(&self) -> Result<Value> {
        if self.arguments.len() == 2 {
            let (map, key) = (self.map(0, 2)?, self.value(1, 2)?);
            return member(Value::Map(map), key, self.span.clone());
        }
        let (map, key, default) = (self.map(0, 3)?, self.text(1, 3)?, self.value(2, 3)?);
        Ok(map.get(&key).unwrap_or(default).clone())
    }

    /// The first argument that is neither null nor an empty string.
    fn coalesce(&self) -> Result<Value> {
        let empty = |value: &Value| match value {
            Value::Null => true,
            Value::Text(text) => text.is_empty(),
            _ => false,
        };
        let found = self.arguments.iter().find(|(value, _)| !empty(value));
        let none = || Problem::new(self.span.clone(), "coalesce() found no argument with a value");
        found.map(|(value, _)| value.clone()).ok_or_else(none)
    }

    fn extreme(&self, better: impl Fn(&Number, &Number) -> bool) -> Result<Value> {
        let mut best: Option<Number> = None;
        for (index, (value, _)) in self.arguments.iter().enumerate() {
            let number = to_number(value).ok_or_else(|| self.wrong(index, "a number"))?;
            if best.as_ref().is_none_or(|best| better(&number, best)) {
                best = Some(number);
            }
        }
        best.map(Value::Number)
            .ok_or_else(|| Problem::new(self.span.clone(), format!("{}() takes at least one number", self.name)))
    }
}
