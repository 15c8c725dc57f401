//! Reads of the state, and the promises of the ledger.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use culvert_types::{Action, HealthStatus};
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::rows::{CheckDefinition, Probe, Proxy, ServiceKind};
use super::*;
use crate::store::{MemoryStore, Operation, Store, Transaction};

fn service(id: &str, name: &str) -> Service {
    Service {
        node: "n1".to_owned(),
        id: id.to_owned(),
        name: name.to_owned(),
        kind: ServiceKind::Typical,
        tags: Vec::new(),
        meta: BTreeMap::new(),
        address: String::new(),
        port: 80,
        tagged_addresses: BTreeMap::new(),
        weights: rows::Weights::default(),
        enable_tag_override: false,
        connect_native: false,
        proxy: None,
        declared_sidecar: None,
    }
}

fn sidecar(id: &str, of: &str, of_id: &str) -> Service {
    let proxy = Proxy {
        destination_service_name: of.to_owned(),
        destination_service_id: of_id.to_owned(),
        local_service_address: "127.0.0.1".to_owned(),
        local_service_port: 80,
        ..Proxy::default()
    };
    Service { kind: ServiceKind::ConnectProxy, proxy: Some(proxy), ..service(id, &format!("{of}-sidecar-proxy")) }
}

fn check(id: &str, of: &Service, status: HealthStatus) -> Check {
    Check {
        node: of.node.clone(),
        id: id.to_owned(),
        name: id.to_owned(),
        notes: String::new(),
        service_id: of.id.clone(),
        service_name: of.name.clone(),
        service_tags: Vec::new(),
        status,
        output: String::new(),
        definition: CheckDefinition {
            probe: Probe::Ttl(Duration::from_secs(10)),
            interval: Duration::ZERO,
            timeout: Duration::ZERO,
            success_before_passing: 0,
            failures_before_warning: 0,
            failures_before_critical: 0,
            output_max_size: 4096,
            deregister_critical_service_after: Duration::ZERO,
        },
    }
}

fn intention(source: &str, destination: &str, action: Action) -> IntentionEntry {
    let (source, destination) = (source.parse().expect("name"), destination.parse().expect("name"));
    IntentionEntry {
        rule: Intention { source, destination, action },
        id: None,
        description: String::new(),
        meta: BTreeMap::new(),
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
    }
}

async fn ledger() -> Ledger {
    Ledger::start(Arc::new(MemoryStore::default()), CancellationToken::new()).await.expect("an empty store")
}

async fn write(ledger: &Ledger, plan: impl Fn(&mut Plan)) -> Arc<State> {
    let planned = ledger.update::<(), UpdateError>(|_, wanted| {
        plan(wanted);
        Ok(())
    });
    planned.await.expect("commit");
    ledger.state()
}

#[tokio::test]
async fn a_writer_reads_its_own_write_and_repetition_is_free() {
    let ledger = ledger().await;
    let web = service("web1", "web");
    let put = |plan: &mut Plan| plan.put(Table::Services, "n1/web1", &web);
    let first = write(&ledger, put).await;
    assert_eq!(first.service("n1", "web1").expect("written").value, web);
    let again = write(&ledger, put).await;
    assert_eq!(again.revision(), first.revision());
    let gone = write(&ledger, |plan| plan.delete(Table::Services, "n1/none")).await;
    assert_eq!(gone.revision(), first.revision());
}

#[tokio::test]
async fn plans_of_one_server_never_see_each_other_half_done() {
    let ledger = ledger().await;
    let tasks: Vec<_> = (0..50)
        .map(|n| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                let lowest_free = ledger.update::<u16, UpdateError>(move |state, plan| {
                    let used: BTreeSet<u16> = state.services().map(|service| service.port).collect();
                    let port = (1..).find(|port| !used.contains(port)).expect("a port");
                    let id = format!("s{n}");
                    let service = Service { port, ..service(&id, "s") };
                    plan.put(Table::Services, row_key("n1", &id), &service);
                    Ok(port)
                });
                lowest_free.await.expect("commit")
            })
        })
        .collect();
    let mut ports = BTreeSet::new();
    for task in tasks {
        ports.insert(task.await.expect("no panic"));
    }
    assert_eq!(ports, (1..=50).collect());
}

/// Changes a row behind the ledger's back, as another server would.
struct Meddler {
    store: MemoryStore,
    left: parking_lot::Mutex<usize>,
}

impl Store for Meddler {
    fn commit(
        &self,
        transaction: Transaction,
    ) -> futures::future::BoxFuture<'_, Result<Revision, crate::store::CommitError>> {
        Box::pin(async move {
            let meddle = {
                let mut left = self.left.lock();
                let meddle = *left > 0;
                *left = left.saturating_sub(1);
                meddle
            };
            if meddle {
                let other = service("web1", "other");
                let json = serde_json::to_vec(&other).expect("json").into();
                let put = Operation::Put(RowKey::new(Table::Services, "n1/web1"), json);
                self.store.commit(Transaction { guards: Vec::new(), operations: vec![put] }).await?;
            }
            self.store.commit(transaction).await
        })
    }
    fn load(&self) -> futures::future::BoxFuture<'_, Result<Contents, crate::store::StoreError>> {
        self.store.load()
    }
    fn watch(&self, after: Revision) -> crate::store::Watch {
        self.store.watch(after)
    }
}

