//! The `culvert` command: arguments, dispatch, exit codes.
//!
//! Habits of Consul and Nomad hold: flags with one dash or two, their verbs, output and exit codes (0 good, 1 error;
//! `intention check` 0 allowed, 1 denied, 2 error; `intention list` 2 for an empty list; `job plan` 0 no change, 1 change,
//! 255 error). Commands are clients of the HTTP API and print through one [`output::Output`]. What the long-running roles do
//! is not known here: [`Roles`] brings it.

mod args;
mod connect;
mod connection;
mod intention;
mod job;
mod job_logs;
mod job_status;
mod node;
mod observe;
mod output;
mod rewrite;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _};

pub use args::AgentArgs;
use args::{Cli, Command};
use output::Output;

/// Good.
const OK: u8 = 0;
/// Any error, of use or of execution.
const FAILED: u8 = 1;
/// An error of `intention check`, whose 1 means denied.
const CHECK_FAILED: u8 = 2;
/// A flag that `intention match` does not know.
const MATCH_MISUSED: u8 = 2;
/// An error of `job plan`, whose 1 means that something would change.
const PLAN_FAILED: u8 = 255;

/// The long-running roles of the binary.
#[derive(Clone, Copy, Debug)]
pub struct Roles {
    /// `culvert agent`: runs until it is told to end.
    pub agent: fn(AgentArgs) -> anyhow::Result<()>,
    /// `culvert proxy`, with Envoy's command line.
    pub proxy: fn(Vec<OsString>) -> ExitCode,
    /// `culvert worker`, started by the agent.
    pub worker: fn(Vec<OsString>) -> ExitCode,
}

/// Reads one environment variable.
type Variable = dyn Fn(&str) -> Option<String>;

/// Environment variables; an empty one counts as not set, as in Go's clients.
struct Env(Box<Variable>);

impl Env {
    fn process() -> Self {
        Self(Box::new(|name| std::env::var(name).ok()))
    }

    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }
}

/// What a command works with.
struct Session<'a> {
    env: Env,
    output: Output<'a>,
    /// For ages in tables.
    now: SystemTime,
}

/// Runs the command that the process was started with.
pub fn main(roles: &Roles) -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let rest = || std::env::args_os().skip(2).collect();
    match args.next().as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("proxy") => return (roles.proxy)(rest()),
        Some("worker") => return (roles.worker)(rest()),
        _ => {}
    }
    let env = Env::process();
    let colour = Output::wants_colour(env.get("NO_COLOR").as_deref(), env.get("TERM").as_deref());
    let (mut out, mut err) = (std::io::BufWriter::new(std::io::stdout()), std::io::stderr());
    let mut session = Session { env, output: Output::new(&mut out, &mut err, colour), now: SystemTime::now() };
    let code = run(std::env::args_os().skip(1), &mut session, roles);
    drop(session.output.flush());
    drop(out.flush());
    ExitCode::from(code)
}

/// Runs one command line (without the program's name) and returns its exit code.
fn run(args: impl IntoIterator<Item = OsString>, session: &mut Session<'_>, roles: &Roles) -> u8 {
    let mut tree = Cli::command();
    tree.build();
    let args: Vec<OsString> = args.into_iter().collect();
    let (failed, misused) = error_codes(&args);
    let is_job = args.first().is_some_and(|word| word == "job");
    let args = match rewrite::rewrite(&tree, args) {
        Ok(args) => args,
        Err(error) => {
            session.output.error(error);
            return misused;
        }
    };
    let program = std::iter::once(OsString::from("culvert"));
    let parsed = tree.try_get_matches_from(program.chain(args)).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            if let Some(refused) = job::refused_flag(&error).filter(|_| is_job) {
                session.output.error(refused);
                return misused;
            }
            return usage(&error, session, misused);
        }
    };
    match execute(cli.command, session, roles).and_then(|code| Ok(session.output.flush().map(|()| code)?)) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => OK, // `culvert observe | head` ends like this
        Err(error) => {
            session.output.error(format_args!("{error:#}"));
            failed
        }
    }
}

/// Exit codes of a command for an error, and for flags that cannot be read.
fn error_codes(args: &[OsString]) -> (u8, u8) {
    let word = |index: usize| args.get(index).and_then(|arg| arg.to_str());
    match (word(0), word(1)) {
        (Some("intention"), Some("check")) => (CHECK_FAILED, CHECK_FAILED),
        (Some("intention"), Some("match")) => (FAILED, MATCH_MISUSED),
        (Some("job"), Some("plan")) => (PLAN_FAILED, PLAN_FAILED),
        _ => (FAILED, FAILED),
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Help, version and wrong use, with flags spelled as users of Consul write them.
fn usage(error: &clap::Error, session: &mut Session<'_>, failed: u8) -> u8 {
    let text = one_dash(&error.render().to_string());
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        drop(session.output.bytes(text.as_bytes()));
        return OK;
    }
    session.output.error(text.trim_end());
    failed
}

/// `--flag` → `-flag`; a `--` that stands alone stays.
fn one_dash(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("--") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        out.push_str(before);
        out.push_str(if after.starts_with(|next: char| next.is_ascii_lowercase()) { "-" } else { "--" });
        rest = after;
    }
    out + rest
}

fn execute(command: Command, session: &mut Session<'_>, roles: &Roles) -> anyhow::Result<u8> {
    match command {
        Command::Agent(args) => (roles.agent)(*args).map(|()| OK),
        Command::Job(command) => job::run(command, session),
        Command::Intention(command) => wait(intention::run(command, session)),
        Command::Connect(args::ConnectCommand::Ca(command)) => wait(connect::ca(command, session)),
        Command::Observe(args) => wait(observe::run(&args, session)),
        Command::Status(args) => wait(node::status(&args, session)),
        Command::Services(args) => wait(node::services(&args, session)),
        Command::Members(_) => {
            anyhow::bail!("`culvert members` is not supported yet: culvert runs on one node; see `culvert status`")
        }
        Command::Reload(args) => wait(node::reload(&args, session)),
        Command::Leave(args) => wait(node::leave(&args, session)),
        Command::Version => {
            session.output.line(concat!("culvert v", env!("CARGO_PKG_VERSION")))?;
            Ok(OK)
        }
        Command::Proxy(args) | Command::Worker(args) | Command::Executor(args) => {
            anyhow::bail!("this role takes its arguments first on the command line, got {:?}", args.rest)
        }
    }
}

/// Runs a client command to its end.
fn wait(command: impl Future<Output = anyhow::Result<u8>>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start the runtime")?.block_on(command)
}

/// `key=value`, as `-var` and `-meta` take it.
fn key_value<'a>(flag: &str, text: &'a str) -> anyhow::Result<(&'a str, &'a str)> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    pair.with_context(|| format!("invalid value {text:?} for -{flag}: use key=value"))
}
