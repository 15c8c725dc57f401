//! Commands as users type them, against a real control plane, or an agent with canned answers where a real one needs root.

mod connect;
mod fake;
mod intention;
mod job;
mod node;
mod plane;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use super::output::Output;
use super::{AgentArgs, Env, Roles, Session, run};

/// What a command left behind.
#[derive(Debug, Eq, PartialEq)]
struct Ran {
    code: u8,
    out: String,
    err: String,
}

fn roles() -> Roles {
    let fail = |_: Vec<OsString>| ExitCode::FAILURE;
    Roles { agent: |args| anyhow::bail!("agent {args:?}"), proxy: fail, worker: fail }
}

/// An hour after the epoch: canned answers date from the epoch.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(3600)
}

fn culvert_with(variables: &'static [(&'static str, &'static str)], args: &[&str]) -> Ran {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    let output = Output::new(&mut out, &mut err, false);
    let mut session = Session { env: Env(Box::new(variable)), output, now: now() };
    let code = run(args.iter().map(OsString::from), &mut session, &roles());
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Ran { code, out: text(out), err: text(err) }
}

fn culvert(args: &[&str]) -> Ran {
    culvert_with(&[], args)
}

fn said(out: &str) -> Ran {
    Ran { code: 0, out: out.to_owned(), err: String::new() }
}

#[test]
fn flags_and_variables_that_are_not_honoured_are_refused_by_name() {
    for (variables, args, name) in [
        (&[][..], &["reload", "-ca-file=x"][..], "-ca-file"),
        (&[], &["reload", "-namespace", "team"], "-namespace"),
        (&[], &["reload", "-http-addr=https://127.0.0.1:8501"], "https"),
        (&[("CONSUL_HTTP_SSL", "true")], &["reload"], "CONSUL_HTTP_SSL"),
        (&[("CONSUL_HTTP_AUTH", "a:b")], &["reload"], "CONSUL_HTTP_AUTH"),
        (&[("CONSUL_PARTITION", "p")], &["reload"], "CONSUL_PARTITION"),
        (&[], &["members"], "members"),
        (&[], &["reload", "-token-file=/nonexistent/token"], "/nonexistent/token"),
        (&[], &["job", "plan", "-var-file", "x", "y"], "-var-file"),
    ] {
        let ran = culvert_with(variables, args);
        assert!(ran.code != 0 && ran.err.contains(name), "{args:?}: {ran:?}");
    }
}

#[test]
fn help_and_version_are_good_and_spell_flags_with_one_dash() {
    for args in [&["-help"][..], &["-h"], &["--help"], &["job", "run", "-h"], &["intention", "--help"]] {
        let ran = culvert(args);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{args:?}");
        assert!(ran.out.contains("Usage: culvert") && !ran.out.contains("--"), "{args:?}: {}", ran.out);
    }
    assert_eq!(culvert(&["version"]), said(concat!("culvert v", env!("CARGO_PKG_VERSION"), "\n")));
    assert!(culvert(&[]).code == 1 && culvert(&["no-such-command"]).code == 1);
}

#[test]
fn the_agents_flags_reach_the_agent() {
    let parse = |args: &[&str]| culvert(&[&["agent"], args].concat()).err;
    let wanted = AgentArgs {
        dev: true,
        config: vec!["/a".into(), "/b".into()],
        hcl: vec!["x = -1".into(), "y = 2".into()],
        http_port: Some(-1),
        no_ebpf: true,
        encryption: Some("between-nodes".into()),
        ..AgentArgs::default()
    };
    let given = parse(&[
        "-dev",
        "-config-file",
        "/a",
        "-config-dir=/b",
        "-hcl",
        "x = -1",
        "--hcl=y = 2",
        "-http-port",
        "-1",
        "-no-ebpf",
        "-encryption=between-nodes",
    ]);
    assert_eq!(given, format!("agent {wanted:?}\n"));
    assert_eq!(parse(&["-dev=false"]), format!("agent {:?}\n", AgentArgs::default()));
}
