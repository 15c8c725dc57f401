//! Peers that do not answer.

use socket2::{Domain, Socket, Type};

use super::*;

/// `connect_timeout` of these tests. The kernel itself gives up after two minutes, longer than [`PATIENCE`].
const BRIEF: Duration = Duration::from_millis(200);

/// An address where every SYN is dropped: somebody listens and does not accept, and the backlog is full.
struct Silent {
    address: SocketAddr,
    _listener: Socket,
    _backlog: Vec<std::net::TcpStream>,
}

impl Silent {
    fn new() -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("bind");
        listener.listen(0).expect("listen");
        let address = listener.local_addr().expect("address").as_socket().expect("an IP address");
        let connect = || std::net::TcpStream::connect_timeout(&address, BRIEF).ok();
        Self { address, _listener: listener, _backlog: std::iter::from_fn(connect).collect() }
    }
}

#[tokio::test]
async fn an_instance_that_does_not_answer_is_given_up_for_another() {
    let authority = Authority::new();
    let good = inbound(&authority, &["web"], echo().await, Arc::new(OwnSockets)).await;
    let silent = Silent::new();
    let tls = authority.upstream("web", "api");
    let mut upstream = cluster("api", vec![endpoint(silent.address), endpoint(good.address)], Some(tls));
    upstream.connect_timeout = BRIEF;
    let first = config(listener(free_port(), "api"), upstream);
    let mut outbound = Running::start("web-sidecar-proxy", first, Arc::new(OwnSockets)).await;
    for _ in 0..4 {
        ping(&mut call(outbound.address), b"whichever").await.expect("the good one answers");
        assert_eq!(outbound.next(ConnectionKind::Open).await.verdict, Verdict::Allow);
    }
    // They take turns, so every other one met the silent one first. With one attempt it is told.
    outbound.change(|listener, _| listener.max_connect_attempts = Some(1));
    let refused = async { while ping(&mut call(outbound.address), b"x").await.is_ok() {} };
    timeout(PATIENCE, refused).await.expect("given up");
    let event = outbound.next(ConnectionKind::Refuse).await;
    let expected = format!("{}: no answer in time", silent.address);
    assert_eq!((event.reason, event.detail), (Some(RefusalReason::Connect), Some(expected)));
}

#[tokio::test]
async fn an_application_that_does_not_answer_is_given_up_and_told() {
    let authority = Authority::new();
    let silent = Silent::new();
    let mut inbound = inbound(&authority, &["web"], silent.address, Arc::new(OwnSockets)).await;
    inbound.change(|_, cluster| cluster.connect_timeout = BRIEF);
    let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
    assert_eq!(end(&mut call(outbound.address)).await, Err(ErrorKind::ConnectionReset));
    let event = inbound.next(ConnectionKind::Refuse).await;
    let expected = format!("connect to the application at {}: not in time", silent.address);
    assert_eq!((event.reason, event.detail), (Some(RefusalReason::Connect), Some(expected)));
}
