//! The TCP table: who closes how, with how much, through two copies with real TLS between them.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::config::TlsVersion;
use crate::l4::socket::Connection;
use crate::testing::Authority;
use crate::tls::{ClientContext, ServerContext, accept, connect};

/// Generous: the machine may be busy. Nothing waits this long unless something hangs.
const PATIENCE: Duration = Duration::from_secs(60);

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address: SocketAddr = listener.local_addr().expect("address");
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (one, other) = (one.expect("connect"), other.expect("accept").0);
    one.set_nodelay(true).expect("nodelay");
    other.set_nodelay(true).expect("nodelay");
    (one, other)
}

async fn end_of_copy(result: Result<(), CopyError>, app: Connection, tunnel: Connection) -> Result<(), String> {
    match result {
        Ok(()) => {
            app.finish();
            tunnel.finish();
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

struct Path {
    /// What the calling application holds.
    client: TcpStream,
    /// What the called application holds.
    server: TcpStream,
    outbound: tokio::task::JoinHandle<Result<(), String>>,
    inbound: tokio::task::JoinHandle<Result<(), String>>,
    /// The calling side.
    live: Arc<Live>,
    /// What the kernel holds at most between the calling proxy and the called application, in bytes.
    kernel: usize,
}

async fn path_over(version: TlsVersion) -> Path {
    let authority = Authority::new();
    let (mut server_tls, mut client_tls) = (authority.downstream("api"), authority.upstream("web", "api"));
    (server_tls.min_version, server_tls.max_version) = (version, version);
    (client_tls.min_version, client_tls.max_version) = (version, version);
    let server_context = ServerContext::new(&server_tls).expect("server context");
    let client_context = ClientContext::new(&client_tls).expect("client context");
    let (client, client_proxy) = tcp_pair().await;
    let (server, server_proxy) = tcp_pair().await;
    let (near, far) = tcp_pair().await;
    let [(_, near_sends), (far_receives, _), (_, proxy_sends), (server_receives, _)] =
        [&near, &far, &server_proxy, &server].map(buffers);
    let kernel = near_sends + far_receives + proxy_sends + server_receives;
    let live = Arc::new(nobody());
    let counted = Arc::clone(&live);
    let outbound = tokio::spawn(async move {
        let (app, tunnel) =
            (Connection::opened(client_proxy).expect("options"), Connection::opened(near).expect("options"));
        let done = connect(&tunnel, &client_context).await.expect("client handshake");
        let result = copy(&app, &tunnel, done.session, done.early, &counted).await;
        end_of_copy(result, app, tunnel).await
    });
    let inbound = tokio::spawn(async move {
        let (app, tunnel) =
            (Connection::opened(server_proxy).expect("options"), Connection::opened(far).expect("options"));
        let done = accept(&tunnel, &server_context).await.expect("server handshake");
        let result = copy(&app, &tunnel, done.session, done.early, &nobody()).await;
        end_of_copy(result, app, tunnel).await
    });
    Path { client, server, outbound, inbound, live, kernel }
}

fn nobody() -> Live {
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    Live::new(address, address)
}

/// Bounds what the kernel keeps of a connection, so that tests see what we keep. Returns the bounds of receiving and sending.
fn buffers(stream: &TcpStream) -> (usize, usize) {
    let socket = SockRef::from(stream);
    socket.set_recv_buffer_size(64 * 1024).expect("receive buffer");
    socket.set_send_buffer_size(64 * 1024).expect("send buffer");
    (socket.recv_buffer_size().expect("size"), socket.send_buffer_size().expect("size"))
}

async fn path() -> Path {
    path_over(TlsVersion::V1_3).await
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed).collect()
}

/// Reads to the end: everything before it, and how it ended.
async fn drain(stream: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut all = Vec::new();
    let end = timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("an end");
    (all, end.err().map(|error| error.kind()))
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
}

async fn join(task: tokio::task::JoinHandle<Result<(), String>>) -> Result<(), String> {
    timeout(PATIENCE, task).await.expect("the copy ends").expect("no panic")
}

const SIZES: [usize; 4] = [0, 1, 64 * 1024, 16 * 1024 * 1024];

/// One side sends and half-closes, the other answers after the end and closes: every byte, both ends clean.
#[tokio::test]
async fn half_close_passes_in_both_directions_with_every_byte() {
    for size in SIZES {
        for client_first in [true, false] {
            let Path { client, server, outbound, inbound, live, .. } = path().await;
            let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
            let (there, back) = (pattern(size, 1), pattern(size, 2));
            let (expected_there, expected_back) = (there.clone(), back.clone());
            let answer = tokio::spawn(async move {
                let (received, end) = drain(&mut second).await;
                assert_eq!(end, None);
                assert!(received == expected_there, "{size} bytes there");
                second.write_all(&back).await.expect("the other direction still works");
            });
            first.write_all(&there).await.expect("send");
            first.shutdown().await.expect("half-close");
            let (received, end) = drain(&mut first).await;
            assert_eq!(end, None);
            assert!(received == expected_back, "{size} bytes back");
            answer.await.expect("answer");
            assert_eq!(join(outbound).await, Ok(()));
            assert_eq!(join(inbound).await, Ok(()));
            let (there, back) = (size as u64, size as u64);
            let counted = (live.traffic.to_tunnel.load(Relaxed), live.traffic.to_app.load(Relaxed));
            assert_eq!(counted, if client_first { (there, back) } else { (back, there) });
        }
    }
}

/// Both sides send at the same time and close fully when done.
#[tokio::test]
async fn both_directions_at_once_lose_nothing() {
    for size in SIZES {
        let Path { client, server, outbound, inbound, .. } = path().await;
        let side = |stream: TcpStream, seed: u8, expected: u8| async move {
            let (mut read, mut write) = stream.into_split();
            let sender = tokio::spawn(async move {
                write.write_all(&pattern(size, seed)).await.expect("send");
                write.shutdown().await.expect("close");
            });
            let mut all = Vec::new();
            read.read_to_end(&mut all).await.expect("clean end");
            assert!(all == pattern(size, expected), "{size} bytes");
            sender.await.expect("sender");
        };
        timeout(PATIENCE, async { tokio::join!(side(client, 1, 2), side(server, 2, 1)) }).await.expect("an end");
        assert_eq!((join(outbound).await, join(inbound).await), (Ok(()), Ok(())));
    }
}

/// One side sends, then resets: the other gets a reset, never an orderly end, and no byte that was not sent.
#[tokio::test]
async fn a_reset_arrives_as_a_reset() {
    for size in [0, 1, 64 * 1024] {
        for client_first in [true, false] {
            let Path { client, server, outbound, inbound, .. } = path().await;
            let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
            let sent = pattern(size, 3);
            first.write_all(&sent).await.expect("send");
            if size > 0 {
                second.read_exact(&mut [0]).await.expect("the connection stands");
            }
            reset(first);
            let (received, end) = drain(&mut second).await;
            assert_eq!(end, Some(ErrorKind::ConnectionReset), "size {size}, client first {client_first}");
            assert!(sent[size.min(1)..].starts_with(&received));
            assert!(join(outbound).await.is_err() && join(inbound).await.is_err());
        }
    }
}

/// After a half-close the side that only listens can still be reset, and so can the one that closed.
#[tokio::test]
async fn a_reset_after_a_half_close_is_noticed_while_idle() {
    for closer_resets in [true, false] {
        for client_first in [true, false] {
            let Path { client, server, outbound, inbound, .. } = path().await;
            let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
            first.shutdown().await.expect("half-close");
            assert_eq!(drain(&mut second).await, (vec![], None));
            if closer_resets {
                reset(first);
                let gone = async {
                    // Nothing is left to read: the reset shows when writing.
                    loop {
                        if let Err(error) = second.write_all(b"x").await {
                            return error.kind();
                        }
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                let kind = timeout(PATIENCE, gone).await.expect("noticed");
                assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{kind}");
            } else {
                reset(second);
                assert_eq!(drain(&mut first).await, (vec![], Some(ErrorKind::ConnectionReset)));
            }
            assert!(join(outbound).await.is_err() && join(inbound).await.is_err());
        }
    }
}

/// A TLS stream that ends without close_notify was cut: the application must not take it for the end of the data.
#[tokio::test]
async fn an_abrupt_end_of_tls_becomes_a_reset() {
    let authority = Authority::new();
    let server = ServerContext::new(&authority.downstream("api")).expect("context");
    let client = ClientContext::new(&authority.upstream("web", "api")).expect("context");
    let (mut app, app_proxy) = tcp_pair().await;
    let (near, far) = tcp_pair().await;
    let inbound = tokio::spawn(async move {
        let (app, tunnel) =
            (Connection::opened(app_proxy).expect("options"), Connection::opened(far).expect("options"));
        let done = accept(&tunnel, &server).await.expect("handshake");
        let result = copy(&app, &tunnel, done.session, done.early, &nobody()).await;
        end_of_copy(result, app, tunnel).await
    });
    let mut peer = connect(&near, &client).await.expect("handshake");
    let mut records = Vec::new();
    peer.session.seal(b"half of it", &mut records).expect("seal");
    let mut near = near;
    near.write_all(&records.concat()).await.expect("send");
    near.shutdown().await.expect("FIN without close_notify");
    let (received, end) = drain(&mut app).await;
    assert_eq!((received.as_slice(), end), (&b"half of it"[..], Some(ErrorKind::ConnectionReset)));
    assert_eq!(join(inbound).await, Err("peer: TLS stream was cut off".to_owned()));
}

/// The called side speaks first, as SMTP, MySQL and SSH servers do.
#[tokio::test]
async fn the_server_may_speak_first() {
    let Path { mut client, mut server, outbound, inbound, .. } = path().await;
    server.write_all(b"220 hello\r\n").await.expect("greet");
    let mut greeting = [0; 11];
    timeout(PATIENCE, client.read_exact(&mut greeting)).await.expect("in time").expect("greeting");
    assert_eq!(&greeting, b"220 hello\r\n");
    drop((client, server));
    assert_eq!((join(outbound).await, join(inbound).await), (Ok(()), Ok(())));
}

/// A reader that stalls stops the sender; what the proxies hold meanwhile is bounded, and nothing is lost afterwards.
#[tokio::test]
async fn a_stalled_reader_stops_the_sender() {
    const LIMIT: usize = 256 * 1024 * 1024;
    let Path { mut client, mut server, live, kernel, .. } = path().await;
    let block = pattern(1024 * 1024, 4);
    let mut sent = 0;
    // Stalled means: no progress for a good while.
    while sent < LIMIT {
        match timeout(Duration::from_secs(2), client.write(&block[sent % block.len()..])).await {
            Ok(written) => sent += written.expect("write"),
            Err(_) => break,
        }
    }
    assert!(sent < LIMIT, "the sender was never stopped");
    let taken = live.traffic.to_tunnel.load(Relaxed) as usize;
    assert!(
        taken > 0 && taken <= kernel + 2 * MAX_KEPT,
        "{taken} bytes stand between two proxies and {kernel} in buffers"
    );
    let reader = tokio::spawn(async move { drain(&mut server).await });
    client.shutdown().await.expect("close");
    let (received, end) = timeout(PATIENCE, reader).await.expect("in time").expect("reader");
    assert_eq!((received.len(), end), (sent, None));
    assert!(received.chunks(block.len()).all(|part| part == &block[..part.len()]), "bytes in order");
}

/// While the peer does not read and we therefore do not read the application, its reset is passed on all the same.
#[tokio::test]
async fn a_reset_is_noticed_even_while_the_other_side_is_stalled() {
    let Path { mut client, server, outbound, .. } = path().await;
    let block = vec![7; 1024 * 1024];
    while timeout(Duration::from_secs(1), client.write(&block)).await.is_ok() {}
    reset(client);
    assert!(join(outbound).await.is_err());
    drop(server);
}

/// Many small writes, many records in one read: order and number of bytes stay.
#[tokio::test]
async fn small_records_in_bulk_keep_their_order() {
    let Path { mut client, mut server, .. } = path().await;
    let writer = tokio::spawn(async move {
        for number in 0u32..50_000 {
            client.write_all(&number.to_be_bytes()).await.expect("write");
        }
    });
    let (received, end) = drain(&mut server).await;
    writer.await.expect("writer");
    assert_eq!((received.len(), end), (200_000, None));
    let numbers = received.chunks_exact(4).map(|bytes| u32::from_be_bytes(bytes.try_into().expect("four")));
    assert!(numbers.eq(0u32..50_000));
}

/// TLS 1.2 carries the same, where a context allows it.
#[tokio::test]
async fn tls_1_2_carries_the_same() {
    let Path { mut client, mut server, outbound, inbound, .. } = path_over(TlsVersion::V1_2).await;
    let sent = pattern(3_000_000, 5);
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        for part in sent.chunks(70_001) {
            client.write_all(part).await.expect("write");
        }
        client.shutdown().await.expect("close");
        drain(&mut client).await
    });
    let (received, end) = drain(&mut server).await;
    assert!(received == expected && end.is_none());
    server.write_all(b"bye").await.expect("write");
    drop(server);
    assert_eq!(writer.await.expect("writer"), (b"bye".to_vec(), None));
    assert_eq!((join(outbound).await, join(inbound).await), (Ok(()), Ok(())));
}

#[test]
fn moving_ranges_together_keeps_their_bytes() {
    let mut buffer = *b"..ab...cdef.g";
    let end = move_together(&mut buffer, &[2..4, 7..11, 12..13]);
    assert_eq!(&buffer[..end], b"abcdefg");
}

#[tokio::test]
async fn an_idle_connection_is_small_and_holds_no_bytes_of_its_handshake() {
    let authority = Authority::new();
    let server_context = ServerContext::new(&authority.downstream("api")).expect("server context");
    let client_context = ClientContext::new(&authority.upstream("web", "api")).expect("client context");
    let (near, far) = tcp_pair().await;
    let (called, accepted) = tokio::join!(connect(&near, &client_context), accept(&far, &server_context));
    for established in [called.expect("client handshake"), accepted.expect("server handshake")] {
        assert_eq!(established.early.capacity(), 0);
        let live = nobody();
        let size = size_of_val(&copy(&near, &far, established.session, established.early, &live));
        assert!(size <= 320, "the copy's state has grown to {size} bytes");
    }
}

#[test]
fn io_errors_keep_their_kind() {
    let error = CopyError::App(io::Error::from(ErrorKind::ConnectionReset));
    assert!(error.to_string().starts_with("application: "));
}

/// The write that meets the reset must not hide the alert that came before it.
#[tokio::test]
async fn a_caller_that_is_denied_while_it_sends_learns_why() {
    let authority = Authority::new();
    let server_context = ServerContext::new(&authority.downstream("api")).expect("server context");
    let client_context = ClientContext::new(&authority.upstream("web", "api")).expect("client context");
    let ((mut client, app), (near, far)) = (tcp_pair().await, tcp_pair().await);
    let (tunnel, far) = (Connection::opened(near).expect("options"), Connection::opened(far).expect("options"));
    let (called, judged) = tokio::join!(connect(&tunnel, &client_context), accept(&far, &server_context));
    let (called, mut judged) = (called.expect("client handshake"), judged.expect("server handshake"));
    deny(&far, &mut judged.session);
    drop(far);
    client.write_all(b"still sending").await.expect("taken");
    timeout(PATIENCE, tunnel.ready(Interest::ERROR)).await.expect("reset").expect("reset");
    let end = timeout(PATIENCE, copy(&app, &tunnel, called.session, called.early, &nobody())).await.expect("an end");
    assert!(matches!(&end, Err(error) if error.is_denial()), "{end:?}");
}
