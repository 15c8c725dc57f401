//! What is in force, and when.

use std::sync::Arc;

use culvert_proxy::config::ProxyConfig;
use culvert_proxy::rbac::Rbac;
use culvert_proxy::xds::{ResourceKind, State};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use envoy_types::pb::google::protobuf::BoolValue;
use proptest::prelude::*;

use super::resources::{self as make, PUBLIC, any, filter, resource, response};

const UPSTREAM: &str = "api:127.0.0.1:8080";

/// Applies a response that must be good.
fn apply(state: &mut State, response: DeltaDiscoveryResponse) -> Arc<ProxyConfig> {
    assert_eq!(state.apply(response), Ok(Vec::new()));
    Arc::clone(state.config())
}

fn clusters(list: &[Cluster], removed: &[&str]) -> DeltaDiscoveryResponse {
    response::<Cluster>("c", list.iter().map(|one| resource(&one.name, "1", any(one))).collect(), removed)
}

fn listeners(list: &[Listener], removed: &[&str]) -> DeltaDiscoveryResponse {
    response::<Listener>("l", list.iter().map(|one| resource(&one.name, "1", any(one))).collect(), removed)
}

fn endpoints(list: &[ClusterLoadAssignment], removed: &[&str]) -> DeltaDiscoveryResponse {
    let list = list.iter().map(|one| resource(&one.cluster_name, "1", any(one))).collect();
    response::<ClusterLoadAssignment>("e", list, removed)
}

fn one_endpoint(cluster: &str, port: u32) -> ClusterLoadAssignment {
    make::assignment(cluster, vec![make::endpoint("192.0.2.1", port)])
}

fn listener_names(config: &ProxyConfig) -> Vec<&str> {
    config.listeners.keys().map(String::as_str).collect()
}

fn cluster_names(config: &ProxyConfig) -> Vec<&str> {
    config.clusters.keys().map(String::as_str).collect()
}

/// A state with one warm upstream.
fn with_upstream() -> State {
    let mut state = State::default();
    apply(&mut state, clusters(&[make::eds_cluster("api")], &[]));
    apply(&mut state, endpoints(&[one_endpoint("api", 21000)], &[]));
    apply(&mut state, listeners(&[make::outbound(UPSTREAM, 8080, "api")], &[]));
    state
}

#[test]
fn a_listener_waits_for_its_cluster_and_the_cluster_for_its_endpoints() {
    let mut state = State::default();
    let config = apply(&mut state, listeners(&[make::outbound(UPSTREAM, 8080, "api")], &[]));
    assert!(config.listeners.is_empty() && !state.ready());
    let config = apply(&mut state, clusters(&[make::eds_cluster("api")], &[]));
    assert_eq!(*config, ProxyConfig::default());
    assert_eq!(state.endpoints_needed().into_iter().collect::<Vec<_>>(), ["api"]);
    let config = apply(&mut state, endpoints(&[one_endpoint("api", 21000)], &[]));
    assert_eq!((listener_names(&config), cluster_names(&config)), (vec![UPSTREAM], vec!["api"]));
    assert!(state.ready());
}

#[test]
fn a_cluster_without_instances_is_usable() {
    let mut state = with_upstream();
    let config = apply(&mut state, endpoints(&[make::assignment("api", Vec::new())], &[]));
    assert!(config.clusters["api"].endpoints.is_empty() && state.ready());
}

#[test]
fn a_listener_goes_on_with_its_old_target_until_the_new_one_is_warm() {
    let mut state = with_upstream();
    apply(&mut state, clusters(&[make::eds_cluster("api2")], &[]));
    let config = apply(&mut state, listeners(&[make::outbound(UPSTREAM, 8080, "api2")], &[]));
    assert_eq!(config.listeners[UPSTREAM].cluster, "api");
    assert!(!state.ready());
    // Even if the old one is removed too early.
    let config = apply(&mut state, clusters(&[], &["api"]));
    assert_eq!(config.listeners[UPSTREAM].cluster, "api");
    assert_eq!(cluster_names(&config), ["api"]);
    let config = apply(&mut state, endpoints(&[one_endpoint("api2", 21000)], &[]));
    assert_eq!(config.listeners[UPSTREAM].cluster, "api2");
    assert_eq!(cluster_names(&config), ["api2"]);
    assert!(state.ready());
}

