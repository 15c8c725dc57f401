//! RBAC from the wire to the verdict, against a naive evaluation of a model of the same rules.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use culvert_proxy::config::Explain;
use culvert_proxy::config::parse::{MAX_RBAC_DEPTH, parse_listener};
use culvert_proxy::rbac::{Cidr, Connection, Rbac, RbacAction, evaluate};
use culvert_types::{Action as IntentionAction, Intention};
use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3::permission::{Rule, Set as RuleSet};
use envoy_types::pb::envoy::config::rbac::v3::principal::{Authenticated, Identifier, Set as IdSet};
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal, Rbac as PbRbac};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as RbacFilter;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::UInt32Value;
use proptest::prelude::*;

use super::resources::{self, PUBLIC, TRUST_DOMAIN, filter, id, inbound, matcher, regex, tcp_proxy};

const SERVICES: [&str; 4] = ["web", "web2", "api", "db"];

/// Who connects.
#[derive(Clone, Debug)]
enum Who {
    Any,
    Authenticated,
    Exact(&'static str),
    Prefix(&'static str),
    Regex(&'static str),
    From(u8, u32),
    And(Vec<Who>),
    Or(Vec<Who>),
    Not(Box<Who>),
}

/// What for.
#[derive(Clone, Debug)]
enum What {
    Any,
    Port(u16),
    And(Vec<What>),
    Or(Vec<What>),
    Not(Box<What>),
}

#[derive(Clone, Debug)]
struct Caller {
    service: Option<&'static str>,
    host: u8,
    port: u16,
}

impl Who {
    fn to_pb(&self) -> Principal {
        let named = |name| Identifier::Authenticated(Authenticated { principal_name: Some(name) });
        let set = |all: &[Who]| IdSet { ids: all.iter().map(Who::to_pb).collect() };
        let identifier = match self {
            Who::Any => Identifier::Any(true),
            Who::Authenticated => Identifier::Authenticated(Authenticated { principal_name: None }),
            Who::Exact(service) => named(matcher(MatchPattern::Exact(id(service)))),
            Who::Prefix(service) => named(matcher(MatchPattern::Prefix(id(service)))),
            Who::Regex(service) => {
                named(regex(&format!("^spiffe://{TRUST_DOMAIN}/ns/default/dc/[^/]+/svc/{service}$")))
            }
            Who::From(host, length) => Identifier::DirectRemoteIp(CidrRange {
                address_prefix: format!("10.0.0.{host}"),
                prefix_len: Some(UInt32Value { value: *length }),
            }),
            Who::And(all) => Identifier::AndIds(set(all)),
            Who::Or(any) => Identifier::OrIds(set(any)),
            Who::Not(other) => Identifier::NotId(Box::new(other.to_pb())),
        };
        Principal { identifier: Some(identifier) }
    }

    fn matches(&self, caller: &Caller) -> bool {
        match self {
            Who::Any => true,
            Who::Authenticated => caller.service.is_some(),
            Who::Exact(service) | Who::Regex(service) => caller.service == Some(service),
            Who::Prefix(service) => caller.service.is_some_and(|caller| caller.starts_with(service)),
            Who::From(host, length) => u32::from(*host) >> (32 - length) == u32::from(caller.host) >> (32 - length),
            Who::And(all) => !all.iter().any(|one| !one.matches(caller)),
            Who::Or(any) => any.iter().any(|one| one.matches(caller)),
            Who::Not(other) => !other.matches(caller),
        }
    }
}

impl What {
    fn to_pb(&self) -> Permission {
        let set = |all: &[What]| RuleSet { rules: all.iter().map(What::to_pb).collect() };
        let rule = match self {
            What::Any => Rule::Any(true),
            What::Port(port) => Rule::DestinationPort(u32::from(*port)),
            What::And(all) => Rule::AndRules(set(all)),
            What::Or(any) => Rule::OrRules(set(any)),
            What::Not(other) => Rule::NotRule(Box::new(other.to_pb())),
        };
        Permission { rule: Some(rule) }
    }

    fn matches(&self, caller: &Caller) -> bool {
        match self {
            What::Any => true,
            What::Port(port) => *port == caller.port,
            What::And(all) => !all.iter().any(|one| !one.matches(caller)),
            What::Or(any) => any.iter().any(|one| one.matches(caller)),
            What::Not(other) => !other.matches(caller),
        }
    }
}

type Policies = BTreeMap<String, (Vec<What>, Vec<Who>)>;

/// Which policy decides: the statement of Envoy's documentation, word for word.
fn naive(action: Action, policies: &Policies, caller: &Caller) -> (bool, Option<String>) {
    let matching = policies.iter().find(|(_, (what, who))| {
        what.iter().any(|one| one.matches(caller)) && who.iter().any(|one| one.matches(caller))
    });
    let name = matching.map(|(name, _)| name.clone());
    (if action == Action::Allow { name.is_some() } else { name.is_none() }, name)
}

fn to_filter(action: Action, policies: &Policies) -> RbacFilter {
    let policy = |(what, who): &(Vec<What>, Vec<Who>)| Policy {
        permissions: what.iter().map(What::to_pb).collect(),
        principals: who.iter().map(Who::to_pb).collect(),
        ..Policy::default()
    };
    let policies: HashMap<_, _> = policies.iter().map(|(name, both)| (name.clone(), policy(both))).collect();
    let rules = PbRbac { action: action as i32, policies, ..PbRbac::default() };
    RbacFilter { rules: Some(rules), ..RbacFilter::default() }
}

fn parsed(filters: &[RbacFilter]) -> Vec<Rbac> {
    let filters = filters.iter().map(filter).chain([filter(&tcp_proxy("local_app"))]).collect();
    let parsed = parse_listener(PUBLIC, &resources::any(&inbound(filters))).expect("listener");
    assert_eq!(parsed.complaint, None);
    parsed.listener.rbac.to_vec()
}

fn who() -> impl Strategy<Value = Who> {
    let service = || proptest::sample::select(&SERVICES[..]);
    let leaf = prop_oneof![
        Just(Who::Any),
        Just(Who::Authenticated),
        service().prop_map(Who::Exact),
        service().prop_map(Who::Prefix),
        service().prop_map(Who::Regex),
        (0..4_u8, 28..=32_u32).prop_map(|(host, length)| Who::From(host, length)),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..3).prop_map(Who::And),
            proptest::collection::vec(inner.clone(), 1..3).prop_map(Who::Or),
            inner.prop_map(|other| Who::Not(Box::new(other))),
        ]
    })
}

