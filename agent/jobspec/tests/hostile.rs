//! Whatever the text, `parse` answers: no panic, no overflow of the stack, no unbounded work.

use culvert_jobspec::{MAX_SOURCE, parse};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SEED: &str = include_str!("jobs/seed_000.nomad.hcl");
const EXAMPLE: &str = include_str!("../../../examples/countdash.nomad.hcl");

/// Parses on a stack of 256 KiB: what is left on a thread that is deep in something else.
fn parse_on_a_small_stack(source: String) -> Option<String> {
    let thread = std::thread::Builder::new().stack_size(256 * 1024).spawn(move || {
        let variables = BTreeMap::from([("bin".to_owned(), "/opt".to_owned())]);
        parse(&source, "hostile.nomad.hcl", &variables).err().map(|errors| errors.to_string())
    });
    thread.expect("thread").join().expect("parse must not panic")
}

fn in_locals(expression: &str) -> String {
    format!("locals {{\n  x = {expression}\n}}\n")
}

#[test]
fn deep_nesting_is_refused_and_not_followed() {
    for depth in [30, 60, 200, 100_000] {
        for (open, close) in [
            ("[", "]"),
            ("(", ")"),
            ("{ a = ", "}"),
            ("\"${", "}\""),
            ("-", ""),
            ("!", ""),
            ("f(", ")"),
            ("true ? ", " : 1"),
            ("[for x in ", " : x]"),
            ("a[", "]"),
        ] {
            let source = in_locals(&format!("{}1{}", open.repeat(depth), close.repeat(depth)));
            assert!(parse_on_a_small_stack(source).is_some(), "{open} {depth}");
        }
        let blocks = format!("{}{}", "a {\n".repeat(depth), "}\n".repeat(depth));
        assert!(parse_on_a_small_stack(blocks).is_some());
        let unclosed = format!("{}{}", "a {\n".repeat(depth), "%{ if ".repeat(depth));
        assert!(parse_on_a_small_stack(unclosed).is_some());
    }
}

#[test]
fn long_chains_are_refused_or_evaluated() {
    for operators in [100, 100_000] {
        assert!(parse_on_a_small_stack(in_locals(&format!("1{}", " + 1".repeat(operators)))).is_some());
        assert!(parse_on_a_small_stack(in_locals(&format!("{{}}{}", ".a".repeat(operators)))).is_some());
    }
    let chain: String = (0..9_000).map(|n| format!("  l{} = [local.l{n}]\n", n + 1)).collect();
    let errors = parse_on_a_small_stack(format!("locals {{\n  l0 = 1\n{chain}}}\n")).expect("too deep");
    assert!(errors.contains("more than 64 collections inside each other"), "{errors}");
}

#[test]
fn values_that_double_themselves_run_out_of_budget() {
    let doubling: String = (0..60).map(|n| format!("  l{} = \"${{local.l{n}}}${{local.l{n}}}\"\n", n + 1)).collect();
    let lists: String = (0..60).map(|n| format!("  l{} = concat(local.l{n}, local.l{n})\n", n + 1)).collect();
    let loops = "[for a in local.l : [for b in local.l : [for c in local.l : [for d in local.l : a]]]]";
    let many = vec!["1"; 300].join(", ");
    let replaced: String =
        (0..60).map(|n| format!("  l{} = replace(local.l{n}, \"a\", \"aaaaaaaaaaaaaaaa\")\n", n + 1)).collect();
    for source in [
        format!("locals {{\n  l0 = \"abcdefgh\"\n{doubling}}}\n"),
        format!("locals {{\n  l0 = [1]\n{lists}}}\n"),
        format!("locals {{\n  l = [{many}]\n  x = {loops}\n}}\n"),
        format!("locals {{\n  l0 = \"a\"\n{replaced}}}\n"),
    ] {
        let errors = parse_on_a_small_stack(source).expect("refused");
        assert!(errors.contains("too much time or memory"), "{errors}");
    }
}