#[test]
fn the_policy_of_a_public_listener_never_waits() {
    let mut state = State::default();
    apply(&mut state, clusters(&[make::static_cluster("local_app", 9001)], &[]));
    let before = apply(&mut state, listeners(&[make::public_listener(&["web"])], &[]));
    let stricter =
        make::inbound(vec![filter(&make::rbac(Action::Allow, &["db"])), filter(&make::tcp_proxy("not_there_yet"))]);
    let after = apply(&mut state, listeners(&[stricter], &[]));
    assert_ne!(before.listeners[PUBLIC].rbac, after.listeners[PUBLIC].rbac);
    assert_eq!(after.listeners[PUBLIC].cluster, "local_app");
}

#[test]
fn a_refused_resource_keeps_its_last_good_version_and_the_others_apply() {
    let mut state = with_upstream();
    let mut bad = make::outbound(UPSTREAM, 9999, "api");
    bad.use_original_dst = Some(BoolValue { value: true });
    let other = make::outbound("other:127.0.0.1:8081", 8081, "api");
    let rejections = state.apply(listeners(&[bad, other], &[])).expect("known type");
    assert_eq!(rejections.len(), 1);
    assert_eq!(rejections[0].resource, UPSTREAM);
    assert_eq!(rejections[0].error.to_string(), "use_original_dst: not supported by culvert");
    let config = state.config();
    assert_eq!(listener_names(config), [UPSTREAM, "other:127.0.0.1:8081"]);
    assert_eq!(config.listeners[UPSTREAM].address.port(), 8080);
    assert!(!state.ready());
    assert_eq!(state.outstanding().map(|nack| nack.resource), Some(UPSTREAM.to_owned()));
    assert_eq!(state.versions(ResourceKind::Listener)[UPSTREAM], "1");

    apply(&mut state, listeners(&[make::outbound(UPSTREAM, 9999, "api")], &[]));
    assert_eq!((state.ready(), state.outstanding()), (true, None));
}

#[test]
fn a_public_listener_with_an_unreadable_policy_is_shut_at_once() {
    let mut state = State::default();
    apply(&mut state, clusters(&[make::static_cluster("local_app", 9001)], &[]));
    apply(&mut state, listeners(&[make::public_listener(&["web"])], &[]));
    let rejections = state.apply(listeners(&[make::public_listener(&["("])], &[])).expect("known type");
    assert!(rejections[0].error.path.ends_with("principal_name.safe_regex"), "{:?}", rejections[0]);
    assert_eq!(*state.config().listeners[PUBLIC].rbac, [Rbac::deny_all()]);
    // The next stream must get it again: this is not the version we claim to have.
    assert_eq!(state.versions(ResourceKind::Listener)[PUBLIC], "refused:1");
}

#[test]
fn a_removed_listener_is_gone_and_its_cluster_with_it() {
    let mut state = with_upstream();
    let config = apply(&mut state, clusters(&[], &["api"]));
    assert_eq!(cluster_names(&config), ["api"], "still in use");
    assert!(state.endpoints_needed().is_empty());
    let config = apply(&mut state, listeners(&[], &[UPSTREAM]));
    assert_eq!(*config, ProxyConfig::default());
    assert!(state.versions(ResourceKind::Endpoints).is_empty());
}

#[test]
fn what_did_not_change_is_the_same_object() {
    let mut state = with_upstream();
    let before = Arc::clone(state.config());
    let after = apply(&mut state, endpoints(&[one_endpoint("api", 21001)], &[]));
    assert!(Arc::ptr_eq(&before.listeners[UPSTREAM], &after.listeners[UPSTREAM]));
    assert!(!Arc::ptr_eq(&before.clusters["api"], &after.clusters["api"]));
    let again = apply(&mut state, listeners(&[make::outbound(UPSTREAM, 8080, "api")], &[]));
    assert!(Arc::ptr_eq(&before.listeners[UPSTREAM], &again.listeners[UPSTREAM]));
}