fn what() -> impl Strategy<Value = What> {
    let leaf = prop_oneof![Just(What::Any), (21000..21003_u16).prop_map(What::Port)];
    leaf.prop_recursive(2, 6, 2, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..3).prop_map(What::And),
            proptest::collection::vec(inner.clone(), 1..3).prop_map(What::Or),
            inner.prop_map(|other| What::Not(Box::new(other))),
        ]
    })
}

fn policies() -> impl Strategy<Value = Policies> {
    let both = (proptest::collection::vec(what(), 1..3), proptest::collection::vec(who(), 1..3));
    proptest::collection::btree_map("[a-d]", both, 0..3)
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Allow), Just(Action::Deny)]
}

fn caller() -> impl Strategy<Value = Caller> {
    let service = proptest::option::of(proptest::sample::select(&SERVICES[..]));
    (service, 0..4_u8, 21000..21003_u16).prop_map(|(service, host, port)| Caller { service, host, port })
}

fn judge(filters: &[Rbac], caller: &Caller, mapped: bool) -> (bool, Option<String>) {
    let v4 = Ipv4Addr::new(10, 0, 0, caller.host);
    let peer = if mapped { IpAddr::V6(v4.to_ipv6_mapped()) } else { IpAddr::V4(v4) };
    let identity = caller.service.map(id);
    let connection = Connection {
        identity: identity.as_deref(),
        peer: SocketAddr::new(peer, 40000),
        local: SocketAddr::new(Ipv4Addr::new(10, 0, 0, 100).into(), caller.port),
    };
    let decision = evaluate(filters, &connection);
    (decision.allowed, decision.policy.map(|name| name.to_string()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn agrees_with_a_naive_evaluation(action in action(), policies in policies(), caller in caller(), mapped in any::<bool>()) {
        let filters = parsed(&[to_filter(action, &policies)]);
        prop_assert_eq!(judge(&filters, &caller, mapped), naive(action, &policies, &caller));
    }

    #[test]
    fn every_filter_has_to_allow(first in (action(), policies()), second in (action(), policies()), caller in caller()) {
        let filters = parsed(&[to_filter(first.0, &first.1), to_filter(second.0, &second.1)]);
        let expected = naive(first.0, &first.1, &caller).0 && naive(second.0, &second.1, &caller).0;
        prop_assert_eq!(judge(&filters, &caller, false).0, expected);
    }
}

#[test]
fn empty_lists_mean_deny_for_allow_and_allow_for_deny() {
    let caller = Caller { service: Some("web"), host: 1, port: 21000 };
    assert_eq!(judge(&parsed(&[to_filter(Action::Allow, &Policies::new())]), &caller, false), (false, None));
    assert_eq!(judge(&parsed(&[to_filter(Action::Deny, &Policies::new())]), &caller, false), (true, None));
    assert_eq!(judge(&[Rbac::deny_all()], &caller, false), (false, None));
}

#[test]
fn a_public_listener_without_rules_denies() {
    let caller = Caller { service: Some("web"), host: 1, port: 21000 };
    for filters in [vec![], vec![RbacFilter::default()]] {
        assert_eq!(parsed(&filters), [Rbac::deny_all()]);
        assert_eq!(judge(&parsed(&filters), &caller, false), (false, None));
    }
}

#[test]
fn consuls_pattern_takes_every_datacenter_and_no_other_service() {
    let filters = parsed(&[resources::rbac(Action::Allow, &["web"])]);
    let allowed = |identity: &str| {
        let (peer, local) = (SocketAddr::from(([10, 0, 0, 1], 1)), SocketAddr::from(([10, 0, 0, 2], 21000)));
        evaluate(&filters, &Connection { identity: Some(identity), peer, local }).allowed
    };
    assert!(allowed(&id("web")) && allowed(&id("web").replace("dc1", "dc2")));
    for other in [id("web2"), id("db"), format!("{}/x", id("web")), id("web").replace(TRUST_DOMAIN, "evil.consul")] {
        assert!(!allowed(&other), "{other}");
    }
}

#[test]
fn rules_nested_too_deeply_are_a_complaint_and_deny() {
    let mut deep = Who::Any;
    for _ in 0..=MAX_RBAC_DEPTH {
        deep = Who::Not(Box::new(deep));
    }
    let policies = Policies::from([("deep".to_owned(), (vec![What::Any], vec![deep]))]);
    let filters = vec![filter(&to_filter(Action::Deny, &policies)), filter(&tcp_proxy("local_app"))];
    let parsed = parse_listener(PUBLIC, &resources::any(&inbound(filters))).expect("listener");
    let complaint = parsed.complaint.expect("complaint").to_string();
    assert!(complaint.contains("not_id.not_id") && complaint.ends_with("more than 16 levels"), "{complaint}");
    assert_eq!(*parsed.listener.rbac, [Rbac::deny_all()]);
}

#[test]
fn networks_contain_their_addresses_in_both_families() {
    let network = |address: &str, length| Cidr::new(address.parse().expect("address"), length).expect("network");
    let address = |text: &str| text.parse::<IpAddr>().expect("address");
    assert!(network("10.1.0.0", 16).contains(address("10.1.2.3")));
    assert!(!network("10.1.0.0", 16).contains(address("10.2.2.3")));
    assert!(network("0.0.0.0", 0).contains(address("203.0.113.1")));
    assert!(!network("0.0.0.0", 0).contains(address("2001:db8::1")));
    assert!(network("2001:db8::", 32).contains(address("2001:db8::1")));
    assert!(network("::", 0).contains(Ipv6Addr::LOCALHOST.into()));
    assert!(network("10.0.0.1", 32).contains(address("::ffff:10.0.0.1")));
    assert_eq!(Cidr::new(address("10.0.0.1"), 33), None);
}

#[test]
fn explanations_name_the_intention_and_never_a_wrong_reason() {
    let intention = |source: &str, action| Intention {
        source: source.parse().expect("subject"),
        destination: "api".parse().expect("subject"),
        action,
    };
    let explain = Explain {
        destination: "api".parse().expect("service"),
        default: IntentionAction::Deny,
        intentions: [intention("web", IntentionAction::Allow), intention("db", IntentionAction::Deny)].into(),
    };
    let filters = parsed(&[resources::rbac(Action::Allow, &["web"])]);
    let (peer, local) = (SocketAddr::from(([10, 0, 0, 1], 1)), SocketAddr::from(([10, 0, 0, 2], 21000)));
    let rule = |explain: &Explain, identity: Option<&str>| {
        let decision = evaluate(&filters, &Connection { identity, peer, local });
        explain.rule(identity, &decision)
    };
    assert_eq!(rule(&explain, Some(&id("web"))), "web => api (allow, precedence 9)");
    assert_eq!(rule(&explain, Some(&id("db"))), "db => api (deny, precedence 9)");
    assert_eq!(rule(&explain, Some(&id("web2"))), "default");
    assert_eq!(rule(&explain, None), "default");
    // The intentions say deny, RBAC allowed: the policy of RBAC is the reason.
    let stale = Explain { intentions: [].into(), ..explain };
    assert_eq!(rule(&stale, Some(&id("web"))), "consul-intentions-layer4");
    assert_eq!(filters[0].action, RbacAction::Allow);
}
