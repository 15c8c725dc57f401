//! Evaluation of expressions: names, collections, calls, `for`. Beside it: `operate`, `traverse`, `strings`.
//!
//! `var.x` and `local.x` have values now. `NOMAD_…`, `env`, `node`, `attr` and `meta` have one only when an allocation
//! runs: they become references inside the string, and may not be computed with.

use super::convert::to_text;
use super::operate::arithmetic;
use super::{Problem, Value, functions};
use crate::Template;
use hcl_edit::expr::{BinaryOperator, Conditional, Expression, ForExpr, FuncCall, ObjectKey, UnaryOperator};
use hcl_edit::template::Element;
use hcl_edit::{Number, Span as _};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

/// What the expressions of one job file may cost together: one unit per expression evaluated and per byte of what it
/// yields. `for` inside `for` and locals that double each other end here, before they cost seconds or gigabytes.
pub(crate) const MAX_WORK: usize = 32 * 1024 * 1024;

/// What is left of [`MAX_WORK`].
#[derive(Debug)]
pub(crate) struct Budget(Cell<usize>);

impl Default for Budget {
    fn default() -> Self {
        Self(Cell::new(MAX_WORK))
    }
}

impl Budget {
    /// Takes `units`, or fails at `span`.
    pub(crate) fn spend(&self, units: usize, span: Option<Range<usize>>) -> Result<(), Problem> {
        match self.0.get().checked_sub(units) {
            Some(rest) => {
                self.0.set(rest);
                Ok(())
            }
            None => {
                self.0.set(0);
                Err(Problem::new(span, "the expressions of this job file take too much time or memory to evaluate"))
            }
        }
    }
}

/// What names mean at one place of the file.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub(crate) budget: &'a Budget,
    /// `var.…`.
    pub(crate) variables: &'a BTreeMap<String, Value>,
    /// `local.…`.
    pub(crate) locals: &'a BTreeMap<String, Value>,
    /// Whether `${NOMAD_…}` and the like may stay for later.
    pub(crate) runtime: bool,
    bound: Option<&'a Bound<'a>>,
}

/// A name that a `for` introduced.
struct Bound<'a> {
    name: &'a str,
    value: &'a Value,
    outer: Option<&'a Bound<'a>>,
}

pub(super) type Result<T, E = Problem> = std::result::Result<T, E>;

impl<'a> Scope<'a> {
    pub(crate) fn new(
        budget: &'a Budget,
        variables: &'a BTreeMap<String, Value>,
        locals: &'a BTreeMap<String, Value>,
        runtime: bool,
    ) -> Self {
        Self { budget, variables, locals, runtime, bound: None }
    }

    /// The value of `expression`.
    pub(crate) fn evaluate(&self, expression: &Expression) -> Result<Value> {
        let span = expression.span();
        self.budget.spend(1, span.clone())?;
        let value = match expression {
            Expression::Null(_) => Value::Null,
            Expression::Bool(value) => Value::Bool(*value.value()),
            Expression::Number(number) => Value::Number(*number.value()),
            Expression::String(text) => Value::Text(Template::literal(text.as_str())),
            Expression::Array(items) => {
                Value::List(items.iter().map(|item| self.evaluate(item)).collect::<Result<_>>()?)
            }
            Expression::Object(items) => {
                let mut map = BTreeMap::new();
                for (key, value) in items.iter() {
                    let key = match key {
                        ObjectKey::Ident(name) => name.to_string(),
                        ObjectKey::Expression(key) => self.known_text(key, "an object key")?,
                    };
                    map.insert(key, self.evaluate(value.expr())?);
                }
                Value::Map(map)
            }
            Expression::StringTemplate(template) => match template.as_single_element() {
                // "${x}" is x itself, whatever its type (HCL syntax spec, "Template Interpolation Unwrapping").
                Some(Element::Interpolation(only)) => self.interpolation(&only.expr)?,
                _ => Value::Text(self.elements(template.iter().collect(), false, false)?),
            },
            Expression::HeredocTemplate(heredoc) => {
                Value::Text(self.elements(heredoc.template.iter().collect(), false, false)?)
            }
            Expression::Parenthesis(inner) => self.evaluate(inner.inner())?,
            Expression::Variable(name) => self.variable(name.as_str(), span.clone(), false)?,
            Expression::Conditional(conditional) => self.conditional(conditional)?,
            Expression::FuncCall(call) => self.call(call, span.clone())?,
            Expression::Traversal(traversal) => self.traversal(traversal, span.clone())?,
            Expression::UnaryOp(operation) => {
                let value = self.evaluate(&operation.expr)?;
                match operation.operator.value() {
                    UnaryOperator::Not => Value::Bool(!self.as_bool(&value, &operation.expr)?),
                    UnaryOperator::Neg => {
                        let zero = Number::from(0_u8);
                        arithmetic(BinaryOperator::Minus, zero, self.as_number(&value, &operation.expr)?, span.clone())?
                    }
                }
            }
            Expression::BinaryOp(operation) => self.binary(operation)?,
            Expression::ForExpr(expression) => self.for_expression(expression)?,
        };
        self.budget.spend(value.size(), span)?;
        Ok(value)
    }

    /// The value of `expression` as a text that is known now.
    pub(super) fn known_text(&self, expression: &Expression, what: &str) -> Result<String> {
        let value = self.evaluate(expression)?;
        let text = to_text(&value);
        match text.as_ref().and_then(Template::as_literal) {
            Some(text) => Ok(text.to_owned()),
            None if text.is_some() => Err(not_known_yet(expression.span(), what)),
            None => Err(Problem::new(expression.span(), format!("{what} must be a string, this is {}", value.kind()))),
        }
    }

