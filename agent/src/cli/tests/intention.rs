//! `culvert intention` against a real control plane.

use super::plane::Plane;
use super::{Ran, culvert, said};

#[test]
fn intentions_are_made_asked_listed_and_deleted_as_in_consul() {
    let plane = Plane::start();
    assert_eq!(
        plane.intention("list", &[]),
        Ran { code: 2, out: String::new(), err: "There are no intentions.\n".into() }
    );
    assert_eq!(plane.intention("check", &["web", "api"]), said("Allowed\n"));
    assert_eq!(plane.intention("create", &["-deny", "*", "api"]), said("Created: * => api (deny)\n"));
    assert_eq!(plane.intention("check", &["web", "api"]), Ran { code: 1, out: "Denied\n".into(), err: String::new() });
    assert_eq!(plane.intention("create", &["web", "api"]), said("Created: web => api (allow)\n"));
    assert_eq!(plane.intention("check", &["web", "api"]), said("Allowed\n"));
    assert_eq!(plane.intention("match", &["api"]), said("web => api (allow)\n* => api (deny)\n"));
    assert_eq!(plane.intention("create", &["web", "*"]), said("Created: web => * (allow)\n"));
    assert_eq!(
        plane.intention("match", &["-source", "web"]),
        said("web => api (allow)\n* => api (deny)\nweb => * (allow)\n")
    );
    assert_eq!(plane.intention("match", &["-source", "db"]), said("* => api (deny)\n"));
    assert_eq!(plane.intention("delete", &["web", "*"]), said("Intention deleted.\n"));
    let list = plane.intention("list", &[]);
    let lines: Vec<Vec<&str>> = list.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "Source", "Action", "Destination", "Precedence"]);
    assert_eq!(lines[1][1..], ["web", "allow", "api", "9"]);
    assert_eq!(lines[2][1..], ["*", "deny", "api", "8"]);
    assert_eq!(plane.intention("delete", &["web", "api"]), said("Intention deleted.\n"));
    assert_eq!(plane.intention("delete", &[lines[2][0]]), said("Intention deleted.\n"));
    assert_eq!(plane.intention("delete", &["web", "api"]), said("Intention deleted.\n"), "as in Consul");
    let gone = plane.intention("delete", &[lines[2][0]]);
    assert_eq!((gone.code, gone.out.as_str()), (1, ""));
    assert!(gone.err.contains("Intention not found"), "{}", gone.err);
}

#[test]
fn the_namespace_default_may_be_written_and_is_not_printed() {
    let plane = Plane::start();
    assert_eq!(
        plane.intention("create", &["default/web", "default/default/api"]),
        said("Created: web => api (allow)\n")
    );
    for name in ["api", "default/api", "default/default/api"] {
        assert_eq!(plane.intention("match", &[name]), said("web => api (allow)\n"), "{name}");
    }
    assert_eq!(plane.intention("create", &["-replace", "-deny", "default/web", "api"]), said(""));
    assert_eq!(plane.intention("check", &["default/web", "default/api"]).out, "Denied\n");
    let other = plane.intention("create", &["team/web", "api"]);
    assert_eq!(other.code, 1);
    assert!(
        other.err.starts_with("Error creating intention \"team/web => api (allow)\"")
            && other.err.contains("Namespaces")
    );
    assert!(plane.intention("create", &["a/b/c/d", "api"]).err.contains("more than three parts"));
    assert_eq!(plane.intention("delete", &["default/web", "api"]), said("Intention deleted.\n"));
    assert_eq!(plane.intention("list", &[]).code, 2);
}

#[test]
fn a_second_intention_for_a_pair_is_an_error_unless_it_replaces() {
    let plane = Plane::start();
    assert_eq!(plane.intention("create", &["-allow", "web", "api"]).code, 0);
    let again = plane.intention("create", &["-deny", "web", "api"]);
    assert_eq!(again.code, 1);
    let wanted =
        "Error creating intention \"web => api (deny)\": Unexpected response code: 500 (duplicate intention found:";
    assert!(again.err.starts_with(wanted), "{}", again.err);
    assert_eq!(plane.intention("create", &["-deny", "-replace", "web", "api"]), said(""));
    assert_eq!(plane.intention("check", &["web", "api"]).code, 1);
    assert_eq!(plane.intention("create", &["-replace", "new", "api"]), said("Created: new => api (allow)\n"));
}

#[test]
fn get_shows_the_fields_in_two_columns() {
    let plane = Plane::start();
    assert_eq!(plane.intention("create", &["-meta", "team=core", "web", "api"]).code, 0);
    let shown = plane.intention("get", &["web", "api"]).out;
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[..3], ["Source:       web", "Destination:  api", "Action:       allow"], "{shown}");
    let line = |name: &str| lines.iter().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{shown}"));
    assert_eq!(line("Meta[team]:").trim(), "core");
    assert!(line("Created At:").trim_end().ends_with(" UTC"), "{shown}");
    let id = line("ID:").trim().to_owned();
    assert_eq!(plane.intention("get", &[&id]).out, shown);
    let missing = plane.intention("get", &["a", "b"]);
    assert_eq!(
        (missing.code, missing.err.as_str()),
        (1, "Intention with source \"a\" and destination \"b\" not found.\n")
    );
}

#[test]
fn intentions_come_from_files_too() {
    let plane = Plane::start();
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let good = file("good.json", r#"{"SourceName": "web", "DestinationName": "api", "Action": "deny"}"#);
    assert_eq!(plane.intention("create", &["-file", &good]), said("Created: web => api (deny)\n"));
    let bad = file("bad.json", r#"{"SourceName": "web", "Colour": 1}"#);
    let refused = plane.intention("create", &["-f", &bad]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("unknown field \"Colour\"") && refused.err.contains("bad.json"), "{}", refused.err);
    assert_eq!(plane.intention("create", &["-file", "-deny", &good]).code, 1);
}

#[test]
fn wrong_use_of_intention_commands_is_refused_in_consuls_words() {
    for (args, code, text) in [
        (&["intention", "create", "-allow", "-deny", "a", "b"][..], 1, "Only one of -allow or -deny may be specified."),
        (&["intention", "create", "a"], 1, "Must specify two arguments: source and destination"),
        (&["intention", "check", "a"], 2, "command requires exactly two arguments: src and dst"),
        (&["intention", "check", "-no-such-flag", "a", "b"], 2, "'-no-such-flag'"),
        (&["intention", "match", "-no-such-flag", "a"], 2, "'-no-such-flag'"),
        (&["intention", "match", "-source=perhaps", "a"], 2, "invalid boolean value"),
        (&["intention", "match"], 1, "command requires exactly one argument"),
        (&["intention", "match", "-source", "-destination", "a"], 1, "only one of -source or -destination"),
        (&["intention", "get"], 1, "1 or 2 args"),
    ] {
        let ran = culvert(args);
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{args:?}: {}", ran.err);
        assert!(ran.err.contains(text), "{args:?}: {}", ran.err);
    }
}

#[test]
fn a_check_that_cannot_be_asked_is_no_denial() {
    let ran = culvert(&["intention", "check", "-http-addr", &unused_address(), "web", "api"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("cannot reach the agent at 127.0.0.1:"), "{}", ran.err);
}

/// An address where nobody listens: the port was free a moment ago.
fn unused_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}