#[test]
fn responses_are_checked_as_a_whole() {
    let mut state = State::default();
    let unknown = DeltaDiscoveryResponse { type_url: "type.googleapis.com/x.Y".to_owned(), ..Default::default() };
    let error = state.apply(unknown).expect_err("unknown type").to_string();
    assert_eq!(error, "resources of type \"type.googleapis.com/x.Y\" were not asked for");

    let twice = [make::static_cluster("local_app", 1), make::static_cluster("local_app", 2)];
    let rejections = state.apply(clusters(&twice, &[])).expect("known type");
    assert_eq!(rejections[0].error.to_string(), "sent twice in one response");

    let empty = response::<Cluster>("c", vec![Resource { name: "x".to_owned(), ..Resource::default() }], &[]);
    assert_eq!(state.apply(empty).expect("known type")[0].error.to_string(), "resource: missing");

    let misnamed = response::<Cluster>("c", vec![resource("x", "1", any(&make::static_cluster("y", 1)))], &[]);
    let rejections = state.apply(misnamed).expect("known type");
    assert_eq!(rejections[0].error.to_string(), "name: \"y\" sent as resource \"x\"");
}

#[derive(Clone, Debug)]
enum Step {
    Cluster { name: usize, eds: bool },
    Endpoints { name: usize, port: u32 },
    Public { cluster: usize, allow: usize },
    BadPublic,
    Outbound { name: usize, cluster: usize },
    Remove { kind: usize, name: usize },
}

const CLUSTERS: [&str; 3] = ["a", "b", "c"];
const OUTBOUND: [&str; 2] = ["x", "y"];
const ALLOWED: [&str; 3] = ["web", "db", "api"];

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..3_usize, proptest::bool::ANY).prop_map(|(name, eds)| Step::Cluster { name, eds }),
        (0..3_usize, 1..4_u32).prop_map(|(name, port)| Step::Endpoints { name, port }),
        (0..3_usize, 0..3_usize).prop_map(|(cluster, allow)| Step::Public { cluster, allow }),
        Just(Step::BadPublic),
        (0..2_usize, 0..3_usize).prop_map(|(name, cluster)| Step::Outbound { name, cluster }),
        (0..4_usize, 0..3_usize).prop_map(|(kind, name)| Step::Remove { kind, name }),
    ]
}

fn public(cluster: &str, allow: &str) -> Listener {
    make::inbound(vec![filter(&make::rbac(Action::Allow, &[allow])), filter(&make::tcp_proxy(cluster))])
}

fn to_response(step: &Step) -> DeltaDiscoveryResponse {
    match *step {
        Step::Cluster { name, eds: true } => clusters(&[make::eds_cluster(CLUSTERS[name])], &[]),
        Step::Cluster { name, eds: false } => clusters(&[make::static_cluster(CLUSTERS[name], 9000)], &[]),
        Step::Endpoints { name, port } => endpoints(&[one_endpoint(CLUSTERS[name], port)], &[]),
        Step::Public { cluster, allow } => listeners(&[public(CLUSTERS[cluster], ALLOWED[allow])], &[]),
        Step::BadPublic => {
            let mut bad = public("a", "web");
            bad.use_original_dst = Some(BoolValue { value: true });
            listeners(&[bad], &[])
        }
        Step::Outbound { name, cluster } => listeners(&[make::outbound(OUTBOUND[name], 8080, CLUSTERS[cluster])], &[]),
        Step::Remove { kind: 0, name } => clusters(&[], &[CLUSTERS[name]]),
        Step::Remove { kind: 1, name } => endpoints(&[], &[CLUSTERS[name]]),
        Step::Remove { kind: 2, name } => listeners(&[], &[OUTBOUND[name % 2]]),
        Step::Remove { .. } => listeners(&[], &[PUBLIC]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn whatever_comes_in_force_is_consistent_and_policies_are_the_last_ones(
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let mut state = State::default();
        let mut allowed = None;
        for step in &steps {
            let good = state.apply(to_response(step)).expect("known type").is_empty();
            prop_assert_eq!(good, !matches!(step, Step::BadPublic));
            match step {
                Step::Public { cluster, allow } => allowed = Some((*cluster, *allow)),
                Step::Remove { kind: 3, .. } => allowed = None,
                _ => {}
            }
            let config = state.config();
            for (name, listener) in &config.listeners {
                prop_assert_eq!(name, &listener.name);
                prop_assert!(config.cluster_of(listener).is_some(), "{} has no cluster", name);
            }
            if let Some(listener) = config.listeners.get(PUBLIC) {
                let (cluster, allow) = allowed.expect("removed ones are gone");
                let wanted = public(CLUSTERS[cluster], ALLOWED[allow]);
                let wanted = culvert_proxy::config::parse::parse_listener(PUBLIC, &any(&wanted)).expect("valid");
                prop_assert_eq!(&listener.rbac, &wanted.listener.rbac);
            }
        }
    }
}
