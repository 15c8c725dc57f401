use proptest::prelude::*;
use serde_json::json;

use super::*;

fn item() -> Value {
    json!({
        "Kind": "connect-proxy", "ID": "web-1", "Service": "web", "Tags": ["a", "v1.2"], "Port": 80,
        "Meta": {"external-source": "nomad", "a.b": "dotted"}, "EnableTagOverride": false,
        "Weights": {"Passing": 1, "Warning": 1}, "Proxy": {"DestinationServiceID": "Web"},
    })
}

fn passes(text: &str) -> bool {
    Filter::parse(text, AGENT_SERVICE).unwrap_or_else(|err| panic!("{text}: {err}")).matches(&item())
}

#[test]
fn says_what_go_bexpr_says() {
    for text in [
        "Service == web",
        "Service == \"web\"",
        "Service==`web`",
        "Service != api",
        "\"a\" in Tags",
        "a in Tags",
        "Tags contains \"v1.2\"",
        "\"b\" not in Tags",
        "Tags not contains b",
        "Tags is not empty",
        "Address is empty",
        "Meta.external-source == nomad",
        "Meta[\"external-source\"] == nomad",
        "Meta[\"a.b\"] == dotted",
        "\"external-source\" in Meta",
        "Meta.none != \"\"",
        "Port == 80",
        "Port != 81",
        "EnableTagOverride == false",
        "Weights.Passing == 1",
        "Kind == \"connect-proxy\" and Proxy.DestinationServiceID == Web",
        "Service == api or Service == web and Port == 80",
        "not Service == api",
        "not (Service == api or Port == 81)",
        "(Service == api or Service == web) and Port == 80",
        "eb in Service",
        "Service contains eb",
        "Connect.Native == false",
    ] {
        assert!(passes(text), "{text}");
        assert!(!passes(&format!("not ({text})")), "not {text}");
    }
    for text in ["Meta.none == \"\"", "Service == Web", "web in Tags", "Tags is empty", "Connect.Native == true"] {
        assert!(!passes(text), "{text}");
    }
}

#[test]
fn refuses_what_it_does_not_understand() {
    for (text, part) in [
        ("", "expected a selector"),
        ("Service", "expected an operator"),
        ("Service ==", "expected a value"),
        ("Service = web", "unexpected character"),
        ("Service == web and", "expected a selector"),
        ("Service == web Port == 80", "expected \"and\", \"or\""),
        ("(Service == web", "expected \")\""),
        ("Service == \"web", "Unterminated string literal"),
        ("Service matches \"w.*\"", "\"matches\" is not supported"),
        ("Service not matches \"w.*\"", "\"matches\" is not supported"),
        ("any Tags as tag { tag == a }", "unexpected character"),
        ("any Tags", "not supported"),
        ("Nothing == web", "Selector \"Nothing\" is not valid"),
        ("Service.Name == web", "Selector \"Service.Name\" is not valid"),
        ("Proxy is empty", "Selector \"Proxy\" is not valid"),
        ("Tags == a", "Invalid match operator \"Equal\""),
        ("Port in 80", "Selector \"80\" is not valid"),
        ("80 in Port", "Invalid match operator \"In\""),
        ("Port == eighty", "Failed to coerce"),
        ("Meta.a.b == x", "is not valid"),
        ("Meta[\"a\" == x", "expected \"]\""),
    ] {
        let err = Filter::parse(text, AGENT_SERVICE).expect_err(text).to_string();
        assert!(err.contains(part), "{text}: {err}");
    }
    let deep = format!("{}Service == web{}", "(".repeat(500), ")".repeat(500));
    assert!(Filter::parse(&deep, AGENT_SERVICE).is_err());
    let chain = vec!["Service == web"; 200].join(" or ");
    assert!(Filter::parse(&chain, AGENT_SERVICE).expect_err("a long chain").to_string().contains("too deeply"));
    let long = format!("Service == {}", "w".repeat(MAX_LENGTH));
    assert!(matches!(Filter::parse(&long, AGENT_SERVICE), Err(FilterError::TooLong(_))));
}

/// A random expression as text, and what it must say.
fn expression() -> impl Strategy<Value = (String, bool)> {
    let name = prop_oneof![Just("web"), Just("api")];
    let leaf = prop_oneof![
        name.clone().prop_map(|name| (format!("Service == {name}"), name == "web")),
        name.prop_map(|name| (format!("Service != \"{name}\""), name != "web")),
        (79..82_i64).prop_map(|port| (format!("Port == {port}"), port == 80)),
        "[a-c]".prop_map(|tag| (format!("`{tag}` in Tags"), tag == "a")),
    ];
    leaf.prop_recursive(4, 24, 2, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|((l, x), (r, y))| (format!("({l}) and ({r})"), x && y)),
            (inner.clone(), inner.clone()).prop_map(|((l, x), (r, y))| (format!("({l} or ({r}))"), x || y)),
            inner.prop_map(|(text, value)| (format!("not ({text})"), !value)),
        ]
    })
}

proptest! {
    #[test]
    fn composed_expressions_say_what_their_parts_say((text, expected) in expression()) {
        prop_assert_eq!(passes(&text), expected, "{}", text);
    }

    #[test]
    fn no_text_breaks_the_parser(text in "[ -~é\\[\\]\"`()=!.andornotinis ]{0,60}") {
        if let Ok(filter) = Filter::parse(&text, SERVICE_ENTRY) {
            filter.matches(&Value::Null);
        }
    }

    #[test]
    fn a_quoted_value_survives(value in "[^`]{0,20}") {
        let text = format!("Service == `{value}`");
        let filter = Filter::parse(&text, AGENT_SERVICE).expect("quoted");
        let item = json!({"Service": value});
        prop_assert!(filter.matches(&item));
    }
}