#[tokio::test]
async fn a_plan_that_lost_a_race_is_made_again_from_the_newer_state() {
    let store = Meddler { store: MemoryStore::default(), left: parking_lot::Mutex::new(3) };
    let ledger = Ledger::start(Arc::new(store), CancellationToken::new()).await.expect("an empty store");
    let mut seen = Vec::new();
    let updated = ledger.update::<(), UpdateError>(|state, plan| {
        seen.push(state.service("n1", "web1").map(|service| service.name.clone()));
        plan.put(Table::Services, "n1/web1", &service("web1", "mine"));
        Ok(())
    });
    updated.await.expect("the meddler gives up before the ledger does");
    assert_eq!(seen.first(), Some(&None));
    assert_eq!(seen.last(), Some(&Some("other".to_owned())));
    assert_eq!(ledger.state().service("n1", "web1").expect("written").name, "mine");
}

#[tokio::test]
async fn indexes_move_only_for_what_a_write_concerns() {
    let ledger = ledger().await;
    let (web, api) = (service("web1", "web"), service("api1", "api"));
    let proxy = sidecar("web1-sidecar-proxy", "web", "web1");
    let before = write(&ledger, |plan| {
        plan.put(Table::Services, "n1/web1", &web);
        plan.put(Table::Services, "n1/web1-sidecar-proxy", &proxy);
        plan.put(Table::Services, "n1/api1", &api);
    })
    .await;
    let after =
        write(&ledger, |plan| plan.put(Table::Checks, "n1/c", &check("c", &proxy, HealthStatus::Passing))).await;
    assert_eq!(after.index(Table::Checks), after.revision());
    assert_eq!(after.index(Table::Services), before.revision());
    assert_eq!(after.service_index("web"), after.revision(), "its sidecar's check counts");
    assert_eq!(after.service_index("web-sidecar-proxy"), after.revision());
    assert_eq!(after.service_index("api"), before.service_index("api"));
    let unknown = after.service_index("nobody");

    let gone = write(&ledger, |plan| plan.delete(Table::Services, "n1/api1")).await;
    assert_eq!(gone.service_index("api"), gone.revision());
    assert!(gone.service_index("nobody") > unknown, "a deletion may wake others, but must wake its own");
    assert!(gone.services_named("api").next().is_none());
    assert_eq!(gone.service_index("web"), after.service_index("web"));
}

#[tokio::test]
async fn health_of_a_mesh_end_point_covers_application_sidecar_and_node() {
    let ledger = ledger().await;
    let (web, proxy) = (service("web1", "web"), sidecar("web1-sidecar-proxy", "web", "web1"));
    let mut node_check = check("serfHealth", &web, HealthStatus::Passing);
    (node_check.service_id, node_check.service_name) = (String::new(), String::new());
    let state = write(&ledger, |plan| {
        plan.put(Table::Services, "n1/web1", &web);
        plan.put(Table::Services, "n1/web1-sidecar-proxy", &proxy);
        plan.put(Table::Checks, "n1/a", &check("a", &web, HealthStatus::Warning));
        plan.put(Table::Checks, "n1/p", &check("p", &proxy, HealthStatus::Passing));
        plan.put(Table::Checks, "n1/serfHealth", &node_check);
    })
    .await;
    let end_point = state.connect_instances("web").next().expect("one sidecar");
    assert_eq!(state.health("n1", &proxy.id), HealthStatus::Passing);
    assert_eq!(state.mesh_health(end_point), HealthStatus::Warning);
    node_check.status = HealthStatus::Critical;
    let state = write(&ledger, |plan| plan.put(Table::Checks, "n1/serfHealth", &node_check)).await;
    assert_eq!(state.mesh_health(state.connect_instances("web").next().expect("one")), HealthStatus::Critical);
}

#[tokio::test]
async fn a_blocked_reader_wakes_for_its_own_scope_only() {
    let ledger = ledger().await;
    let state = write(&ledger, |plan| plan.put(Table::Services, "n1/web1", &service("web1", "web"))).await;
    let index = state.service_index("web").0;
    let reader = {
        let ledger = ledger.clone();
        let wait = Duration::from_secs(600);
        tokio::spawn(async move { blocking::until(&ledger, index, wait, |state| state.service_index("web")).await })
    };
    write(&ledger, |plan| plan.put(Table::Services, "n1/api1", &service("api1", "api"))).await;
    tokio::task::yield_now().await;
    assert!(!reader.is_finished());
    let renamed = Service { port: 81, ..service("web1", "web") };
    write(&ledger, |plan| plan.put(Table::Services, "n1/web1", &renamed)).await;
    let state = reader.await.expect("woken");
    assert_eq!(state.service("n1", "web1").expect("there").port, 81);
}

