//! Reads one block against its schema. Every attribute and block is either read, refused by name, or unknown.

use super::closest;
use crate::Template;
use crate::duration::parse_go_duration;
use crate::hcl::{Problem, Scope, Value, to_integer, to_text};
use crate::parse::Session;
use hcl_edit::Span as _;
use hcl_edit::expr::Expression;
use hcl_edit::structure::{Attribute, Block, Body, Structure};
use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

/// Most blocks of one kind inside one block: what follows compares each with each.
const MAX_BLOCKS: usize = 1000;

/// Most entries of a free map such as `env`.
const MAX_ENTRIES: usize = 4096;

/// What a kind of block may hold.
pub(super) struct Schema {
    /// The keyword of the block, for errors.
    pub(super) block: &'static str,
    /// `key = value`.
    pub(super) attributes: &'static [&'static str],
    /// `key { a = "b" }` or `key = { a = "b" }`.
    pub(super) maps: &'static [&'static str],
    /// Blocks that stand at most once.
    pub(super) once: &'static [&'static str],
    /// Blocks that may repeat.
    pub(super) repeated: &'static [&'static str],
    /// What Nomad knows here and culvert does not honour.
    pub(super) refused: &'static [&'static str],
}

/// Start of a schema, for `..EMPTY`.
pub(super) const EMPTY: Schema =
    Schema { block: "", attributes: &[], maps: &[], once: &[], repeated: &[], refused: &[] };

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) span: Option<Range<usize>>,
}

/// One block being read.
pub(super) struct Reader<'a> {
    pub(super) session: &'a Session,
    pub(super) scope: Scope<'a>,
    schema: &'static Schema,
    body: &'a Body,
    /// Where the block's keyword and labels stand.
    pub(super) span: Option<Range<usize>>,
    /// Place in the job, for validation: `group.0.task.1`. Indices, because names may be long and this is kept often.
    pub(super) path: String,
}

impl<'a> Reader<'a> {
    /// Checks `block` against `schema`; what does not belong there is reported.
    pub(super) fn open(
        session: &'a Session,
        scope: Scope<'a>,
        schema: &'static Schema,
        block: &'a Block,
        path: String,
    ) -> Self {
        let span = header(block);
        session.place(&path, span.clone());
        let reader = Self { session, scope, schema, body: &block.body, span, path };
        reader.check();
        reader
    }

