//! `var.x`, `list[0]`, `map.key`, `list[*].name`, and what only an allocation knows (`env`, `node`, `attr`, `meta`).

use super::convert::{to_number, to_text};
use super::eval::{Result, Scope};
use super::{Problem, Value};
use crate::Template;
use hcl_edit::Number;
use hcl_edit::expr::{Expression, Traversal, TraversalOperator};
use std::ops::Range;

impl Scope<'_> {
    pub(super) fn traversal(&self, traversal: &Traversal, span: Option<Range<usize>>) -> Result<Value> {
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