#[tokio::test(start_paused = true)]
async fn a_blocked_reader_gives_up_after_its_wait_and_ahead_of_time_when_its_index_is_from_the_future() {
    let ledger = ledger().await;
    write(&ledger, |plan| plan.put(Table::Services, "n1/web1", &service("web1", "web"))).await;
    let start = tokio::time::Instant::now();
    let wait = Duration::from_secs(16);
    blocking::until(&ledger, 1, wait, State::revision).await;
    let waited = start.elapsed();
    assert!(waited >= wait && waited <= wait + wait / 16 + Duration::from_millis(2), "{waited:?}");
    let start = tokio::time::Instant::now();
    blocking::until(&ledger, 1_000, wait, State::revision).await;
    assert_eq!(start.elapsed(), Duration::ZERO, "an index from before a reset must not hang");
}

#[tokio::test]
async fn intentions_are_ordered_by_precedence_then_name() {
    let ledger = ledger().await;
    let pairs = [("*", "*"), ("web", "*"), ("*", "api"), ("web", "api"), ("admin", "api")];
    let state = write(&ledger, |plan| {
        for (source, destination) in pairs {
            let entry = intention(source, destination, Action::Deny);
            plan.put(Table::Intentions, intention_key(&entry.rule), &entry);
        }
    })
    .await;
    let order: Vec<String> = state.rules().iter().map(|rule| format!("{}>{}", rule.source, rule.destination)).collect();
    assert_eq!(order, ["admin>api", "web>api", "*>api", "web>*", "*>*"]);
    assert_eq!(state.intention("web", "api").expect("stored").value, intention("web", "api", Action::Deny));
}

#[tokio::test]
async fn an_unreadable_intention_stops_the_start_and_keeps_the_old_rule_later() {
    let ledger_store = Arc::new(MemoryStore::default());
    let ledger = Ledger::start(Arc::clone(&ledger_store) as _, CancellationToken::new()).await.expect("empty");
    let deny = intention("web", "api", Action::Deny);
    write(&ledger, |plan| plan.put(Table::Intentions, "api/web", &deny)).await;
    let garbage = Operation::Put(RowKey::new(Table::Intentions, "api/web"), "{\"action\":\"maybe\"}".into());
    let commit = ledger_store.commit(Transaction { guards: Vec::new(), operations: vec![garbage] });
    let revision = commit.await.expect("the store does not look at values");
    let mut states = ledger.watch();
    let state = states.wait_for(|state| state.revision() >= revision).await.expect("followed").clone();
    assert_eq!(state.rules()[..], [deny.rule]);
    let restarted = Ledger::start(ledger_store, CancellationToken::new()).await;
    assert!(matches!(restarted.err().expect("refused"), LedgerError::Row(_)));
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u8, bool),
    Delete(u8),
    Check(u8, u8, HealthStatus),
    Uncheck(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let status = prop_oneof![Just(HealthStatus::Passing), Just(HealthStatus::Warning), Just(HealthStatus::Critical)];
    prop_oneof![
        (0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(id, name, proxy)| Step::Put(id, name, proxy)),
        (0..4_u8).prop_map(Step::Delete),
        (0..4_u8, 0..4_u8, status).prop_map(|(id, of, status)| Step::Check(id, of, status)),
        (0..4_u8).prop_map(Step::Uncheck),
    ]
}

proptest! {
    /// What is derived step by step equals what is derived from scratch.
    #[test]
    fn derived_maps_follow_the_rows(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let (state, fresh) = runtime.block_on(async {
            let store = Arc::new(MemoryStore::default());
            let ledger = Ledger::start(Arc::clone(&store) as _, CancellationToken::new()).await.expect("empty");
            for step in &steps {
                write(&ledger, |plan| match step {
                    Step::Put(id, name, false) => {
                        plan.put(Table::Services, format!("n1/{id}"), &service(&id.to_string(), &name.to_string()));
                    }
                    Step::Put(id, name, true) => {
                        plan.put(Table::Services, format!("n1/{id}"), &sidecar(&id.to_string(), &name.to_string(), ""));
                    }
                    Step::Delete(id) => plan.delete(Table::Services, format!("n1/{id}")),
                    Step::Check(id, of, status) => {
                        let of = service(&of.to_string(), &of.to_string());
                        plan.put(Table::Checks, format!("n1/{id}"), &check(&id.to_string(), &of, *status));
                    }
                    Step::Uncheck(id) => plan.delete(Table::Checks, format!("n1/{id}")),
                }).await;
            }
            (ledger.state(), State::load(store.load().await.expect("load")).expect("readable"))
        });
        let groups = |state: &State| -> Vec<_> {
            let group = |(name, group): (&String, &Arc<Group>)| (name.clone(), group.members.clone(), group.proxies.clone());
            state.groups.iter().map(group).collect()
        };
        prop_assert_eq!(groups(&state), groups(&fresh));
        prop_assert_eq!(&state.checks_by_service, &fresh.checks_by_service);
        prop_assert_eq!(&state.services, &fresh.services);
    }
}
