//! Listeners that move, go and drain, and what becomes of their connections.

use super::*;

/// The rules of a listener for `service` under its name in another trust domain, with the identity to match.
fn elsewhere(mesh: &Mesh, listener: &mut config::Listener, denied: &str) {
    let moved = spiffe("api").replace(TRUST_DOMAIN, "other.consul");
    let identity = mesh.authority.identity_with(leaf_params(&moved));
    let before = listener.tls.as_deref().expect("inbound");
    listener.tls = Some(Arc::new(config::DownstreamTls { identity, ..before.clone() }));
    listener.rbac = deny_elsewhere(denied);
}

fn deny_elsewhere(service: &str) -> Arc<[Rbac]> {
    let pattern = format!("^spiffe://other\\.consul/ns/default/dc/[^/]+/svc/{service}$");
    let name = StringMatcher::regex(&pattern).expect("a pattern");
    let policy = Policy {
        name: "denied".into(),
        permissions: vec![Permission::Any],
        principals: vec![Principal::Authenticated(Some(name))],
    };
    [Rbac { action: RbacAction::Deny, policies: vec![policy] }].into()
}

#[tokio::test]
async fn a_connection_that_is_older_than_the_trust_domain_obeys_rules_of_the_new_one() {
    let mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"first").await.expect("allowed");
    mesh.inbound.change(|listener, _| elsewhere(&mesh, listener, "admin"));
    // New ones of the old domain fail from then on.
    let in_force = async { while ping(&mut mesh.client(), b"x").await.is_ok() {} };
    timeout(PATIENCE, in_force).await.expect("in force");
    ping(&mut client, b"still").await.expect("nobody denies it");
    mesh.inbound.change(|listener, _| listener.rbac = deny_elsewhere("web"));
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn rules_of_a_new_trust_domain_reach_connections_whose_listener_did_not_get_its_certificate() {
    type Change = fn(&mut config::Listener);
    let moves: Change = |listener| listener.address = free_port();
    let keeps_its_tls: Change = |listener| {
        let before = listener.tls.as_deref().expect("inbound");
        let roots = [vec![0_u8].into()].into();
        listener.tls = Some(Arc::new(config::DownstreamTls { roots, ..before.clone() }));
    };
    for (what, change) in [("another address", moves), ("unusable roots", keeps_its_tls)] {
        let mut mesh = Mesh::start(&["web"]).await;
        let mut client = mesh.client();
        ping(&mut client, b"first").await.expect("allowed");
        mesh.inbound.status.mark_unchanged();
        mesh.inbound.change(|listener, _| {
            elsewhere(&mesh, listener, "admin");
            change(listener);
        });
        let in_force = timeout(PATIENCE, mesh.inbound.status.changed()).await;
        in_force.expect("in time").expect("the proxy runs");
        ping(&mut client, b"still").await.expect("nobody denies it");
        mesh.inbound.change(|listener, _| listener.rbac = deny_elsewhere("web"));
        assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "{what}");
    }
}

#[tokio::test]
async fn draining_refuses_new_connections_and_lets_open_ones_end() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    mesh.outbound.stop.take().expect("running").send(Duration::from_secs(600)).expect("running");
    let refused = async {
        while TcpStream::connect(mesh.outbound.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("no listener any more");
    ping(&mut client, b"during").await.expect("an open connection goes on");
    client.shutdown().await.expect("close");
    assert_eq!(end(&mut client).await, Ok(()));
    timeout(PATIENCE, mesh.outbound.task).await.expect("drained").expect("no panic");
}

#[tokio::test]
async fn what_outlives_the_deadline_of_a_drain_is_reset() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    mesh.inbound.stop.take().expect("running").send(Duration::from_millis(100)).expect("running");
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    timeout(PATIENCE, &mut mesh.inbound.task).await.expect("drained").expect("no panic");
    let event = mesh.inbound.next(ConnectionKind::Close).await;
    assert_eq!((event.reason, event.detail.as_deref()), (None, Some("the proxy was stopped")));
}

/// Whatever takes a listener away, a deny ends what it accepted.
#[tokio::test]
async fn connections_that_may_finish_obey_policy_meanwhile() {
    type Take = fn(&mut Mesh);
    let stop: Take = |mesh| {
        mesh.inbound.stop.take().expect("running").send(Duration::from_secs(600)).expect("running");
    };
    let move_it: Take = |mesh| mesh.inbound.change(|listener, _| listener.address = free_port());
    for (what, take) in [("stopped", stop), ("moved", move_it)] {
        let mut mesh = Mesh::start(&["web"]).await;
        let mut client = mesh.client();
        ping(&mut client, b"before").await.expect("echo");
        let before = mesh.inbound.address;
        take(&mut mesh);
        let closed = async {
            while TcpStream::connect(before).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, closed).await.expect("no listener any more");
        ping(&mut client, b"during").await.expect("an open connection goes on");
        mesh.inbound.change(|listener, _| listener.rbac = allow(&["web", "admin"]));
        ping(&mut client, b"allowed").await.expect("a policy that allows changes nothing");
        mesh.inbound.change(|listener, _| listener.rbac = allow(&["admin"]));
        assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "{what}");
        assert_eq!(mesh.inbound.next(ConnectionKind::Close).await.reason, Some(RefusalReason::Revoked), "{what}");
    }
}

#[tokio::test]
async fn without_a_listener_that_says_who_may_connect_nobody_may() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    mesh.inbound.config.send_replace(Arc::default());
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(mesh.inbound.next(ConnectionKind::Close).await.reason, Some(RefusalReason::Revoked));
}

#[tokio::test]
async fn a_changed_address_moves_the_listener_and_an_unchanged_one_keeps_its_socket() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    let (before, after) = (mesh.outbound.address, free_port());
    mesh.outbound.change(|listener, _| listener.address = after);
    let moved =
        |status: &ProxyStatus| status.listeners.iter().any(|listener| listener.address == after && listener.ready);
    timeout(PATIENCE, mesh.outbound.status.wait_for(moved)).await.expect("in time").expect("moved");
    ping(&mut client, b"after").await.expect("an open connection goes on");
    ping(&mut call(after), b"new").await.expect("echo");
    assert!(TcpStream::connect(before).await.is_err(), "the old address is closed");
}

#[tokio::test]
async fn an_address_in_use_is_reported_and_taken_when_it_is_free() {
    let authority = Authority::new();
    let mut outbound = outbound(&authority, vec![]).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address");
    outbound.change(|listener, _| listener.address = address);
    let reported = |status: &ProxyStatus| {
        !status.ready
            && status
                .listeners
                .iter()
                .any(|listener| listener.error.as_ref().is_some_and(|error| error.contains("listen")))
    };
    timeout(PATIENCE, outbound.status.wait_for(reported)).await.expect("in time").expect("reported");
    drop(taken);
    timeout(PATIENCE, outbound.status.wait_for(|status| status.ready)).await.expect("in time").expect("ready");
}
