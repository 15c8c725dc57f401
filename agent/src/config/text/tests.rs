//! What the reader takes, what it refuses and where, and that nothing makes it panic.

use super::*;
use proptest::prelude::*;

/// The value as JSON, for comparison.
fn json(entries: &[Entry]) -> serde_json::Value {
    fn one(value: &Value) -> serde_json::Value {
        match value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::Text(text) => text.as_str().into(),
            Value::List(elements) => elements.iter().map(|node| one(&node.value)).collect(),
            Value::Object(entries) => json(entries),
        }
    }
    entries.iter().map(|entry| (entry.key.clone(), one(&entry.node.value))).collect()
}

fn read_json(text: &str) -> serde_json::Value {
    json(&read(text).unwrap_or_else(|error| panic!("{error}\n{text}")))
}

#[test]
fn hcl_1_hcl_2_and_json_give_the_same() {
    let wanted =
        serde_json::json!({"datacenter": "dc1", "ports": {"http": 8500, "grpc": -1}, "acl": {"enabled": false}});
    for text in [
        "datacenter = \"dc1\"\nports {\n http = 8500\n grpc = -1\n}\nacl = { enabled = false }\n",
        "datacenter = \"dc1\" ports { http = 8500, grpc = -1 } acl { enabled = false }",
        "{\"datacenter\": \"dc1\", \"ports\": {\"http\": 8500, \"grpc\": -1}, \"acl\": {\"enabled\": false}}",
        "# c\n\"datacenter\" = \"dc1\" // c\n/* c\n */ ports = { \"http\" = 8500, grpc = -1, }\nacl { enabled = false }",
    ] {
        assert_eq!(read_json(text), wanted, "{text}");
    }
}

#[test]
fn a_block_may_stand_inside_an_object_in_a_list() {
    let text = "config_entries { bootstrap = [ { kind = \"proxy-defaults\" name = \"global\" config { protocol = \"http\" } } ] }";
    assert_eq!(
        read_json(text),
        serde_json::json!({"config_entries": {"bootstrap": [{"kind": "proxy-defaults", "name": "global", "config": {"protocol": "http"}}]}})
    );
}

#[test]
fn labels_escapes_heredocs_and_numbers_are_understood() {
    let text = "service \"web\" \"v1\" { port = 80 }\na = \"x\\n\\u00e9\\\"${b}\"\nb = <<EOF\n  one\n two\nEOF\nc = <<-EOF\n    one\n      two\n  EOF\nd = 1.5\ne = [1, \"2\", true, null,]\nf = \"\\ud83d\\ude00\"";
    assert_eq!(
        read_json(text),
        serde_json::json!({
            "service": {"web": {"v1": {"port": 80}}}, "a": "x\né\"${b}", "b": "  one\n two\n", "c": "one\n  two\n",
            "d": 1.5, "e": [1, "2", true, null], "f": "😀"
        })
    );
}

#[test]
fn errors_name_line_and_column() {
    for (text, place, word) in [
        ("a = ", "1:5", "expected a value"),
        ("a = 1\nb =\n  yes", "3:3", "quotes"),
        ("a {\n b = 1", "2:7", "a key"),
        ("a = \"x", "1:5", "no end"),
        ("a = [1 2]", "1:8", "\",\""),
        ("a\n= 1\n}", "3:1", "a key"),
        ("a 5", "1:3", "\"=\" or a block"),
        ("a = 1x", "1:5", "no number"),
        ("a = 99999999999999999999", "1:5", "no number"),
        ("a = <<EOF\nx", "1:5", "EOF"),
        ("/* x", "1:1", "comment"),
        ("a = \"\\q\"", "1:7", "escape"),
        ("{} x", "1:4", "end of the text"),
    ] {
        let error = read(text).expect_err(text);
        assert_eq!(error.place.to_string(), place, "{text}: {error}");
        assert!(error.message.contains(word), "{text}: {error}");
    }
}

#[test]
fn nesting_has_a_limit() {
    let deep = format!("a = {}{}", "[".repeat(200_000), "]".repeat(200_000));
    assert!(read(&deep).expect_err("deep").message.contains("deeper"));
    let labels = format!("a {} {{}}", "\"x\" ".repeat(200_000));
    assert!(read(&labels).expect_err("deep").message.contains("deeper"));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "([a-z_]|[{}\\[\\]=:,\"\\\\<#/*\n -]|[0-9]|EOF|\\PC){0,80}") {
        drop(read(&text));
    }

    #[test]
    fn whatever_json_says_is_understood(value in object()) {
        let text = value.to_string();
        prop_assert_eq!(read_json(&text), value);
    }
}

fn object() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        "\\PC{0,10}".prop_map(serde_json::Value::from),
    ];
    let value = leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            proptest::collection::vec(("[a-zA-Z_ü.\"\\\\]{0,6}", inner), 0..4)
                .prop_map(|entries| serde_json::Value::Object(entries.into_iter().collect())),
        ]
    });
    proptest::collection::vec(("[a-z]{1,6}", value), 0..4)
        .prop_map(|entries| serde_json::Value::Object(entries.into_iter().collect()))
}
