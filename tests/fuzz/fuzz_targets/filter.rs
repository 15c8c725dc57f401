//! `?filter=` of the HTTP API: what is understood has an answer for any item, the opposite of which its negation gives.
#![no_main]

use std::sync::LazyLock;

use culvert_control::fuzz::{Items, MAX_DEPTH, MAX_LENGTH, filter};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

static SERVICE: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "Kind": "connect-proxy", "ID": "web-1", "Service": "web", "Tags": ["a", "v1.2"], "Port": 80,
        "Meta": {"external-source": "nomad", "a.b": "dotted", "": "no name"}, "EnableTagOverride": false,
        "Weights": {"Passing": 1, "Warning": 1}, "Proxy": {"DestinationServiceID": "Web"},
    })
});
static INTENTION: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "ID": "", "SourceNS": "default", "SourceName": "*", "DestinationName": "api", "Action": "allow",
        "Precedence": 8, "Meta": {"a": "b"},
    })
});

fuzz_target!(|text: &str| {
    for (items, item) in
        [(Items::Services, &*SERVICE), (Items::Intentions, &*INTENTION), (Items::Services, &Value::Null)]
    {
        match filter(text, items, item) {
            Ok(verdict) => {
                assert!(text.len() <= MAX_LENGTH);
                assert!(verdict.depth <= MAX_DEPTH + 1, "{verdict:?}"); // a negated operator adds one to its comparison
                if let Ok(negation) = filter(&format!("not ({text})"), items, item) {
                    assert_ne!(negation.passes, verdict.passes);
                }
            }
            Err(error) => assert!(error.status == 500 && !error.message.is_empty()), // 500 is Consul's
        }
    }
});
