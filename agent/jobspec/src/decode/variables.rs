//! `variable` and `locals` blocks.

use super::reader::{At, EMPTY, Reader, Schema, label};
use crate::hcl::{Budget, Problem, Scope, Type, Value, to_bool};
use crate::parse::Session;
use hcl_edit::Span as _;
use hcl_edit::expr::{Expression, Traversal, TraversalOperator};
use hcl_edit::structure::{Attribute, Block, Structure};
use hcl_edit::visit::{Visit, visit_traversal};
use std::collections::{BTreeMap, BTreeSet};

/// Collections inside collections that a value may have: printing and comparing it recurses as deep.
const MAX_DEPTH: usize = 64;

const VARIABLE: Schema = Schema {
    block: "variable",
    attributes: &["type", "default", "description"],
    repeated: &["validation"],
    // Values of a job are shown by plan and status and kept by the agent: a promise that nobody keeps is refused.
    refused: &["sensitive", "nullable", "ephemeral"],
    ..EMPTY
};

const VALIDATION: Schema = Schema { block: "validation", attributes: &["condition", "error_message"], ..EMPTY };

/// The value of every declared variable; problems are reported.
pub(crate) fn evaluate_variables(
    session: &Session,
    budget: &Budget,
    blocks: &[&Block],
    given: &BTreeMap<String, String>,
) -> BTreeMap<String, Value> {
    let nothing = BTreeMap::new();
    let scope = Scope::new(budget, &nothing, &nothing, false);
    let mut values = BTreeMap::new();
    let mut declared = BTreeSet::new();
    for block in blocks {
        let Some(name) = label(session, block) else { continue };
        if !declared.insert(name.value.clone()) {
            session.report(Problem::new(name.span, format!("variable {:?} is declared twice", name.value)));
            continue;
        }
        let reader = Reader::open(session, scope, &VARIABLE, block, "variable".to_owned());
        if let Some(value) = variable(session, budget, &reader, &name, given.get(&name.value)) {
            values.insert(name.value, value);
        }
    }
    for name in given.keys().filter(|name| !declared.contains(*name)) {
        let message = format!("a {name:?} variable was set but was not found in known variables");
        let hint = format!("declare it in the job file: variable {name:?} {{}}");
        session.report(Problem::new(None, message).hint(hint));
    }
    values
}

fn variable(
    session: &Session,
    budget: &Budget,
    reader: &Reader<'_>,
    name: &At<String>,
    given: Option<&String>,
) -> Option<Value> {
    let kind = match reader.expression("type").map(Type::read) {
        None => Type::Any,
        Some(Ok(kind)) => kind,
        Some(Err(problem)) => {
            session.report(problem);
            return None;
        }
    };
    reader.literal("description");
    let (value, origin) = match given {
        Some(text) => (given_value(session, reader.scope, &name.value, text, &kind)?, None),
        None => match reader.expression("default") {
            Some(default) => (report(session, reader.scope.evaluate(default))?, default.span()),
            None => {
                let message =
                    format!("Unset variable {:?}: a used variable must be set or have a default value", name.value);
                let hint = format!("give it a value: -var {}=…", name.value);
                session.report(Problem::new(name.span.clone(), message).hint(hint));
                return None;
            }
        },
    };
    let wrong =
        |message| Problem::new(origin.clone(), format!("invalid value of variable {:?}: {message}", name.value));
    if value.depth() > MAX_DEPTH {
        session.report(wrong(format!("more than {MAX_DEPTH} collections inside each other")));
        return None;
    }
    let value = report(session, kind.convert(value).map_err(&wrong))?;
    for block in reader.blocks("validation") {
        validation(session, budget, reader, block, &name.value, &value);
    }
    Some(value)
}

/// The value of `-var name=text`: text for a string, an expression for everything else.
fn given_value(session: &Session, scope: Scope<'_>, name: &str, text: &str, kind: &Type) -> Option<Value> {
    if matches!(kind, Type::Any | Type::Text) {
        return Some(text.into());
    }
    // Its positions are none of the job file: the message alone tells.
    let fail = |message: &str| {
        session.report(Problem::new(None, format!("invalid value of -var {name}: {message}")));
    };
    if text.len() > crate::MAX_SOURCE {
        fail("it is too long");
        return None;
    }
    let expression = hcl_edit::parser::parse_expr(text).map_err(|error| fail(error.message())).ok()?;
    scope.evaluate(&expression).map_err(|problem| fail(&problem.message)).ok()
}