    /// What stands between `${` and `}`: there, a lone name is a variable of the task (`${HOME}`, `${JOB}`).
    pub(super) fn interpolation(&self, expression: &Expression) -> Result<Value> {
        match expression {
            Expression::Variable(name) => self.variable(name.as_str(), expression.span(), true),
            other => self.evaluate(other),
        }
    }

    fn variable(&self, name: &str, span: Option<Range<usize>>, in_template: bool) -> Result<Value> {
        if let Some(value) = self.bound(name) {
            return Ok(value.clone());
        }
        if matches!(name, "var" | "local" | "env" | "node" | "attr" | "meta") {
            let problem = Problem::new(span, format!("{name:?} alone is not a value"));
            return Err(problem.hint(format!("name what you mean, as in {name}.example")));
        }
        if !self.runtime {
            return Err(Problem::new(span, format!("there is no variable named {name:?} here"))
                .hint("only var.… and local.… have a value at this place"));
        }
        if in_template || name.starts_with("NOMAD_") {
            return Ok(Value::Text(Template::reference(name)));
        }
        Err(Problem::new(span, format!("there is no variable named {name:?}"))
            .hint(format!("a string needs quotes: \"{name}\"; a variable is written var.{name}")))
    }

    pub(super) fn bound(&self, name: &str) -> Option<&'a Value> {
        let mut bound = self.bound;
        while let Some(here) = bound {
            if here.name == name {
                return Some(here.value);
            }
            bound = here.outer;
        }
        None
    }

    fn conditional(&self, conditional: &Conditional) -> Result<Value> {
        let condition = self.evaluate(&conditional.cond_expr)?;
        let chosen = match self.as_bool(&condition, &conditional.cond_expr)? {
            true => &conditional.true_expr,
            false => &conditional.false_expr,
        };
        self.evaluate(chosen)
    }

    fn call(&self, call: &FuncCall, span: Option<Range<usize>>) -> Result<Value> {
        if call.name.is_namespaced() {
            return Err(Problem::new(span, "functions of a namespace do not exist in job files"));
        }
        let mut arguments = Vec::new();
        for argument in call.args.iter() {
            arguments.push((self.evaluate(argument)?, argument.span()));
        }
        if call.args.expand_final()
            && let Some((last, at)) = arguments.pop()
        {
            let Value::List(items) = last else {
                return Err(Problem::new(at, format!("\"...\" needs a list, this is {}", last.kind())));
            };
            arguments.extend(items.into_iter().map(|item| (item, at.clone())));
        }
        functions::call(call.name.name.as_str(), call.name.name.span().or(span), arguments, self.budget)
    }

    fn for_expression(&self, expression: &ForExpr) -> Result<Value> {
        let intro = &expression.intro;
        let collection = self.entries(&intro.collection_expr)?;
        let names = (intro.key_var.as_ref().map(|name| name.as_str()), intro.value_var.as_str());
        let (mut list, mut map) = (Vec::new(), BTreeMap::<String, Value>::new());
        for (key, value) in &collection {
            self.with(names, key, value, |scope| {
                if let Some(condition) = &expression.cond {
                    let keep = scope.evaluate(&condition.expr)?;
                    if !scope.as_bool(&keep, &condition.expr)? {
                        return Ok(());
                    }
                }
                let value = scope.evaluate(&expression.value_expr)?;
                let Some(key_expression) = &expression.key_expr else {
                    list.push(value);
                    return Ok(());
                };
                let key = scope.known_text(key_expression, "an object key")?;
                if expression.grouping {
                    match map.entry(key).or_insert_with(|| Value::List(Vec::new())) {
                        Value::List(group) => group.push(value),
                        other => *other = value,
                    }
                } else {
                    match map.entry(key) {
                        Entry::Vacant(free) => {
                            free.insert(value);
                        }
                        Entry::Occupied(taken) => {
                            let message = format!("two elements have the key {:?}", taken.key());
                            let problem = Problem::new(key_expression.span(), message);
                            return Err(problem.hint("\"...\" after the value groups them"));
                        }
                    }
                }
                Ok(())
            })?;
        }
        Ok(if expression.key_expr.is_some() { Value::Map(map) } else { Value::List(list) })
    }

    /// Keys and values of a collection, in order.
    pub(super) fn entries(&self, expression: &Expression) -> Result<Vec<(Value, Value)>> {
        match self.evaluate(expression)? {
            Value::List(items) => {
                Ok(items.into_iter().enumerate().map(|(at, item)| (Value::Number(Number::from(at)), item)).collect())
            }
            Value::Map(items) => Ok(items.into_iter().map(|(key, value)| (key.into(), value)).collect()),
            other => {
                Err(Problem::new(expression.span(), format!("\"for\" needs a list or a map, this is {}", other.kind())))
            }
        }
    }

    /// Runs `body` with the names of a `for` bound.
    pub(super) fn with(
        &self,
        (key_name, value_name): (Option<&str>, &str),
        key: &Value,
        value: &Value,
        body: impl FnOnce(&Scope<'_>) -> Result<()>,
    ) -> Result<()> {
        let outer = Bound { name: value_name, value, outer: self.bound };
        match key_name {
            None => body(&Scope { bound: Some(&outer), ..*self }),
            Some(name) => {
                let inner = Bound { name, value: key, outer: Some(&outer) };
                body(&Scope { bound: Some(&inner), ..*self })
            }
        }
    }
}

pub(super) fn not_known_yet(span: Option<Range<usize>>, what: &str) -> Problem {
    Problem::new(span, format!("{what} cannot use a value that is known only when an allocation runs")).hint(
        "${NOMAD_…}, ${env[…]}, ${node.…}, ${attr.…} and ${meta.…} are put in later; they can only stand in a string",
    )
}
