//! The compiler against the decision function, and each condition by itself.

use std::time::Duration;

use culvert_control::{MeshUpstream, store::Revision};
use culvert_types::{Action, Datacenter, Intention, TrustDomain};
use proptest::prelude::*;

use super::*;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

pub(super) fn name(text: &str) -> ServiceName {
    ServiceName::new(text).expect("valid name")
}

pub(super) fn instance(service: &str, upstreams: &[&str]) -> MeshInstance {
    let upstream = |(index, destination): (usize, &&str)| MeshUpstream {
        destination: name(destination),
        bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080 + u16::try_from(index).expect("few upstreams"))),
    };
    MeshInstance {
        service_id: service.to_owned(),
        sidecar_id: format!("{service}-sidecar-proxy"),
        service: name(service),
        node: "node".to_owned(),
        health: HealthStatus::Passing,
        local_port: 9001,
        sidecar_port: 21000,
        encryption: Encryption::BetweenNodes,
        protocol: "tcp".to_owned(),
        upstreams: upstreams.iter().enumerate().map(upstream).collect(),
        certificate_not_after: Some(NOW + Duration::from_secs(60)),
    }
}

pub(super) fn workload(id: u32, service: &str) -> AttachedWorkload {
    AttachedWorkload {
        id,
        address4: Ipv4Addr::new(172, 26, 64, u8::try_from(id).expect("few workloads")),
        address6: None,
        sidecars: vec![format!("{service}-sidecar-proxy")],
    }
}

pub(super) fn view(default_action: Action, intentions: Vec<Intention>, instances: Vec<MeshInstance>) -> MeshView {
    MeshView {
        revision: Revision(1),
        trust_domain: TrustDomain::new("td.consul").expect("valid"),
        datacenter: Datacenter::new("dc1").expect("valid"),
        node: "node".to_owned(),
        default_action,
        encryption: Encryption::BetweenNodes,
        intentions: intentions.into(),
        instances: instances.into(),
    }
}

pub(super) fn pair() -> (Vec<MeshInstance>, Vec<AttachedWorkload>) {
    (vec![instance("web", &["api"]), instance("api", &[])], vec![workload(1, "web"), workload(2, "api")])
}

#[test]
fn an_allowed_pair_on_one_node_is_routed_on_both_loopbacks() {
    let (instances, workloads) = pair();
    let routes = compile(&view(Action::Allow, vec![], instances), &workloads, NOW);
    let keys: Vec<_> = routes.keys().copied().collect();
    assert_eq!(keys, [(1, "127.0.0.1:8080".parse().expect("address")), (1, "[::1]:8080".parse().expect("address"))]);
    let route = &routes[&keys[0]];
    assert_eq!((route.instances.len(), route.instances[0].workload, route.instances[0].port), (1, 2, 9001));
}

/// Each condition alone takes the route away.
#[test]
fn whatever_is_missing_goes_through_the_worker() {
    type Change = fn(&mut Vec<MeshInstance>, &mut Vec<AttachedWorkload>);
    let changes: [(&str, Change); 10] = [
        ("source wants encryption", |instances, _| instances[0].encryption = Encryption::Always),
        ("destination wants encryption", |instances, _| instances[1].encryption = Encryption::Always),
        ("destination on another node", |instances, _| instances[1].node = "other".to_owned()),
        ("destination not passing", |instances, _| instances[1].health = HealthStatus::Warning),
        ("another protocol", |instances, _| instances[1].protocol = "http".to_owned()),
        ("source certificate expired", |instances, _| instances[0].certificate_not_after = Some(NOW)),
        ("destination without certificate", |instances, _| instances[1].certificate_not_after = None),
        ("source not attached", |_, workloads| drop(workloads.remove(0))),
        ("destination not attached", |_, workloads| drop(workloads.remove(1))),
        ("destination without a port", |instances, _| instances[1].local_port = 0),
    ];
    for (what, change) in changes {
        let (mut instances, mut workloads) = pair();
        change(&mut instances, &mut workloads);
        let routes = compile(&view(Action::Allow, vec![], instances), &workloads, NOW);
        assert!(routes.is_empty(), "{what}: {routes:?}");
    }
}

#[test]
fn one_instance_that_wants_encryption_decides_for_the_service() {
    let (mut instances, workloads) = pair();
    let mut strict = instance("api", &[]);
    (strict.sidecar_id, strict.encryption) = ("second".to_owned(), Encryption::Always);
    instances.push(strict);
    assert!(compile(&view(Action::Allow, vec![], instances), &workloads, NOW).is_empty());
}

#[test]
fn more_instances_than_an_entry_holds_are_the_workers() {
    let (mut instances, mut workloads) = (vec![instance("web", &["api"])], vec![workload(1, "web")]);
    for id in 2..=18 {
        let mut called = instance("api", &[]);
        called.sidecar_id = format!("api-{id}");
        instances.push(called);
        workloads.push(AttachedWorkload { sidecars: vec![format!("api-{id}")], ..workload(id, "api") });
    }
    assert!(compile(&view(Action::Allow, vec![], instances.clone()), &workloads, NOW).is_empty());
    instances[5].health = HealthStatus::Critical;
    let routes = compile(&view(Action::Allow, vec![], instances), &workloads, NOW);
    assert_eq!(routes.values().map(|route| route.instances.len()).collect::<Vec<_>>(), [MAX_INSTANCES; 2]);
}

#[test]
fn the_first_certificate_to_expire_ends_the_route() {
    let (mut instances, workloads) = pair();
    let end = NOW + Duration::from_secs(5);
    instances[1].certificate_not_after = Some(end);
    let routes = compile(&view(Action::Allow, vec![], instances), &workloads, NOW);
    assert!(routes.values().all(|route| route.expires == end) && !routes.is_empty());
}

fn subject() -> impl Strategy<Value = culvert_types::IntentionSubject> {
    prop_oneof![Just("*"), Just("web"), Just("api"), Just("db")].prop_map(|text| text.parse().expect("valid subject"))
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Allow), Just(Action::Deny)]
}

proptest! {
    /// Invariant 2: the kernel's tables say what `decide` says.
    #[test]
    fn routes_are_exactly_the_allowed_pairs(
        rules in proptest::collection::vec((subject(), subject(), action()), 0..8), default in action(),
    ) {
        let intentions: Vec<Intention> = rules
            .into_iter()
            .map(|(source, destination, action)| Intention { source, destination, action })
            .collect();
        let services = ["web", "api", "db"];
        let instances = services.iter().map(|service| instance(service, &services)).collect();
        let workloads: Vec<_> = services.iter().zip(1..).map(|(service, id)| workload(id, service)).collect();
        let routes = compile(&view(default, intentions.clone(), instances), &workloads, NOW);
        for (source, id) in services.iter().zip(1..) {
            for (destination, port) in services.iter().zip(8080..) {
                let routed = routes.contains_key(&(id, SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
                let allowed = decide(&intentions, &name(source), &name(destination), default).allowed();
                prop_assert_eq!(routed, allowed, "{} => {}", source, destination);
            }
        }
    }
}