fn validation(session: &Session, budget: &Budget, reader: &Reader<'_>, block: &Block, name: &str, value: &Value) {
    let variables = BTreeMap::from([(name.to_owned(), value.clone())]);
    let nothing = BTreeMap::new();
    let scope = Scope::new(budget, &variables, &nothing, false);
    let reader = Reader::open(session, scope, &VALIDATION, block, format!("{}.validation", reader.path));
    let Some(condition) = reader.expression("condition") else { return reader.missing("condition") };
    if !reader.has("error_message") {
        return reader.missing("error_message");
    }
    let Some(message) = reader.literal("error_message") else { return };
    match scope.evaluate(condition) {
        Ok(holds) => match to_bool(&holds) {
            Some(true) => {}
            Some(false) => {
                let message = format!("invalid value of variable {name:?}: {}", message.value);
                session.report(Problem::new(condition.span(), message));
            }
            None => session.report(Problem::new(condition.span(), "\"condition\" must be true or false")),
        },
        Err(problem) => session.report(problem),
    }
}

/// The value of every local; problems are reported. Locals may refer to each other in any order, but not in a circle.
pub(crate) fn evaluate_locals(
    session: &Session,
    budget: &Budget,
    variables: &BTreeMap<String, Value>,
    blocks: &[&Block],
) -> BTreeMap<String, Value> {
    let definitions = definitions(session, blocks);
    let mut waiting: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, attribute) in &definitions {
        let mut uses = Uses::default();
        uses.visit_expr(&attribute.value);
        uses.0.retain(|used| definitions.contains_key(used.as_str()));
        waiting.insert(name, uses.0.into_iter().collect());
    }
    let mut values = BTreeMap::new();
    for name in in_order(&mut waiting) {
        let Some(attribute) = definitions.get(name.as_str()) else { continue };
        let scope = Scope::new(budget, variables, &values, true);
        match scope.evaluate(&attribute.value) {
            Ok(value) if value.depth() > MAX_DEPTH => {
                let message = format!("local {name:?} has more than {MAX_DEPTH} collections inside each other");
                session.report(Problem::new(attribute.value.span(), message));
                break;
            }
            Ok(value) => {
                values.insert(name, value);
            }
            Err(problem) => {
                session.report(problem);
                break;
            }
        }
    }
    for name in waiting.keys() {
        let span = definitions.get(name).and_then(|attribute| attribute.key.span());
        session.report(Problem::new(span, format!("local {name:?} depends on itself")));
    }
    values
}

fn definitions<'a>(session: &Session, blocks: &[&'a Block]) -> BTreeMap<&'a str, &'a Attribute> {
    let mut definitions = BTreeMap::new();
    for structure in blocks.iter().flat_map(|block| block.body.iter()) {
        match structure {
            Structure::Attribute(attribute) => {
                if definitions.insert(attribute.key.as_str(), attribute).is_some() {
                    let message = format!("local {:?} is defined twice", attribute.key.as_str());
                    session.report(Problem::new(attribute.key.span(), message));
                }
            }
            Structure::Block(block) => {
                session.report(Problem::new(block.ident.span(), "\"locals\" holds only name = value"));
            }
        }
    }
    definitions
}

/// Names so that each comes after what it uses (Kahn); what is in a circle stays in `waiting`.
fn in_order(waiting: &mut BTreeMap<&str, Vec<String>>) -> Vec<String> {
    let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut open: BTreeMap<String, usize> = BTreeMap::new();
    for (name, uses) in waiting.iter() {
        open.insert((*name).to_owned(), uses.len());
        for used in uses {
            users.entry(used.clone()).or_default().push((*name).to_owned());
        }
    }
    let mut ready: Vec<String> = open.iter().filter(|(_, count)| **count == 0).map(|(name, _)| name.clone()).collect();
    let mut order = Vec::new();
    while let Some(name) = ready.pop() {
        waiting.remove(name.as_str());
        for user in users.remove(&name).unwrap_or_default() {
            if let Some(count) = open.get_mut(&user) {
                *count -= 1;
                if *count == 0 {
                    ready.push(user);
                }
            }
        }
        order.push(name);
    }
    order
}

/// The locals that an expression names.
#[derive(Default)]
struct Uses(BTreeSet<String>);

impl Visit for Uses {
    fn visit_traversal(&mut self, node: &Traversal) {
        if let (Expression::Variable(root), Some(first)) = (&node.expr, node.operators.first())
            && let ("local", TraversalOperator::GetAttr(name)) = (root.as_str(), first.value())
        {
            self.0.insert(name.to_string());
        }
        visit_traversal(self, node);
    }
}

fn report<T>(session: &Session, result: Result<T, Problem>) -> Option<T> {
    result.map_err(|problem| session.report(problem)).ok()
}
