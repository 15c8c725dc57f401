//! The rules mean what `decide` says: evaluated by a naive reading of Envoy's documentation.

use culvert_types::{Datacenter, DecidedBy, ServiceIdentity, decide};
use proptest::prelude::*;

use super::*;

const TD: &str = "11111111-2222-3333-4444-555555555555.consul";

fn trust_domain() -> TrustDomain {
    TrustDomain::new(TD).expect("valid")
}

fn service(name: &str) -> ServiceName {
    ServiceName::new(name).expect("name")
}

fn id_in(trust_domain: &TrustDomain, name: &ServiceName, datacenter: &str) -> String {
    let datacenter = Datacenter::new(datacenter).expect("name");
    let (trust_domain, service) = (trust_domain.clone(), name.clone());
    ServiceIdentity { trust_domain, datacenter, service }.to_string()
}

/// Does Envoy let the peer with this URI through, and which policy matched?
fn evaluate(rules: &Rules, id: &str) -> (bool, Vec<String>) {
    let matching: Vec<String> = rules
        .policies
        .iter()
        .filter(|(_, policy)| {
            let permitted = policy.permissions.iter().any(|one| one.rule == Some(Rule::Any(true)));
            permitted && policy.principals.iter().any(|one| principal_matches(one, id))
        })
        .map(|(name, _)| name.clone())
        .collect();
    let allowed = match RbacAction::try_from(rules.action).expect("an action") {
        RbacAction::Allow => !matching.is_empty(),
        RbacAction::Deny => matching.is_empty(),
        RbacAction::Log => panic!("never rendered"),
    };
    (allowed, matching)
}

fn principal_matches(principal: &Principal, id: &str) -> bool {
    match principal.identifier.as_ref().expect("an identifier") {
        Identifier::AndIds(set) => set.ids.iter().all(|one| principal_matches(one, id)),
        Identifier::NotId(other) => !principal_matches(other, id),
        Identifier::Authenticated(Authenticated { principal_name: Some(name) }) => match &name.match_pattern {
            Some(MatchPattern::SafeRegex(regex)) => regex_matches(&regex.regex, id),
            other => panic!("not rendered: {other:?}"),
        },
        other => panic!("not rendered: {other:?}"),
    }
}

/// The part of regular expressions that is rendered: literals, `\.` and `[^/]+`, matched against the whole text.
fn regex_matches(regex: &str, text: &str) -> bool {
    fn rest(regex: &str, text: &str) -> bool {
        if let Some(after) = regex.strip_prefix("[^/]+") {
            let run = text.find('/').unwrap_or(text.len());
            return (1..=run).filter(|end| text.is_char_boundary(*end)).any(|end| rest(after, &text[end..]));
        }
        let (regex, escaped) = regex.strip_prefix('\\').map_or((regex, false), |after| (after, true));
        let Some(wanted) = regex.chars().next() else { return text.is_empty() };
        assert!(escaped || !".*+?()[]{}|^$\\".contains(wanted), "special character in {regex}");
        text.strip_prefix(wanted).is_some_and(|text| rest(&regex[wanted.len_utf8()..], text))
    }
    rest(regex.strip_prefix('^').expect("anchored").strip_suffix('$').expect("anchored"), text)
}

const NAMES: [&str; 5] = ["web", "web.v2", "webxv2", "api", "db-1_x"];

fn subject() -> impl Strategy<Value = IntentionSubject> {
    prop_oneof![
        3 => proptest::sample::select(&NAMES[..]).prop_map(|name| IntentionSubject::Exact(service(name))),
        1 => Just(IntentionSubject::Any),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Allow), Just(Action::Deny)]
}

fn intentions() -> impl Strategy<Value = Vec<Intention>> {
    let one = (subject(), subject(), action()).prop_map(|(source, destination, action)| Intention {
        source,
        destination,
        action,
    });
    proptest::collection::vec(one, 0..12)
}

