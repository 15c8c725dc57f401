//! `decide()` against an oracle that is too simple to be wrong.

use culvert_types::{Action, DecidedBy, Intention, IntentionSubject, ServiceName, decide};
use proptest::prelude::*;

const NAMES: [&str; 3] = ["web", "api", "db"];

fn name(n: usize) -> ServiceName {
    ServiceName::new(NAMES[n % NAMES.len()]).expect("a name")
}

/// Position 0 is "any".
fn subject(n: usize) -> IntentionSubject {
    if n == 0 { IntentionSubject::Any } else { IntentionSubject::Exact(name(n - 1)) }
}

fn action(allow: bool) -> Action {
    if allow { Action::Allow } else { Action::Deny }
}

fn intention() -> impl Strategy<Value = Intention> {
    (0..4_usize, 0..4_usize, any::<bool>()).prop_map(|(source, destination, allow)| Intention {
        source: subject(source),
        destination: subject(destination),
        action: action(allow),
    })
}

/// Asks for each shape of rule by name, from the most to the least specific, as the documentation lists them.
fn oracle(rules: &[Intention], source: &ServiceName, destination: &ServiceName, default: Action) -> Action {
    let exact = |name: &ServiceName| IntentionSubject::Exact(name.clone());
    let shapes = [
        (exact(source), exact(destination)),
        (IntentionSubject::Any, exact(destination)),
        (exact(source), IntentionSubject::Any),
        (IntentionSubject::Any, IntentionSubject::Any),
    ];
    for (source, destination) in shapes {
        let found: Vec<Action> = rules
            .iter()
            .filter(|rule| rule.source == source && rule.destination == destination)
            .map(|rule| rule.action)
            .collect();
        if found.contains(&Action::Deny) {
            return Action::Deny;
        }
        if !found.is_empty() {
            return Action::Allow;
        }
    }
    default
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn decides_as_the_oracle(
        rules in prop::collection::vec(intention(), 0..10),
        source in 0..3_usize,
        destination in 0..3_usize,
        allow in any::<bool>(),
    ) {
        let (source, destination, default) = (name(source), name(destination), action(allow));
        let decision = decide(&rules, &source, &destination, default);
        prop_assert_eq!(decision.action, oracle(&rules, &source, &destination, default));
        match decision.by {
            DecidedBy::Default => prop_assert!(!rules.iter().any(|rule| rule.matches(&source, &destination))),
            DecidedBy::Intention(rule) => {
                prop_assert!(rule.matches(&source, &destination));
                prop_assert_eq!(rule.action, decision.action);
                let higher = |other: &Intention| other.precedence() > rule.precedence();
                prop_assert!(!rules.iter().any(|other| other.matches(&source, &destination) && higher(other)));
            }
        }
    }

    #[test]
    fn order_of_the_rules_does_not_matter(
        rules in prop::collection::vec(intention(), 0..10),
        source in 0..3_usize,
        destination in 0..3_usize,
    ) {
        let mut reversed = rules.clone();
        reversed.reverse();
        let (source, destination) = (name(source), name(destination));
        let decide = |rules: &[Intention]| decide(rules, &source, &destination, Action::Deny).action;
        prop_assert_eq!(decide(&rules), decide(&reversed));
    }

    #[test]
    fn a_more_specific_rule_always_wins(allow in any::<bool>(), source in 0..3_usize, destination in 0..3_usize) {
        let (from, to) = (IntentionSubject::Exact(name(source)), IntentionSubject::Exact(name(destination)));
        let any = IntentionSubject::Any;
        let rule = |source: &IntentionSubject, destination: &IntentionSubject, action| Intention {
            source: source.clone(), destination: destination.clone(), action,
        };
        let (verdict, opposite) = (action(allow), action(!allow));
        let others = [rule(&any, &to, opposite), rule(&from, &any, opposite), rule(&any, &any, opposite)];
        let rules = [others.to_vec(), vec![rule(&from, &to, verdict)]].concat();
        prop_assert_eq!(decide(&rules, &name(source), &name(destination), opposite).action, verdict);
    }
}
