//! The protocol, message by message.

use std::collections::HashMap;

use envoy_types::pb::google::rpc;
use proptest::prelude::*;

use super::*;
use crate::xds::render::test_resources;

const ONE: [(Kind, &str, &str, Option<&str>); 4] = [
    (Kind::Cluster, "api", "c1", None),
    (Kind::Endpoints, "api", "e1", None),
    (Kind::Listener, "api:127.0.0.1:80", "l1", Some("api")),
    (Kind::Listener, "public", "p1", None),
];

/// A client that does what the protocol asks of it.
struct Client {
    session: Session,
    now: Instant,
    has: BTreeMap<(Kind, String), String>,
    log: Vec<String>,
}

impl Client {
    fn new() -> Self {
        Self { session: Session::default(), now: Instant::now(), has: BTreeMap::new(), log: Vec::new() }
    }

    /// Like Envoy: everything of clusters and listeners.
    fn connected() -> Self {
        let mut client = Self::new();
        client.subscribe(Kind::Cluster, &[]);
        client.subscribe(Kind::Listener, &[]);
        client
    }

    /// Of listeners only.
    fn listening() -> Self {
        let mut client = Self::new();
        client.subscribe(Kind::Listener, &[]);
        client
    }

    fn subscribe(&mut self, kind: Kind, names: &[&str]) {
        let initial = self.has.iter().filter(|((of, _), _)| *of == kind);
        let request = DeltaDiscoveryRequest {
            initial_resource_versions: initial.map(|((_, name), version)| (name.clone(), version.clone())).collect(),
            ..request(kind, names, &[])
        };
        self.session.hear(&request).expect("few names");
    }

    fn next(&mut self, resources: &Resources) -> Option<DeltaDiscoveryResponse> {
        let response = self.session.next(resources, self.now)?;
        let kind = Kind::from_type_url(&response.type_url).expect("known");
        for resource in &response.resources {
            self.log.push(format!("+{} {}", kind.as_str(), resource.name));
            self.has.insert((kind, resource.name.clone()), resource.version.clone());
        }
        for name in &response.removed_resources {
            self.log.push(format!("-{} {name}", kind.as_str()));
            self.has.remove(&(kind, name.clone()));
        }
        Some(response)
    }

    fn ack(&mut self, response: &DeltaDiscoveryResponse) -> Heard {
        let kind = Kind::from_type_url(&response.type_url).expect("known");
        let answer = DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..request(kind, &[], &[]) };
        self.session.hear(&answer).expect("few names")
    }

    /// Takes and acknowledges everything; asks for the endpoints of each cluster, as Envoy does.
    fn settle(&mut self, resources: &Resources) -> Vec<String> {
        while let Some(response) = self.next(resources) {
            self.ack(&response);
            if response.type_url == Kind::Cluster.type_url() {
                let names: Vec<&str> = response.resources.iter().map(|one| one.name.as_str()).collect();
                if !names.is_empty() {
                    self.session.hear(&request(Kind::Endpoints, &names, &[])).expect("few names");
                }
            }
        }
        std::mem::take(&mut self.log)
    }
}

