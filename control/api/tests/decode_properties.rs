//! Properties of the decoder: the spelling of keys never matters, and no input makes it panic.

use culvert_api::{AgentService, CheckDefinition, Intention, ServiceRegistration, decode, decode_known, decode_value};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// A registration that uses structures, lists, maps, durations and free settings.
fn sample() -> Value {
    json!({
        "ID": "web1", "Name": "web", "Tags": ["a", "b"], "Port": 80, "EnableTagOverride": true, "Meta": {"Key_A": "v"},
        "Weights": {"Passing": 3, "Warning": 1},
        "Checks": [{"CheckID": "c", "HTTP": "http://127.0.0.1/", "Interval": "10s", "TLSSkipVerify": true,
            "DeregisterCriticalServiceAfter": "1m", "H2PingUseTLS": false, "GRPCUseTLS": true, "OSService": "x"}],
        "Connect": {"SidecarService": {"Port": 20000, "Proxy": {"Config": {"Bind_Port": 1},
            "LocalServicePort": 80, "MutualTLSMode": "strict",
            "Upstreams": [{"DestinationName": "api", "LocalBindPort": 8080, "MeshGateway": {"Mode": "none"}}]}}}
    })
}

/// Keys of these hold data, not field names.
const FREE: [&str; 2] = ["Meta", "Config"];

#[derive(Clone, Copy, Debug)]
enum Style {
    Lower,
    Upper,
    Snake,
    Alternating,
}

fn respell(key: &str, style: Style) -> String {
    match style {
        Style::Lower => key.to_lowercase(),
        Style::Upper => key.to_uppercase(),
        Style::Snake => snake(key),
        Style::Alternating => {
            let flip = |(index, byte): (usize, char)| if index % 2 == 0 { byte.to_ascii_lowercase() } else { byte };
            key.chars().enumerate().map(flip).collect()
        }
    }
}

/// `DeregisterCriticalServiceAfter` → `deregister_critical_service_after`, `TLSSkipVerify` → `tls_skip_verify`.
fn snake(key: &str) -> String {
    let letters: Vec<char> = key.chars().collect();
    let mut out = String::new();
    for (index, letter) in letters.iter().enumerate() {
        let after_lower = index > 0 && letters[index - 1].is_lowercase();
        let ends_acronym = index > 0 && letters.get(index + 1).is_some_and(|next| next.is_lowercase());
        if letter.is_uppercase() && (after_lower || ends_acronym) {
            out.push('_');
        }
        out.extend(letter.to_lowercase());
    }
    out
}

/// Respells every field name of `value`, taking the styles in turn.
fn respell_all(value: &Value, styles: &mut impl Iterator<Item = Style>) -> Value {
    match value {
        Value::Object(fields) => {
            let mut out = Map::new();
            for (key, value) in fields {
                let inner = if FREE.contains(&key.as_str()) { value.clone() } else { respell_all(value, styles) };
                out.insert(respell(key, styles.next().expect("endless")), inner);
            }
            Value::Object(out)
        }
        Value::Array(elements) => elements.iter().map(|element| respell_all(element, styles)).collect(),
        other => other.clone(),
    }
}

fn style() -> impl Strategy<Value = Style> {
    prop_oneof![Just(Style::Lower), Just(Style::Upper), Just(Style::Snake), Just(Style::Alternating)]
}

fn json_value() -> impl Strategy<Value = Value> {
    let key = prop_oneof![
        Just("Name"),
        Just("port"),
        Just("Checks"),
        Just("connect"),
        Just("sidecar_service"),
        Just("Interval"),
        Just("Meta"),
        Just("Tags"),
        Just("Proxy"),
        Just("Action"),
        Just("CreatedAt"),
        Just("?")
    ]
    .prop_map(str::to_owned);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9:µ*-]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((key.clone(), inner), 0..5)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn spelling_of_keys_does_not_matter(styles in proptest::collection::vec(style(), 1..40)) {
        let expected: ServiceRegistration = decode_value(sample()).expect("the sample decodes");
        let respelled = respell_all(&sample(), &mut styles.into_iter().cycle());
        let decoded: ServiceRegistration = decode_value(respelled.clone()).map_err(|error| {
            TestCaseError::fail(format!("{error}: {respelled}"))
        })?;
        prop_assert_eq!(decoded, expected);
    }

    #[test]
    fn the_last_of_two_spellings_wins(first in style(), second in style(), a in any::<u16>(), b in any::<u16>()) {
        let (first, second) = (respell("LocalBindPort", first), respell("LocalBindPort", second));
        let body = format!("{{\"{first}\":{a},\"{second}\":{b}}}");
        let upstream: culvert_api::Upstream = decode(body.as_bytes()).expect("decodes");
        prop_assert_eq!(upstream.local_bind_port, b);
    }

    #[test]
    fn a_key_with_a_letter_too_many_is_refused(letter in "[a-zA-Z]", style in style()) {
        let key = format!("{}{letter}", respell("LocalBindPort", style));
        let refused = decode::<culvert_api::Upstream>(format!("{{\"{key}\":1}}").as_bytes());
        prop_assert_eq!(refused, Err(culvert_api::DecodeError::UnknownField { name: key }));
    }

    #[test]
    fn null_anywhere_is_the_zero_value(name in "(Tags|Meta|Checks|Check|Proxy|Connect|Port|Name|Weights|EnableTagOverride)") {
        let body = format!("{{\"{name}\":null}}");
        prop_assert_eq!(decode::<ServiceRegistration>(body.as_bytes()), Ok(ServiceRegistration::default()));
    }

    #[test]
    fn no_json_makes_it_panic_and_what_it_accepts_it_accepts_again(value in json_value()) {
        if let Ok(service) = decode_value::<ServiceRegistration>(value.clone()) {
            let again = serde_json::to_vec(&service).expect("JSON");
            prop_assert_eq!(decode::<ServiceRegistration>(&again), Ok(service));
        }
        let text = value.to_string();
        // Only that they return is of interest.
        drop(decode::<CheckDefinition>(text.as_bytes()));
        drop(decode::<Intention>(text.as_bytes()));
        drop(decode_known::<AgentService>(text.as_bytes()));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        drop(decode::<ServiceRegistration>(&bytes));
    }
}
