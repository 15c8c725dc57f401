//! Job files that must be refused: the words, and the text they point at.

mod expression;
mod group;
mod references;
mod service;
mod words;

use std::collections::BTreeMap;

use culvert_jobspec::{Diagnostics, MAX_DIAGNOSTICS, parse};

/// A job that is right; every case breaks one thing in it.
const GOOD: &str = r#"job "shop" {
  group "web" {
    network {
      mode = "bridge"
      port "http" {
        static = 9002
        to     = 9002
      }
    }
    service {
      name = "web"
      port = "http"
      check {
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "1s"
      }
      connect {
        sidecar_service {
          proxy {
            upstreams {
              destination_name = "api"
              local_bind_port  = 8080
            }
          }
        }
      }
    }
    task "serve" {
      driver = "exec"
      config {
        command = "/bin/serve"
      }
    }
  }
}
"#;

fn refuse(source: &str) -> Diagnostics {
    parse(source, "shop.nomad.hcl", &BTreeMap::new()).expect_err("the job must be refused")
}

/// Message and marked text of every error.
fn marks(errors: &Diagnostics) -> Vec<(String, String)> {
    let marked = |location: &culvert_jobspec::Location| {
        location.text.chars().skip(location.column - 1).take(location.width).collect::<String>()
    };
    let mark = |error: &culvert_jobspec::Diagnostic| {
        (error.message.clone(), error.location.as_ref().map(marked).unwrap_or_default())
    };
    errors.errors().iter().map(mark).collect()
}

/// Replaces `from` in [`GOOD`] by `to` and expects exactly this error at this text.
fn case(from: &str, to: &str, message: &str, marked: &str) {
    assert!(GOOD.contains(from), "{from:?} is not in the good job");
    let source = GOOD.replacen(from, to, 1);
    let errors = refuse(&source);
    assert_eq!(marks(&errors), [(message.to_owned(), marked.to_owned())], "{from:?} -> {to:?}\n{errors}");
}

#[test]
fn the_good_job_is_good() {
    parse(GOOD, "shop.nomad.hcl", &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn a_hint_says_what_is_wrong_with_a_name() {
    let errors = refuse(&GOOD.replace("destination_name = \"api\"", "destination_name = \"a..b\"")).to_string();
    assert!(errors.contains("hint: name \"a..b\" has to be usable in a server name"), "{errors}");
}

#[test]
fn an_error_shows_file_line_column_text_and_hint() {
    let errors = refuse(&GOOD.replace("driver =", "drivr ="));
    assert_eq!(
        errors.to_string(),
        r#"Error: Missing task driver

  on shop.nomad.hcl line 30, column 5:
  30:     task "serve" {
          ^^^^^^^^^^^^

  hint: add driver = "exec"

Error: "task" has no argument named "drivr"

  on shop.nomad.hcl line 31, column 7:
  31:       drivr = "exec"
            ^^^^^

  hint: did you mean "driver"?
"#
    );
}

#[test]
fn several_errors_come_at_once_in_the_order_of_the_file() {
    let source = GOOD.replace("\"5s\"", "\"5\"").replace("8080", "\"x\"").replace("\"exec\"", "\"java\"");
    assert_eq!(
        marks(&refuse(&source)).into_iter().map(|(message, _)| message).collect::<Vec<_>>(),
        [
            "\"interval\" is not a duration: \"5\"",
            "\"local_bind_port\" must be a whole number, this is a string",
            "driver \"java\" is not supported by culvert yet",
        ]
    );
}

#[test]
fn syntax_errors_have_their_place() {
    for (source, line, column) in [
        ("job \"x\" {\n  a = \n}\n", 2, 7),
        ("job \"x\" {\n", 1, 10),
        ("job \"x\" { group \"y\" {} }\n", 1, 17),
        ("job \"x\" {\n  a = 1\n  a = 2\n}\n", 3, 3),
        ("job \"x\" {\n  a = \"\\q\"\n}\n", 2, 10),
    ] {
        let errors = refuse(source);
        let location = errors.errors()[0].location.clone().expect("place");
        assert_eq!((location.line, location.column), (line, column), "{source}\n{errors}");
    }
    let one_line = refuse("job \"x\" { group \"y\" {} }\n");
    assert!(one_line.to_string().contains("break the line"), "{one_line}");
    let json = refuse("{ \"job\": {} }");
    assert!(json.to_string().contains("JSON job files are not supported"), "{json}");
}

#[test]
fn many_errors_are_counted_and_not_all_kept() {
    let many: String = (0..200).map(|n| format!("  wrong{n} = 1\n")).collect();
    let errors = refuse(&GOOD.replacen("  group", &format!("{many}  group"), 1));
    assert_eq!(errors.errors().len(), MAX_DIAGNOSTICS);
    assert!(errors.to_string().ends_with("… and 150 more errors\n"), "{errors}");
}
