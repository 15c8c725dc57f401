//! From text to a checked job: parse, evaluate, decode, validate.

use crate::decode::{closest, decode_job, evaluate_locals, evaluate_variables, header};
use crate::hcl::{Budget, Problem, Scope};
use crate::{Diagnostic, Diagnostics, Driver, Job, Location, MAX_DIAGNOSTICS, references, validate};
use hcl_edit::Span as _;
use hcl_edit::structure::{Block, Body, Structure};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;

/// Longest job file in bytes.
pub const MAX_SOURCE: usize = 1024 * 1024;

/// Most `=` and `:` in a job file: the parser compares each key of an object with all others.
const MAX_ASSIGNMENTS: usize = 10_000;

/// Stack of the thread that parses. The parser stops at 64 nested expressions and 128 chained operators, which take up to
/// 4 MiB in a build without optimisation: more than the threads of an async runtime have left.
const STACK: usize = 16 * 1024 * 1024;

/// Reads a job file. `file` is how errors call it; `variables` are the values given with `-var`.
///
/// # Errors
/// Everything that is wrong with the file, each with its place: syntax, unknown and unsupported words, wrong types,
/// and what Nomad's own validation refuses.
pub fn parse(source: &str, file: &str, variables: &BTreeMap<String, String>) -> Result<Job, Diagnostics> {
    let parse = || {
        let session = Session::new(source, file);
        let job = read(&session, variables);
        let failed = session.into_diagnostics();
        match job {
            Some(job) if failed.is_empty() => Ok(job),
            _ => Err(failed),
        }
    };
    std::thread::scope(|scope| match std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, parse) {
        Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(error) => Err(Diagnostics::single(Diagnostic {
            message: format!("no thread could be started to read {file}: {error}"),
            location: None,
            hint: None,
        })),
    })
}

