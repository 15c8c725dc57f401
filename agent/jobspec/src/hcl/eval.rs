//! Evaluation of expressions and string templates.
//!
//! `var.x` and `local.x` have values now. `NOMAD_…`, `env`, `node`, `attr` and `meta` have one only when an allocation
//! runs: they become references inside the string, and may not be computed with.

use super::convert::{to_bool, to_number, to_text};
use super::{Problem, Value, functions};
use crate::Template;
use hcl_edit::expr::{
    BinaryOp, BinaryOperator, Conditional, Expression, ForExpr, FuncCall, ObjectKey, Traversal, TraversalOperator,
    UnaryOperator,
};
use hcl_edit::template::{Directive, Element, ForDirective, IfDirective};
use hcl_edit::{Number, Span as _};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

/// Units of work that the expressions of one job file may cost together: one per expression evaluated and one per byte
/// or element of what it yields. `for` inside `for` and locals that double each other end here.
pub(crate) const MAX_WORK: usize = 16 * 1024 * 1024;

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

type Result<T, E = Problem> = std::result::Result<T, E>;

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
    fn known_text(&self, expression: &Expression, what: &str) -> Result<String> {
        let value = self.evaluate(expression)?;
        let text = to_text(&value);
        match text.as_ref().and_then(Template::as_literal) {
            Some(text) => Ok(text.to_owned()),
            None if text.is_some() => Err(not_known_yet(expression.span(), what)),
            None => Err(Problem::new(expression.span(), format!("{what} must be a string, this is {}", value.kind()))),
        }
    }

    /// What stands between `${` and `}`: there, a lone name is a variable of the task (`${HOME}`, `${JOB}`).
    fn interpolation(&self, expression: &Expression) -> Result<Value> {
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

    fn bound(&self, name: &str) -> Option<&'a Value> {
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

    fn traversal(&self, traversal: &Traversal, span: Option<Range<usize>>) -> Result<Value> {
        let operators: Vec<&TraversalOperator> = traversal.operators.iter().map(|operator| operator.value()).collect();
        let Expression::Variable(root) = &traversal.expr else {
            let value = self.evaluate(&traversal.expr)?;
            return self.walk(value, &operators, span);
        };
        let root = root.as_str();
        if let Some(value) = self.bound(root) {
            self.budget.spend(value.size(), span.clone())?;
            return self.walk(value.clone(), &operators, span);
        }
        match root {
            "var" | "local" => {
                let (known, what) = if root == "var" { (self.variables, "variable") } else { (self.locals, "local") };
                let Some((TraversalOperator::GetAttr(name), rest)) = operators.split_first() else {
                    return Err(Problem::new(span, format!("write {root}.name")));
                };
                let Some(value) = known.get(name.as_str()) else {
                    let problem = Problem::new(span, format!("there is no {what} named {:?}", name.as_str()));
                    let close = crate::decode::closest(name.as_str(), known.keys().map(String::as_str));
                    return Err(match close {
                        Some(close) => problem.hint(format!("did you mean {root}.{close}?")),
                        None if what == "variable" => {
                            problem.hint(format!("declare it: variable \"{}\" {{}}", name.as_str()))
                        }
                        None => problem.hint(format!("define it: locals {{ {} = … }}", name.as_str())),
                    });
                };
                self.budget.spend(value.size(), span.clone())?;
                self.walk(value.clone(), rest, span)
            }
            "env" | "node" | "attr" | "meta" if self.runtime => self.runtime_reference(root, &operators, span),
            "path" | "each" | "data" | "build" | "source" => {
                Err(Problem::new(span, format!("\"{root}.…\" belongs to other HCL tools, not to job files")))
            }
            _ => Err(Problem::new(span, format!("there is nothing named {root:?} here"))
                .hint("known are var, local, env, node, attr and meta")),
        }
    }

    /// `env["HOME"]`, `node.unique.name`, `attr.kernel.name`, `meta.rack`, `meta["a.b"]`.
    fn runtime_reference(
        &self,
        root: &str,
        operators: &[&TraversalOperator],
        span: Option<Range<usize>>,
    ) -> Result<Value> {
        let mut names = Vec::new();
        for operator in operators {
            names.push(match operator {
                TraversalOperator::GetAttr(name) => name.to_string(),
                TraversalOperator::Index(key) => self.known_text(key, "the name in brackets")?,
                TraversalOperator::LegacyIndex(index) => index.value().to_string(),
                TraversalOperator::AttrSplat(_) | TraversalOperator::FullSplat(_) => {
                    return Err(Problem::new(span, format!("\"*\" has no meaning after {root:?}")));
                }
            });
        }
        let name = names.join(".");
        if name.is_empty() || name.contains(|c: char| c.is_control() || matches!(c, '"' | '{' | '}' | '$' | '\\')) {
            return Err(Problem::new(span, format!("{name:?} cannot be the name of a value of {root:?}")));
        }
        let reference = if root == "env" { format!("env[\"{name}\"]") } else { format!("{root}.{name}") };
        Ok(Value::Text(Template::reference(reference)))
    }

    /// Applies `.name`, `[index]` and `[*]` to `value`.
    fn walk(&self, mut value: Value, operators: &[&TraversalOperator], span: Option<Range<usize>>) -> Result<Value> {
        for (at, operator) in operators.iter().enumerate() {
            value = match operator {
                TraversalOperator::GetAttr(name) => member(value, &name.as_str().into(), span.clone())?,
                TraversalOperator::LegacyIndex(index) => {
                    member(value, &Value::Number(Number::from(*index.value())), span.clone())?
                }
                TraversalOperator::Index(index) => {
                    let index = self.evaluate(index)?;
                    member(value, &index, span.clone())?
                }
                TraversalOperator::FullSplat(_) | TraversalOperator::AttrSplat(_) => {
                    let items = match value {
                        Value::List(items) => items,
                        Value::Null => Vec::new(),
                        single => vec![single],
                    };
                    let rest = &operators[at + 1..];
                    let each = |item| self.walk(item, rest, span.clone());
                    return Ok(Value::List(items.into_iter().map(each).collect::<Result<_>>()?));
                }
            };
        }
        Ok(value)
    }

    fn binary(&self, operation: &BinaryOp) -> Result<Value> {
        let (lhs, rhs) = (&operation.lhs_expr, &operation.rhs_expr);
        let operator = *operation.operator.value();
        let left = self.evaluate(lhs)?;
        if let BinaryOperator::And | BinaryOperator::Or = operator {
            // Short circuit, so that `var.x != null && var.x > 1` works.
            let left = self.as_bool(&left, lhs)?;
            if left == (operator == BinaryOperator::Or) {
                return Ok(Value::Bool(left));
            }
            let right = self.evaluate(rhs)?;
            return Ok(Value::Bool(self.as_bool(&right, rhs)?));
        }
        let right = self.evaluate(rhs)?;
        match operator {
            BinaryOperator::Eq | BinaryOperator::NotEq => {
                self.known(&left, lhs)?;
                self.known(&right, rhs)?;
                Ok(Value::Bool((left == right) == (operator == BinaryOperator::Eq)))
            }
            BinaryOperator::And | BinaryOperator::Or => Ok(Value::Null), // answered above
            BinaryOperator::Less | BinaryOperator::LessEq | BinaryOperator::Greater | BinaryOperator::GreaterEq => {
                let (left, right) = (self.as_number(&left, lhs)?, self.as_number(&right, rhs)?);
                let order = left.partial_cmp(&right);
                Ok(Value::Bool(match operator {
                    BinaryOperator::Less => order.is_some_and(|order| order.is_lt()),
                    BinaryOperator::LessEq => order.is_some_and(|order| order.is_le()),
                    BinaryOperator::Greater => order.is_some_and(|order| order.is_gt()),
                    _ => order.is_some_and(|order| order.is_ge()),
                }))
            }
            _ => arithmetic(operator, self.as_number(&left, lhs)?, self.as_number(&right, rhs)?, rhs.span()),
        }
    }

    fn known(&self, value: &Value, expression: &Expression) -> Result<()> {
        let pending = |text: &Template| text.as_literal().is_none();
        let unknown = match value {
            Value::Text(text) => pending(text),
            Value::List(items) => return items.iter().try_for_each(|item| self.known(item, expression)),
            Value::Map(items) => return items.values().try_for_each(|item| self.known(item, expression)),
            _ => false,
        };
        if unknown { Err(not_known_yet(expression.span(), "a comparison")) } else { Ok(()) }
    }

    fn as_bool(&self, value: &Value, expression: &Expression) -> Result<bool> {
        self.known(value, expression)?;
        let wrong = || Problem::new(expression.span(), format!("true or false is required, this is {}", value.kind()));
        to_bool(value).ok_or_else(wrong)
    }

    fn as_number(&self, value: &Value, expression: &Expression) -> Result<Number> {
        self.known(value, expression)?;
        let wrong = || Problem::new(expression.span(), format!("a number is required, this is {}", value.kind()));
        to_number(value).ok_or_else(wrong)
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
    fn entries(&self, expression: &Expression) -> Result<Vec<(Value, Value)>> {
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
    fn with(
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

    /// The text of a template; `strip_first` and `strip_last` are the `~` of what encloses it.
    fn elements(&self, elements: Vec<&Element>, strip_first: bool, strip_last: bool) -> Result<Template> {
        let mut out = Template::default();
        for (at, element) in elements.iter().enumerate() {
            match element {
                Element::Literal(text) => {
                    let mut text = text.as_str();
                    let before = at.checked_sub(1).map(|at| elements[at]);
                    if before.map_or(strip_first, |element| strips(element).1) {
                        text = text.trim_start();
                    }
                    if elements.get(at + 1).map_or(strip_last, |element| strips(element).0) {
                        text = text.trim_end();
                    }
                    out.push_str(text);
                }
                Element::Interpolation(part) => {
                    let value = self.interpolation(&part.expr)?;
                    let wrong = || {
                        let message = format!("{} cannot stand inside a string", value.kind());
                        Problem::new(part.expr.span(), message)
                            .hint("jsonencode(…) or join(\", \", …) makes it a string")
                    };
                    out.append(&to_text(&value).ok_or_else(wrong)?);
                }
                Element::Directive(directive) => match directive.as_ref() {
                    Directive::If(directive) => out.append(&self.if_directive(directive)?),
                    Directive::For(directive) => self.for_directive(directive, &mut out)?,
                },
            }
            self.budget.spend(1, None)?;
        }
        self.budget.spend(out.size(), None)?;
        Ok(out)
    }

    fn if_directive(&self, directive: &IfDirective) -> Result<Template> {
        let start = &directive.if_expr;
        let condition = self.evaluate(&start.cond_expr)?;
        let holds = self.as_bool(&condition, &start.cond_expr)?;
        let end_strip = directive.endif_expr.strip.strip_start();
        match (&directive.else_expr, holds) {
            (None, false) => Ok(Template::default()),
            (None, true) => self.elements(start.template.iter().collect(), start.strip.strip_end(), end_strip),
            (Some(other), true) => {
                let strip_last = other.strip.strip_start();
                self.elements(start.template.iter().collect(), start.strip.strip_end(), strip_last)
            }
            (Some(other), false) => self.elements(other.template.iter().collect(), other.strip.strip_end(), end_strip),
        }
    }

    fn for_directive(&self, directive: &ForDirective, out: &mut Template) -> Result<()> {
        let start = &directive.for_expr;
        let names = (start.key_var.as_ref().map(|name| name.as_str()), start.value_var.as_str());
        let (strip_first, strip_last) = (start.strip.strip_end(), directive.endfor_expr.strip.strip_start());
        for (key, value) in &self.entries(&start.collection_expr)? {
            self.with(names, key, value, |scope| {
                out.append(&scope.elements(start.template.iter().collect(), strip_first, strip_last)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Whether `element` strips blanks before and after itself.
fn strips(element: &Element) -> (bool, bool) {
    match element {
        Element::Literal(_) => (false, false),
        Element::Interpolation(part) => (part.strip.strip_start(), part.strip.strip_end()),
        Element::Directive(directive) => match directive.as_ref() {
            Directive::If(it) => (it.if_expr.strip.strip_start(), it.endif_expr.strip.strip_end()),
            Directive::For(it) => (it.for_expr.strip.strip_start(), it.endfor_expr.strip.strip_end()),
        },
    }
}

/// `value[key]`.
pub(super) fn member(value: Value, key: &Value, span: Option<Range<usize>>) -> Result<Value> {
    let text = to_text(key);
    let name = || text.as_ref().map_or_else(|| key.kind().to_owned(), ToString::to_string);
    match value {
        Value::List(mut items) => {
            let index = to_number(key).and_then(|number| number.as_u64()).and_then(|index| usize::try_from(index).ok());
            match index {
                Some(index) if index < items.len() => Ok(items.swap_remove(index)),
                Some(index) => {
                    Err(Problem::new(span, format!("element {index} of a list of {} does not exist", items.len())))
                }
                None => Err(Problem::new(span, format!("a list is indexed by a number, not by {}", name()))),
            }
        }
        Value::Map(mut items) => match items.remove(&name()) {
            Some(value) => Ok(value),
            None => Err(Problem::new(span, format!("the map has no element {:?}", name()))),
        },
        other => Err(Problem::new(span, format!("{} has no elements", other.kind()))),
    }
}

fn arithmetic(operator: BinaryOperator, left: Number, right: Number, span: Option<Range<usize>>) -> Result<Value> {
    let whole = |number: Number| number.as_i64().map(i128::from);
    let exact = match (operator, whole(left), whole(right)) {
        (BinaryOperator::Plus, Some(left), Some(right)) => Some(left + right),
        (BinaryOperator::Minus, Some(left), Some(right)) => Some(left - right),
        (BinaryOperator::Mul, Some(left), Some(right)) => Some(left * right),
        (BinaryOperator::Div, Some(left), Some(right)) if right != 0 && left % right == 0 => Some(left / right),
        (BinaryOperator::Mod, Some(left), Some(right)) if right != 0 => Some(left % right),
        _ => None,
    };
    if let Some(exact) = exact.and_then(|exact| i64::try_from(exact).ok()) {
        return Ok(Value::Number(Number::from(exact)));
    }
    let (Some(left), Some(right)) = (left.as_f64(), right.as_f64()) else {
        return Err(Problem::new(span, "this number is out of range"));
    };
    if right == 0.0 && matches!(operator, BinaryOperator::Div | BinaryOperator::Mod) {
        return Err(Problem::new(span, "division by zero"));
    }
    let result = match operator {
        BinaryOperator::Plus => left + right,
        BinaryOperator::Minus => left - right,
        BinaryOperator::Mul => left * right,
        BinaryOperator::Div => left / right,
        _ => left % right,
    };
    Number::from_f64(result).map(Value::Number).ok_or_else(|| Problem::new(span, "the result is out of range"))
}

pub(super) fn not_known_yet(span: Option<Range<usize>>, what: &str) -> Problem {
    Problem::new(span, format!("{what} cannot use a value that is known only when an allocation runs")).hint(
        "${NOMAD_…}, ${env[…]}, ${node.…}, ${attr.…} and ${meta.…} are put in later; they can only stand in a string",
    )
}