proptest! {
    #[test]
    fn rules_say_what_decide_says(
        intentions in intentions(),
        destination in proptest::sample::select(&NAMES[..]),
        default in action(),
        datacenter in proptest::sample::select(&["dc1", "dc2", "a.b"][..]),
    ) {
        let destination = service(destination);
        let about: Vec<Intention> = intentions.iter().filter(|one| one.destination.covers(&destination)).cloned().collect();
        let rules = rules(&about, default, &trust_domain());
        for source in NAMES.iter().map(|name| service(name)).chain([service("stranger")]) {
            let decision = decide(&intentions, &source, &destination, default);
            let (allowed, policies) = evaluate(&rules, &id_in(&trust_domain(), &source, datacenter));
            prop_assert_eq!(allowed, decision.allowed(), "{} to {}: {:?}", source, destination, rules);
            // The policy that matches is the one of the rule that decided, and no other.
            let expected = match decision.by {
                DecidedBy::Intention(rule) if rule.action != default => vec![policy_name(rule)],
                _ => Vec::new(),
            };
            prop_assert_eq!(policies, expected);
        }
    }

    #[test]
    fn with_default_deny_nobody_from_another_trust_domain_or_without_a_service_gets_in(intentions in intentions()) {
        let rules = rules(&intentions, Action::Deny, &trust_domain());
        let foreign = TrustDomain::new("99999999-2222-3333-4444-555555555555.consul").expect("valid");
        let lookalike = TrustDomain::new(&TD.replace(".consul", "xconsul")).expect("valid");
        for name in NAMES.map(service) {
            for domain in [&foreign, &lookalike] {
                prop_assert!(!evaluate(&rules, &id_in(domain, &name, "dc1")).0);
            }
            let id = id_in(&trust_domain(), &name, "dc1");
            for wrong in [format!("{id}/x"), format!("x{id}"), id.replace("/svc/", "/agent/"), id.replace("default", "other")] {
                prop_assert!(!evaluate(&rules, &wrong).0, "{}", wrong);
            }
        }
        prop_assert!(!evaluate(&rules, &trust_domain().id()).0);
        prop_assert!(!evaluate(&rules, "").0);
    }
}

#[test]
fn without_intentions_the_default_is_spelled_out() {
    let deny = rules(&[], Action::Deny, &trust_domain());
    assert_eq!((deny.action, deny.policies.len()), (RbacAction::Allow as i32, 0), "allow nobody");
    let allow = rules(&[], Action::Allow, &trust_domain());
    assert_eq!((allow.action, allow.policies.len()), (RbacAction::Deny as i32, 0), "deny nobody, as Consul writes it");
}

#[test]
fn principals_have_consuls_form() {
    let allow = |source: &str| Intention {
        source: source.parse().expect("subject"),
        destination: "api".parse().expect("subject"),
        action: Action::Allow,
    };
    let rules = rules(&[allow("web.v2")], Action::Deny, &trust_domain());
    let text = format!("{rules:?}");
    let regex = r"^spiffe://11111111-2222-3333-4444-555555555555\\.consul/ns/default/dc/[^/]+/svc/web\\.v2$";
    assert!(text.contains(regex), "{text}");
    assert!(rules.policies.contains_key("web.v2 => api (allow, precedence 9)"), "{text}");
}

#[test]
fn an_intention_that_never_decides_has_no_policy() {
    let rule = |source: &str, destination: &str, action| Intention {
        source: source.parse().expect("subject"),
        destination: destination.parse().expect("subject"),
        action,
    };
    let intentions = [
        rule("*", "api", Action::Deny),
        rule("web", "*", Action::Allow),
        rule("*", "*", Action::Allow),
        rule("db", "api", Action::Allow),
    ];
    let rules = rules(&intentions, Action::Deny, &trust_domain());
    assert_eq!(rules.policies.keys().collect::<Vec<_>>(), ["db => api (allow, precedence 9)"]);
}