    /// A reader of a block inside this one, at `path` below it.
    pub(super) fn inner(&self, schema: &'static Schema, block: &'a Block, path: &str) -> Reader<'a> {
        Reader::open(self.session, self.scope, schema, block, format!("{}.{path}", self.path))
    }

    fn check(&self) {
        let Schema { block, attributes, maps, once, repeated, refused } = self.schema;
        let mut seen: Vec<&str> = Vec::new();
        for structure in self.body.iter() {
            let (name, span, is_block) = match structure {
                Structure::Attribute(attribute) => (attribute.key.as_str(), attribute.key.span(), false),
                Structure::Block(block) => (block.ident.as_str(), block.ident.span(), true),
            };
            let knows = |list: &[&str]| list.contains(&name);
            let single = knows(maps) || knows(once);
            if single && seen.contains(&name) {
                self.report(span.clone(), format!("only one \"{name}\" is allowed in \"{block}\""), None);
            } else if single {
                seen.push(name);
            }
            if knows(maps) || (is_block && (knows(once) || knows(repeated))) || (!is_block && knows(attributes)) {
                continue;
            }
            let hint = if knows(once) || knows(repeated) {
                Some(format!("\"{name}\" is a block: write {name} {{ … }} without \"=\""))
            } else if knows(attributes) {
                Some(format!("\"{name}\" is an argument: write {name} = …"))
            } else if knows(refused) {
                let message = format!("\"{name}\" in \"{block}\" is not supported by culvert yet");
                self.report(span, message, Some("Nomad knows it; remove it to run this job with culvert".to_owned()));
                continue;
            } else if self.session.is_full() {
                None
            } else {
                let known =
                    [attributes, maps, once, repeated, refused].into_iter().flat_map(|list| list.iter().copied());
                closest(name, known).map(|close| format!("did you mean \"{close}\"?"))
            };
            let kind = if is_block { "block" } else { "argument" };
            self.report(span, format!("\"{block}\" has no {kind} named \"{name}\""), hint);
        }
    }

    pub(super) fn report(&self, span: Option<Range<usize>>, message: impl Into<String>, hint: Option<String>) {
        self.session.report(Problem { span, message: message.into(), hint });
    }

    /// The attribute `name` if it is set to something else than null.
    fn value(&self, name: &str) -> Option<At<Value>> {
        let attribute = self.attribute(name)?;
        let span = attribute.value.span();
        self.session.place(&format!("{}.{name}", self.path), span.clone());
        match self.scope.evaluate(&attribute.value) {
            Ok(Value::Null) => None,
            Ok(value) => Some(At { value, span }),
            Err(problem) => {
                self.session.report(problem);
                None
            }
        }
    }

    fn attribute(&self, name: &str) -> Option<&'a Attribute> {
        self.body.attributes().find(|attribute| attribute.has_key(name))
    }

    /// Whether the attribute has a value, right or wrong. One that is null counts as left out.
    pub(super) fn has(&self, name: &str) -> bool {
        self.attribute(name).is_some_and(|attribute| !matches!(self.scope.evaluate(&attribute.value), Ok(Value::Null)))
    }

    /// The unevaluated expression of an attribute.
    pub(super) fn expression(&self, name: &str) -> Option<&'a Expression> {
        self.attribute(name).map(|attribute| &attribute.value)
    }

    fn wrong(&self, name: &str, wanted: &str, found: &At<Value>) {
        self.report(found.span.clone(), format!("\"{name}\" must be {wanted}, this is {}", found.value.kind()), None);
    }

    /// A string that may hold references.
    pub(super) fn template(&self, name: &str) -> Option<At<Template>> {
        let found = self.value(name)?;
        match to_text(&found.value) {
            Some(value) => Some(At { value, span: found.span }),
            None => {
                self.wrong(name, "a string", &found);
                None
            }
        }
    }

    /// A string that must be known now.
    pub(super) fn literal(&self, name: &str) -> Option<At<String>> {
        let At { value, span } = self.template(name)?;
        match value.as_literal() {
            Some(text) => Some(At { value: text.to_owned(), span }),
            None => {
                let message = format!("\"{name}\" cannot hold a value that is known only when an allocation runs");
                self.report(span, message, None);
                None
            }
        }
    }

    /// A whole number in `range`.
    pub(super) fn number(&self, name: &str, range: RangeInclusive<i64>) -> Option<At<i64>> {
        let found = self.value(name)?;
        let Some(value) = to_integer(&found.value) else {
            self.wrong(name, "a whole number", &found);
            return None;
        };
        if !range.contains(&value) {
            let (low, high) = (range.start(), range.end());
            self.report(found.span, format!("\"{name}\" must be between {low} and {high}; got {value}"), None);
            return None;
        }
        Some(At { value, span: found.span })
    }

    /// A duration such as `"30s"`.
    pub(super) fn duration(&self, name: &str) -> Option<At<Duration>> {
        let At { value: text, span } = self.literal(name)?;
        match parse_go_duration(&text) {
            Some(value) => Some(At { value, span }),
            None => {
                let hint = "a duration is a number with a unit (ns, us, ms, s, m, h), as in \"1m30s\"";
                self.report(span, format!("\"{name}\" is not a duration: {text:?}"), Some(hint.to_owned()));
                None
            }
        }
    }

    /// A list of strings that may hold references.
    pub(super) fn templates(&self, name: &str) -> Option<At<Vec<Template>>> {
        let found = self.value(name)?;
        let items = match &found.value {
            Value::List(items) => items.iter().map(to_text).collect(),
            _ => None,
        };
        if items.is_none() {
            self.wrong(name, "a list of strings", &found);
        }
        Some(At { value: items?, span: found.span })
    }

    /// A free map of strings, as a block or as an object.
    pub(super) fn template_map(&self, name: &str) -> BTreeMap<String, Template> {
        let mut map = BTreeMap::new();
        for (key, value, span) in self.entries(name) {
            match to_text(&value) {
                Some(text) => {
                    self.session.place(&format!("{}.{name}.{key}", self.path), span);
                    map.insert(key, text);
                }
                None => {
                    self.report(span, format!("{key:?} in \"{name}\" must be a string, this is {}", value.kind()), None)
                }
            }
        }
        map
    }

    /// The entries of a free map; nulls are left out.
    pub(super) fn entries(&self, name: &str) -> Vec<(String, Value, Option<Range<usize>>)> {
        let mut entries = Vec::new();
        if let Some(found) = self.value(name) {
            match found.value {
                Value::Map(items) => {
                    entries.extend(items.into_iter().map(|(key, value)| (key, value, found.span.clone())));
                }
                _ => self.wrong(name, "a map", &found),
            }
        }
        for block in self.body.get_blocks(name) {
            if let Some(label) = block.labels.first() {
                self.report(label.span(), format!("\"{name}\" takes no label"), None);
            }
            for structure in block.body.iter() {
                match structure {
                    Structure::Attribute(attribute) => match self.scope.evaluate(&attribute.value) {
                        Ok(value) => entries.push((attribute.key.to_string(), value, attribute.value.span())),
                        Err(problem) => self.session.report(problem),
                    },
                    // `limits { … }` is `limits = { … }`, once and no deeper.
                    Structure::Block(inner) => {
                        let key = inner.ident.as_str();
                        if block.body.get_blocks(key).count() > 1 || block.body.has_attribute(key) {
                            self.report(
                                inner.ident.span(),
                                format!("only one \"{key}\" is allowed in \"{name}\""),
                                None,
                            );
                        }
                        entries.push((key.to_owned(), self.flat(inner), header(inner)));
                    }
                }
            }
        }
        entries.retain(|(_, value, _)| *value != Value::Null);
        if let Some((_, _, span)) = entries.get(MAX_ENTRIES) {
            self.report(span.clone(), format!("more than {MAX_ENTRIES} entries in \"{name}\""), None);
            entries.truncate(MAX_ENTRIES);
        }
        entries
    }

    /// A block without label and blocks, as a map.
    fn flat(&self, block: &Block) -> Value {
        let name = block.ident.as_str();
        if let Some(label) = block.labels.first() {
            self.report(label.span(), format!("\"{name}\" takes no label"), None);
        }
        for inner in block.body.blocks() {
            self.report(inner.ident.span(), format!("\"{name}\" holds only key = value"), None);
        }
        let evaluate = |attribute: &Attribute| match self.scope.evaluate(&attribute.value) {
            Ok(value) => Some((attribute.key.to_string(), value)),
            Err(problem) => {
                self.session.report(problem);
                None
            }
        };
        Value::Map(block.body.attributes().filter_map(evaluate).collect())
    }

    /// The only block `name`; it takes no label.
    pub(super) fn block(&self, name: &str) -> Option<&'a Block> {
        self.blocks(name).into_iter().next()
    }

    /// All blocks `name`; they take no label.
    pub(super) fn blocks(&self, name: &str) -> Vec<&'a Block> {
        let blocks: Vec<&Block> = self.all(name);
        for block in &blocks {
            if let Some(label) = block.labels.first() {
                self.report(label.span(), format!("\"{name}\" takes no label"), None);
            }
        }
        blocks
    }

    /// All blocks `name` with their only label.
    pub(super) fn labelled(&self, name: &str) -> Vec<(At<String>, &'a Block)> {
        self.all(name).into_iter().filter_map(|block| label(self.session, block).map(|label| (label, block))).collect()
    }

    fn all(&self, name: &str) -> Vec<&'a Block> {
        let mut blocks: Vec<&Block> = self.body.blocks().filter(|block| block.has_ident(name)).collect();
        if let Some(first) = blocks.get(MAX_BLOCKS) {
            self.report(header(first), format!("more than {MAX_BLOCKS} \"{name}\" blocks"), None);
            blocks.truncate(MAX_BLOCKS);
        }
        blocks
    }

    /// Reports that `name` is missing.
    pub(super) fn missing(&self, name: &str) {
        let message = format!("\"{}\" requires \"{name}\"", self.schema.block);
        self.report(self.span.clone(), message, Some(format!("add {name} = …")));
    }

    /// Refuses a word of `known` that culvert has not; reports any other as invalid.
    pub(super) fn refuse_word(&self, name: &str, word: &At<String>, known: &[&str], supported: &str) {
        let message = if known.contains(&word.value.as_str()) {
            format!("{name} {:?} is not supported by culvert yet", word.value)
        } else {
            format!("invalid {name}: {:?}", word.value)
        };
        self.report(word.span.clone(), message, Some(format!("culvert supports {supported}")));
    }
}

/// The only label of `block`.
pub(crate) fn label(session: &Session, block: &Block) -> Option<At<String>> {
    let name = block.ident.as_str();
    match block.labels.as_slice() {
        [label] => Some(At { value: label.as_str().to_owned(), span: label.span() }),
        [] => {
            let problem = Problem::new(header(block), format!("\"{name}\" needs a label"));
            session.report(problem.hint(format!("write {name} \"name\" {{ … }}")));
            None
        }
        [_, second, ..] => {
            session.report(Problem::new(second.span(), format!("\"{name}\" takes one label")));
            None
        }
    }
}

/// Keyword and labels.
pub(crate) fn header(block: &Block) -> Option<Range<usize>> {
    let start = block.ident.span()?;
    let end = block.labels.last().and_then(hcl_edit::Span::span).map_or(start.end, |label| label.end);
    Some(start.start..end)
}