fn request(kind: Kind, subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.type_url().to_owned(),
        resource_names_subscribe: subscribe.iter().map(|&name| name.to_owned()).collect(),
        resource_names_unsubscribe: unsubscribe.iter().map(|&name| name.to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn versions(response: &DeltaDiscoveryResponse) -> Vec<(String, String)> {
    response.resources.iter().map(|resource| (resource.name.clone(), resource.version.clone())).collect()
}

#[test]
fn a_client_that_asked_for_all_is_told_that_there_is_nothing() {
    let mut client = Client::connected();
    let nothing = Resources::default();
    for kind in [Kind::Cluster, Kind::Listener] {
        let response = client.next(&nothing).expect("an answer");
        assert_eq!((response.type_url.as_str(), response.resources.len()), (kind.type_url(), 0));
        client.ack(&response);
    }
    assert!(client.next(&nothing).is_none(), "once");
}

#[test]
fn clusters_come_first_then_endpoints_then_listeners() {
    let resources = test_resources(&ONE);
    let mut client = Client::connected();
    assert_eq!(
        client.settle(&resources),
        ["+cluster api", "+endpoints api", "+listener api:127.0.0.1:80", "+listener public"]
    );
    assert!(client.session.settled());
}

#[test]
fn a_listener_waits_for_its_endpoints_only_for_a_while() {
    let resources = test_resources(&ONE);
    let mut client = Client::connected();
    while let Some(response) = client.next(&resources) {
        client.ack(&response);
    }
    assert_eq!(client.log, ["+cluster api", "+listener public"], "what needs no endpoints does not wait");
    let wake = client.session.wake_at(client.now).expect("a deadline");
    assert_eq!(wake, client.now + HOLD);
    client.now = wake;
    assert_eq!(client.session.wake_at(client.now), None, "no busy waiting beyond it");
    assert_eq!(versions(&client.next(&resources).expect("sent now")), [("api:127.0.0.1:80".into(), "l1".into())]);
}

#[test]
fn one_response_of_a_kind_is_under_way_and_the_next_holds_the_latest() {
    let mut client = Client::listening();
    let first = client.next(&test_resources(&[(Kind::Listener, "public", "1", None)])).expect("first");
    for version in ["2", "3", "4"] {
        assert!(client.next(&test_resources(&[(Kind::Listener, "public", version, None)])).is_none());
    }
    assert_eq!(client.ack(&first), Heard::Ack(Kind::Listener));
    let latest = client.next(&test_resources(&[(Kind::Listener, "public", "4", None)])).expect("latest");
    assert_eq!(versions(&latest), [("public".into(), "4".into())]);
}

#[test]
fn another_kind_does_not_wait_for_an_answer() {
    let mut client = Client::connected();
    let one = test_resources(&[(Kind::Cluster, "local_app", "1", None), (Kind::Listener, "public", "1", None)]);
    let clusters = client.next(&one).expect("clusters");
    let listeners = client.next(&one).expect("listeners, although the clusters are not acknowledged");
    assert_eq!(
        (clusters.type_url.as_str(), listeners.type_url.as_str()),
        (Kind::Cluster.type_url(), Kind::Listener.type_url())
    );
}

#[test]
fn removal_comes_last_and_clusters_go_after_the_listeners_that_used_them() {
    let mut client = Client::connected();
    client.settle(&test_resources(&ONE));
    let less = test_resources(&ONE[3..]);
    let listeners = client.next(&less).expect("listeners");
    assert_eq!(listeners.removed_resources, ["api:127.0.0.1:80"]);
    assert!(client.next(&less).is_none(), "until the listener is known to be gone");
    client.ack(&listeners);
    client.log.clear();
    assert_eq!(client.settle(&less), ["-cluster api", "-endpoints api"]);
}

#[test]
fn a_cluster_is_replaced_before_the_old_one_goes() {
    let mut client = Client::connected();
    client.settle(&test_resources(&ONE));
    let other = test_resources(&[
        (Kind::Cluster, "db", "c1", None),
        (Kind::Endpoints, "db", "e1", None),
        (Kind::Listener, "db:127.0.0.1:81", "l1", Some("db")),
        (Kind::Listener, "public", "p1", None),
    ]);
    assert_eq!(
        client.settle(&other),
        [
            "+cluster db",
            "+endpoints db",
            "+listener db:127.0.0.1:81",
            "-listener api:127.0.0.1:80",
            "-cluster api",
            "-endpoints api"
        ]
    );
}

#[test]
fn a_changed_cluster_brings_its_endpoints_again() {
    let mut client = Client::connected();
    client.settle(&test_resources(&ONE));
    let mut renewed = ONE;
    renewed[0].2 = "c2";
    assert_eq!(client.settle(&test_resources(&renewed)), ["+cluster api", "+endpoints api"]);
}

#[test]
fn after_a_reconnect_only_differences_are_sent() {
    let mut before = Client::connected();
    before.settle(&test_resources(&ONE));
    let mut changed = ONE.to_vec();
    changed[3].2 = "p2";
    changed.remove(2);
    let mut client = Client { has: before.has, ..Client::new() };
    client.subscribe(Kind::Cluster, &[]);
    client.subscribe(Kind::Endpoints, &["api"]);
    client.subscribe(Kind::Listener, &[]);
    assert_eq!(client.settle(&test_resources(&changed)), ["+listener public", "-listener api:127.0.0.1:80"]);
}

#[test]
fn nothing_is_sent_to_a_client_that_reconnects_up_to_date() {
    let resources = test_resources(&ONE);
    let mut before = Client::connected();
    before.settle(&resources);
    let mut client = Client { has: before.has, ..Client::new() };
    client.subscribe(Kind::Cluster, &["*"]);
    client.subscribe(Kind::Endpoints, &["api"]);
    client.subscribe(Kind::Listener, &["*"]);
    assert!(client.next(&resources).is_none());
    assert!(client.session.settled());
}

#[test]
fn a_refusal_names_its_resources_is_not_repeated_and_does_not_stop_later_updates() {
    let mut client = Client::listening();
    let one = test_resources(&[(Kind::Listener, "a", "1", None), (Kind::Listener, "b", "1", None)]);
    let response = client.next(&one).expect("first");
    let nack = DeltaDiscoveryRequest {
        response_nonce: response.nonce.clone(),
        error_detail: Some(rpc::Status { code: 13, message: "b: bad".to_owned(), ..rpc::Status::default() }),
        ..request(Kind::Listener, &[], &[])
    };
    let refusal =
        Refusal { kind: Kind::Listener, resources: vec!["a".to_owned(), "b".to_owned()], reason: "b: bad".to_owned() };
    assert_eq!(client.session.hear(&nack), Ok(Heard::Nack(refusal)));
    assert!(client.next(&one).is_none(), "the same again would be refused again");
    let two = test_resources(&[(Kind::Listener, "a", "1", None), (Kind::Listener, "b", "2", None)]);
    assert_eq!(versions(&client.next(&two).expect("the correction")), [("b".into(), "2".into())]);
}

#[test]
fn nothing_is_taken_away_from_under_a_listener_that_a_client_kept() {
    let mut client = Client::connected();
    client.settle(&test_resources(&ONE));
    let less = test_resources(&[(Kind::Listener, "public", "p2", None)]);
    let response = client.next(&less).expect("listeners");
    let nack = DeltaDiscoveryRequest {
        response_nonce: response.nonce.clone(),
        error_detail: Some(rpc::Status::default()),
        ..request(Kind::Listener, &[], &[])
    };
    client.session.hear(&nack).expect("few names");
    assert!(client.next(&less).is_none(), "the old listener still uses the cluster");
    let better = test_resources(&[(Kind::Listener, "public", "p3", None)]);
    client.log.clear();
    assert_eq!(client.settle(&better), ["+listener public", "-cluster api", "-endpoints api"]);
}

#[test]
fn stale_and_foreign_nonces_answer_nothing() {
    let mut client = Client::listening();
    let first = client.next(&test_resources(&[(Kind::Listener, "public", "1", None)])).expect("first");
    for nonce in ["", "ffffffff"] {
        let answer = DeltaDiscoveryRequest { response_nonce: nonce.to_owned(), ..request(Kind::Listener, &[], &[]) };
        assert_eq!(client.session.hear(&answer), Ok(Heard::Nothing));
    }
    assert_eq!(client.ack(&first), Heard::Ack(Kind::Listener));
    assert_eq!(client.ack(&first), Heard::Nothing, "an answer counts once");
}

#[test]
fn a_name_that_does_not_exist_is_reported_as_removed_and_comes_when_it_exists() {
    let mut client = Client::new();
    client.session.hear(&request(Kind::Endpoints, &["api"], &[])).expect("few names");
    let empty = test_resources(&[]);
    let response = client.next(&empty).expect("an answer");
    assert_eq!(response.removed_resources, ["api"]);
    client.ack(&response);
    assert!(client.next(&empty).is_none());
    let resources = test_resources(&[(Kind::Endpoints, "api", "1", None)]);
    assert_eq!(versions(&client.next(&resources).expect("there it is")), [("api".into(), "1".into())]);
}

#[test]
fn only_what_is_subscribed_is_sent_and_asking_again_sends_again() {
    let resources = test_resources(&[(Kind::Endpoints, "a", "1", None), (Kind::Endpoints, "b", "1", None)]);
    let mut client = Client::new();
    client.session.hear(&request(Kind::Endpoints, &[], &[])).expect("few names");
    assert!(client.next(&resources).is_none(), "no name means none, for endpoints");
    client.session.hear(&request(Kind::Endpoints, &["a"], &[])).expect("few names");
    assert_eq!(client.settle(&resources), ["+endpoints a"]);
    client.session.hear(&request(Kind::Endpoints, &["a"], &[])).expect("few names");
    assert_eq!(client.settle(&resources), ["+endpoints a"]);
    client.session.hear(&request(Kind::Endpoints, &["b"], &["a"])).expect("few names");
    assert_eq!(client.settle(&resources), ["+endpoints b"]);
    let changed = test_resources(&[(Kind::Endpoints, "a", "2", None), (Kind::Endpoints, "b", "1", None)]);
    assert!(client.settle(&changed).is_empty(), "a is not subscribed any more");
    client.session.hear(&request(Kind::Endpoints, &["a"], &[])).expect("few names");
    assert_eq!(client.settle(&changed), ["+endpoints a"]);
}

#[test]
fn types_that_are_not_served_are_left_unanswered() {
    let mut client = Client::new();
    let request = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret".to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    assert_eq!(client.session.hear(&request), Ok(Heard::Nothing));
    assert!(client.next(&test_resources(&ONE)).is_none());
}

#[test]
fn names_are_limited() {
    let names: Vec<String> = (0..=MAX_NAMES).map(|index| format!("cluster-{index}")).collect();
    let many: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut session = Session::default();
    assert_eq!(session.hear(&request(Kind::Endpoints, &many, &[])), Err(SessionError::TooManyNames(Kind::Endpoints)));
    let all_but = request(Kind::Listener, &[], &many);
    assert_eq!(Session::default().hear(&all_but), Err(SessionError::TooManyNames(Kind::Listener)));
    let known: HashMap<String, String> = names.iter().map(|name| (name.clone(), "1".to_owned())).collect();
    let request = DeltaDiscoveryRequest { initial_resource_versions: known, ..request(Kind::Listener, &[], &[]) };
    assert_eq!(Session::default().hear(&request), Err(SessionError::TooManyNames(Kind::Listener)));
}

#[derive(Clone, Debug)]
enum Step {
    /// The server's resources change: versions of four services, 0 for absent.
    Change([u8; 4]),
    /// The client takes one response, and refuses it if so.
    Take { refuse: bool },
    /// The client comes back with what it has.
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => proptest::array::uniform4(0_u8..4).prop_map(Step::Change),
        4 => Just(Step::Take { refuse: false }),
        1 => Just(Step::Take { refuse: true }),
        1 => Just(Step::Reconnect),
    ]
}

/// Cluster, endpoints and listener of every present service.
fn services(versions: [u8; 4]) -> Resources {
    let present = versions.iter().enumerate().filter(|(_, version)| **version > 0);
    let rows: Vec<(Kind, String, String, Option<String>)> = present
        .flat_map(|(index, version)| {
            let (name, version) = (format!("s{index}"), version.to_string());
            [
                (Kind::Cluster, name.clone(), version.clone(), None),
                (Kind::Endpoints, name.clone(), version.clone(), None),
                (Kind::Listener, format!("l-{name}"), version, Some(name)),
            ]
        })
        .collect();
    let borrowed: Vec<_> = rows
        .iter()
        .map(|(kind, name, version, needs)| (*kind, name.as_str(), version.as_str(), needs.as_deref()))
        .collect();
    test_resources(&borrowed)
}

proptest! {
    /// Whatever happens in between, a client that accepts in the end has exactly what it is to have; and it never has a
    /// listener without its cluster on the way, unless it refused something.
    #[test]
    fn every_client_converges(steps in proptest::collection::vec(step(), 0..40), last in proptest::array::uniform4(1_u8..9)) {
        let mut client = Client::connected();
        let mut resources = services([1; 4]);
        let mut refused = false;
        for step in steps {
            match step {
                Step::Change(versions) => resources = services(versions),
                Step::Reconnect => {
                    let names: Vec<String> =
                        client.has.keys().filter(|(kind, _)| *kind == Kind::Cluster).map(|(_, name)| name.clone()).collect();
                    let names: Vec<&str> = names.iter().map(String::as_str).collect();
                    client = Client { has: client.has, ..Client::new() };
                    client.subscribe(Kind::Cluster, &[]);
                    client.subscribe(Kind::Endpoints, &names);
                    client.subscribe(Kind::Listener, &[]);
                }
                Step::Take { refuse } => {
                    let kept = client.has.clone();
                    let Some(response) = client.next(&resources) else { continue };
                    if refuse {
                        client.has = kept;
                        refused = true;
                        let kind = Kind::from_type_url(&response.type_url).expect("known");
                        let nack = DeltaDiscoveryRequest {
                            response_nonce: response.nonce.clone(),
                            error_detail: Some(rpc::Status::default()),
                            ..request(kind, &[], &[])
                        };
                        client.session.hear(&nack).expect("few names");
                        continue;
                    }
                    client.ack(&response);
                    if response.type_url == Kind::Cluster.type_url() {
                        let added: Vec<&str> = response.resources.iter().map(|one| one.name.as_str()).collect();
                        let gone: Vec<&str> = response.removed_resources.iter().map(String::as_str).collect();
                        client.session.hear(&request(Kind::Endpoints, &added, &gone)).expect("few names");
                        client.has.retain(|(kind, name), _| *kind != Kind::Endpoints || !gone.contains(&name.as_str()));
                    }
                }
            }
            if !refused {
                for (kind, name) in client.has.keys() {
                    let cluster = name.strip_prefix("l-").filter(|_| *kind == Kind::Listener);
                    let made = cluster.is_none_or(|cluster| client.has.contains_key(&(Kind::Cluster, cluster.to_owned())));
                    prop_assert!(made, "listener {name} without its cluster");
                }
            }
        }
        // Versions that were never refused, so that nothing holds them back.
        let last = services(last.map(|version| version + 10));
        for _ in 0..3 {
            client.settle(&last);
            client.now += HOLD;
        }
        for kind in Kind::ALL {
            let want: Vec<(String, String)> =
                last.of(kind).values().map(|one| (one.name.clone(), one.version.clone())).collect();
            let has: Vec<(String, String)> =
                client.has.iter().filter(|((of, _), _)| *of == kind).map(|((_, name), version)| (name.clone(), version.clone())).collect();
            prop_assert_eq!(want, has, "{:?}", kind);
        }
    }
}