/// Whether this node can run `job` at all: refuses the drivers that culvert parses but has not, by name.
///
/// # Errors
/// One error per task, with the place of its `driver`.
pub fn check_runnable(job: &Job) -> Result<(), Diagnostics> {
    let mut errors = Diagnostics::default();
    for (group_index, group) in job.groups.iter().enumerate() {
        for (index, task) in group.tasks.iter().enumerate() {
            if let Driver::Docker(_) = task.driver {
                let (group, task, driver) = (&group.name, &task.name, task.driver.as_str());
                errors.push(Diagnostic {
                    message: format!("driver {driver:?} of task {group}.{task} is not supported by culvert yet"),
                    location: job.origins.get(&driver_path(group_index, index)).cloned(),
                    hint: Some("culvert runs \"exec\" and \"raw_exec\"; see examples/countdash.nomad.hcl".to_owned()),
                });
            }
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn driver_path(group: usize, task: usize) -> String {
    format!("group.{group}.task.{task}.driver")
}

/// The file being read: its text, the errors found so far, and where everything stands.
pub(crate) struct Session {
    source: String,
    file: String,
    problems: RefCell<Vec<Problem>>,
    omitted: Cell<usize>,
    places: RefCell<BTreeMap<String, Option<Range<usize>>>>,
}

impl Session {
    pub(crate) fn new(source: &str, file: &str) -> Self {
        Self {
            source: source.to_owned(),
            file: file.to_owned(),
            problems: RefCell::default(),
            omitted: Cell::new(0),
            places: RefCell::default(),
        }
    }

    pub(crate) fn report(&self, problem: Problem) {
        if self.is_full() {
            self.omitted.set(self.omitted.get() + 1);
        } else {
            self.problems.borrow_mut().push(problem);
        }
    }

    /// Whether further errors are only counted.
    pub(crate) fn is_full(&self) -> bool {
        self.problems.borrow().len() >= MAX_DIAGNOSTICS
    }

    pub(crate) fn has_problems(&self) -> bool {
        !self.problems.borrow().is_empty()
    }

    /// Remembers where `path` stands.
    pub(crate) fn place(&self, path: &str, span: Option<Range<usize>>) {
        self.places.borrow_mut().insert(path.to_owned(), span);
    }

    /// Whether the file says something at `path`.
    pub(crate) fn is_placed(&self, path: &str) -> bool {
        self.places.borrow().contains_key(path)
    }

    /// Where `path` stands, else the nearest thing around it.
    pub(crate) fn span(&self, path: &str) -> Option<Range<usize>> {
        let places = self.places.borrow();
        let mut path = path;
        loop {
            if let Some(span) = places.get(path) {
                return span.clone();
            }
            path = path.rsplit_once('.')?.0;
        }
    }

    /// Where `text` stands in the value at `path`; the whole value, if `text` came into it from elsewhere.
    pub(crate) fn span_within(&self, path: &str, text: &str) -> Option<Range<usize>> {
        let span = self.span(path)?;
        let found = self.source.get(span.clone()).and_then(|value| value.find(text)).map(|at| span.start + at);
        Some(found.map_or(span, |start| start..start + text.len()))
    }

    fn location(&self, span: Range<usize>) -> Location {
        Location::new(&self.file, &self.source, span)
    }

    fn into_diagnostics(self) -> Diagnostics {
        let mut diagnostics = Diagnostics::default();
        let mut problems = self.problems.take();
        problems.sort_by_key(|problem| problem.span.as_ref().map_or(usize::MAX, |span| span.start));
        for Problem { span, message, hint } in problems {
            let location = span.map(|span| self.location(span));
            diagnostics.push(Diagnostic { message, location, hint });
        }
        diagnostics.omit(self.omitted.get());
        diagnostics
    }
}

fn read(session: &Session, given: &BTreeMap<String, String>) -> Option<Job> {
    if session.source.len() > MAX_SOURCE {
        let size = session.source.len();
        session.report(Problem::new(None, format!("the job file has {size} bytes; at most {MAX_SOURCE} are read")));
        return None;
    }
    let assignments = session.source.bytes().filter(|byte| matches!(byte, b'=' | b':')).count();
    if assignments > MAX_ASSIGNMENTS {
        session.report(Problem::new(None, format!("the job file sets more than {MAX_ASSIGNMENTS} values")));
        return None;
    }
    let body = parse_body(session)?;
    let top = top_level(session, &body);
    let budget = Budget::default();
    let variables = evaluate_variables(session, &budget, &top.variables, given);
    let locals = evaluate_locals(session, &budget, &variables, &top.locals);
    if session.has_problems() {
        // Each use of a variable without a value would be one more error about the same thing.
        return None;
    }
    let [job] = top.jobs.as_slice() else {
        let (span, message) = match top.jobs.get(1) {
            Some(second) => (header(second), "only one \"job\" block is allowed in a job file"),
            None => (None, "the file has no \"job\" block"),
        };
        session.report(Problem::new(span, message));
        return None;
    };
    let mut job = decode_job(session, Scope::new(&budget, &variables, &locals, true), job)?;
    validate::validate(session, &job);
    references::check(session, &job);
    for (group_index, group) in job.groups.iter().enumerate() {
        for index in 0..group.tasks.len() {
            let path = driver_path(group_index, index);
            if let Some(span) = session.span(&path) {
                job.origins.0.insert(path, session.location(span));
            }
        }
    }
    Some(job)
}

fn parse_body(session: &Session) -> Option<Body> {
    match hcl_edit::parser::parse_body(&session.source) {
        Ok(body) => Some(body),
        Err(error) => {
            let at = error.location().offset();
            let mut problem = Problem::new(Some(at..at + 1), error.message().to_owned());
            if session.source.trim_start().starts_with('{') {
                problem = problem.hint("JSON job files are not supported by culvert yet: write the job in HCL");
            } else if error.message().contains("block body") && error.line().trim_end().ends_with('{') {
                problem =
                    problem.hint("the block that opens on this line is not closed, or something in it is not HCL");
            } else if error.line().contains('{') && error.line().contains('}') {
                problem = problem.hint("a block on one line holds at most one argument and no block: break the line");
            }
            session.report(problem);
            None
        }
    }
}

/// The blocks of a job file by kind.
#[derive(Default)]
struct TopLevel<'a> {
    jobs: Vec<&'a Block>,
    variables: Vec<&'a Block>,
    locals: Vec<&'a Block>,
}

fn top_level<'a>(session: &Session, body: &'a Body) -> TopLevel<'a> {
    let mut top = TopLevel::default();
    for structure in body.iter() {
        let block = match structure {
            Structure::Block(block) => block,
            Structure::Attribute(attribute) => {
                let message = format!("{:?} cannot stand outside a block", attribute.key.as_str());
                session.report(Problem::new(attribute.key.span(), message).hint("a job file is job \"name\" { … }"));
                continue;
            }
        };
        match block.ident.as_str() {
            "job" => top.jobs.push(block),
            "variable" => top.variables.push(block),
            "locals" => top.locals.push(block),
            other => {
                let known = ["job", "variable", "locals"];
                let message = format!("a job file has no block named {other:?}");
                let hint = match closest(other, known) {
                    Some(close) => format!("did you mean \"{close}\"?"),
                    None => "a job file holds job, variable and locals".to_owned(),
                };
                session.report(Problem::new(block.ident.span(), message).hint(hint));
            }
        }
    }
    top
}