#[test]
fn a_file_that_is_too_large_is_not_read() {
    let errors = parse_on_a_small_stack(" ".repeat(MAX_SOURCE + 1)).expect("too large");
    assert!(errors.contains("at most"), "{errors}");
}

#[test]
fn large_files_of_one_kind_are_answered() {
    // A quarter of what is read, and just below the limit of assignments: enough to show what grows too fast.
    let fill = |piece: &str| piece.repeat(MAX_SOURCE / 4 / piece.len());
    let numbered = |make: &dyn Fn(usize) -> String| (0..9_900).map(make).collect::<String>();
    let task = |body: &str| {
        format!(
            "job \"j\" {{\n group \"g\" {{\n  network {{\n   mode = \"bridge\"\n  }}\n  task \"t\" {{\n   driver = \"exec\"\n{body}\n  }}\n }}\n}}\n"
        )
    };
    for source in [
        format!("job \"j\" {{\n{}}}\n", fill("group \"g\" {\n}\n")),
        format!("job \"j\" {{\n{}}}\n", fill("unknown {\n}\n")),
        format!("job \"j\" {{\n{}}}\n", numbered(&|n| format!("un{n}known = 1\n"))),
        format!("locals {{\n{}}}\n", numbered(&|n| format!("l{n} = local.l{}\n", n + 1))),
        format!("locals {{\n x = [{}]\n}}\n", fill("1,")),
        format!("locals {{\n x = {{\n{}}}\n}}\n", numbered(&|n| format!("k{n} = 1\n"))),
        numbered(&|n| format!("variable \"v{n}\" {{}}\n")),
        numbered(&|_| "variable \"v\" {\n default = 1\n}\n".to_owned()),
        task(&format!("env {{\n{}}}\n", numbered(&|n| format!("E{n} = \"${{E{}}}\"\n", n + 1)))),
        task(&fill("service {\n connect {\n }\n}\n")),
        fill("\u{00e9}"),
        fill("\"${"),
        fill("<<E\n"),
        fill("/*"),
    ] {
        assert!(parse_on_a_small_stack(source).is_some());
    }
}

/// Characters and words that mean something in a job file.
fn fragments() -> impl Strategy<Value = String> {
    let words = [
        "{",
        "}",
        "\"",
        "${",
        "%{",
        "[",
        "]",
        "(",
        ")",
        "=",
        ",",
        "\n",
        " ",
        "job",
        "group",
        "\"x\"",
        "task",
        "service",
        "check",
        "connect",
        "sidecar_service",
        "proxy",
        "upstreams",
        "network",
        "port",
        "null",
        "true",
        "-1",
        "1e400",
        "99999999999999999999",
        "<<-E\n",
        "E\n",
        "for",
        "in",
        ":",
        "?",
        "if",
        "...",
        ".*",
        "[*]",
        "~",
        "var.bin",
        "local.x",
        "NOMAD_X",
        "env[\"A\"]",
        "#",
        "/*",
        "*/",
        "\\",
        "\u{0}",
        "\u{feff}",
        "é",
        "\r\n",
        "variable",
        "locals",
        "type",
        "list(",
        "format(\"%d\", ",
        "join(",
    ];
    proptest::collection::vec(proptest::sample::select(words.to_vec()), 1..12).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_text_is_answered(source in "\\PC{0,300}") {
        parse_on_a_small_stack(source);
    }

    #[test]
    fn any_words_are_answered(source in fragments()) {
        parse_on_a_small_stack(source.clone());
        parse_on_a_small_stack(in_locals(&source));
    }

    #[test]
    fn any_edit_of_a_good_job_is_answered(
        example: bool,
        at in 0usize..4000,
        remove in 0usize..80,
        insert in proptest::option::of(fragments()),
    ) {
        let source = if example { EXAMPLE } else { SEED };
        let chars: Vec<char> = source.chars().collect();
        let at = at.min(chars.len());
        let end = (at + remove).min(chars.len());
        let (head, tail): (String, String) = (chars[..at].iter().collect(), chars[end..].iter().collect());
        parse_on_a_small_stack(format!("{head}{}{tail}", insert.unwrap_or_default()));
    }
}
