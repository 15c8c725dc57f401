//! Expressions, variables and locals.

use std::collections::BTreeMap;

use culvert_jobspec::parse;

use crate::{GOOD, case, marks, refuse};

#[test]
fn expressions_say_where_they_fail() {
    for (expression, message, marked) in [
        ("var.nope", "there is no variable named \"nope\"", "var.nope"),
        ("local.nope", "there is no local named \"nope\"", "local.nope"),
        (
            "upper(\"${NOMAD_ALLOC_ID}\")",
            "upper() cannot use a value that is known only when an allocation runs",
            "\"${NOMAD_ALLOC_ID}\"",
        ),
        ("env.A == \"x\"", "a comparison cannot use a value that is known only when an allocation runs", "env.A"),
        ("file(\"x\")", "function \"file\" is not supported by culvert yet", "file"),
        ("uper(\"x\")", "there is no function named \"uper\"", "uper"),
        ("upper()", "upper() takes 1 arguments, here are 0", "upper"),
        ("join(\",\", \"x\")", "argument 2 of join() must be a list of strings, this is a string", "\"x\""),
        ("1 / 0", "division by zero", "0"),
        ("1 + \"a\"", "a number is required, this is a string", "\"a\""),
        ("[1][3]", "element 3 of a list of 1 does not exist", "[1][3]"),
        ("{ a = 1 }.b", "the map has no element \"b\"", "{ a = 1 }.b"),
        ("\"${[1]}\"", "\"X\" in \"env\" must be a string, this is a list", "\"${[1]}\""),
        ("\"a${[1]}\"", "a list cannot stand inside a string", "[1]"),
        ("path.module", "\"path.…\" belongs to other HCL tools, not to job files", "path.module"),
        ("format(\"%d\", 1.5)", "\"%d\" needs a whole number, this is a number", "1.5"),
        ("format(\"%s\")", "format() has no argument for \"%s\"", "format"),
        ("format(\"%999999s\", 1)", "format() takes a width of at most 256", "format"),
        ("[for x in 3 : x]", "\"for\" needs a list or a map, this is a number", "3"),
    ] {
        let line = "      driver = \"exec\"";
        case(line, &format!("{line}\nenv {{\n X = {expression}\n}}"), message, marked);
    }
}

#[test]
fn variables_and_locals_say_what_is_wrong() {
    for (top, message, marked) in [
        ("variable \"a\" {}", "Unset variable \"a\": a used variable must be set or have a default value", "\"a\""),
        (
            "variable \"a\" {\n type = number\n default = \"x\"\n}",
            "invalid value of variable \"a\": a number is required, but this is a string",
            "\"x\"",
        ),
        ("variable \"a\" {\n type = \"string\"\n default = 1\n}", "\"string\" in quotes is not a type", "\"string\""),
        ("variable \"a\" {\n type = strng\n default = 1\n}", "\"strng\" is not a type", "strng"),
        (
            "variable \"a\" {\n sensitive = true\n default = 1\n}",
            "\"sensitive\" in \"variable\" is not supported by culvert yet",
            "sensitive",
        ),
        ("variable \"a\" {\n default = var.b\n}", "there is no variable named \"b\"", "var.b"),
        ("variable \"a\" {\n default = \"${NOMAD_DC}\"\n}", "there is no variable named \"NOMAD_DC\" here", "NOMAD_DC"),
        (
            "variable \"a\" {\n default = 1\n}\nvariable \"a\" {\n default = 1\n}",
            "variable \"a\" is declared twice",
            "\"a\"",
        ),
        (
            "variable \"a\" {\n default = 1\n validation {\n condition = var.a > 5\n error_message = \"too small\"\n }\n}",
            "invalid value of variable \"a\": too small",
            "var.a > 5",
        ),
        ("locals {\n a = local.a\n}", "local \"a\" depends on itself", "a"),
        ("locals {\n a = 1\n}\nlocals {\n a = 2\n}", "local \"a\" is defined twice", "a"),
    ] {
        let errors = refuse(&format!("{top}\n{GOOD}"));
        assert_eq!(marks(&errors), [(message.to_owned(), marked.to_owned())], "{top}\n{errors}");
    }
    let given = BTreeMap::from([("nope".to_owned(), "1".to_owned())]);
    let errors = parse(GOOD, "f", &given).expect_err("unknown -var");
    assert_eq!(
        marks(&errors),
        [("a \"nope\" variable was set but was not found in known variables".to_owned(), String::new())]
    );
    let source = format!("variable \"n\" {{\n type = number\n}}\n{GOOD}");
    let errors = parse(&source, "f", &BTreeMap::from([("n".to_owned(), "1 +".to_owned())])).expect_err("syntax");
    assert!(errors.to_string().starts_with("Error: invalid value of -var n: "), "{errors}");
}
