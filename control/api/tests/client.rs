//! The client against real sockets: a server on a free port or a unix socket that answers with canned bytes.

use culvert_api::client::{Client, ClientError, escape};
use culvert_api::{IntentionCheck, Secret};
use hyper::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;

/// Reads one request to its end (the tests' requests have no body) and returns its head.
async fn head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a request"));
    }
    String::from_utf8(head).expect("text").to_lowercase()
}

/// Answers one request with `answer`; the request's head comes from the returned channel.
async fn serve(answer: &'static str) -> (String, oneshot::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (told, seen) = oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        let head = head(&mut stream).await;
        stream.write_all(answer.as_bytes()).await.expect("answered");
        drop(told.send(head));
    });
    (address, seen)
}

#[tokio::test]
async fn it_sends_token_and_host_and_decodes_the_answer() {
    let (address, seen) = serve("HTTP/1.1 200 OK\r\ncontent-length: 16\r\n\r\n{\"Allowed\":true}").await;
    let client = Client::new(&format!("http://{address}/"), Some(Secret::new("s3cret".to_owned()))).expect("a client");
    let answer: IntentionCheck = client.get("/v1/x?source=a").await.expect("an answer");
    assert!(answer.allowed);
    let head = seen.await.expect("a request");
    assert!(head.starts_with("get /v1/x?source=a http/1.1\r\n"), "{head}");
    assert!(head.contains("x-consul-token: s3cret\r\n") && head.contains(&format!("host: {address}\r\n")), "{head}");
    assert!(!format!("{client:?}").contains("s3cret"), "a client may be logged");
}

#[tokio::test]
async fn a_refusal_reads_as_consuls_client_prints_it() {
    let (address, _) = serve("HTTP/1.1 404 Not Found\r\ncontent-length: 20\r\n\r\nIntention not found\n").await;
    let error = Client::new(&address, None).expect("a client").get::<IntentionCheck>("/x").await.expect_err("404");
    assert_eq!(error.to_string(), "Unexpected response code: 404 (Intention not found)");
    assert!(matches!(error, ClientError::Status { status: 404, .. }));
}

#[tokio::test]
async fn an_answer_of_the_wrong_form_is_an_error() {
    let (address, _) = serve("HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"Allowed\":\"yes\"}").await;
    let error = Client::new(&address, None).expect("a client").get::<IntentionCheck>("/x").await.expect_err("a text");
    assert!(matches!(error, ClientError::Answer { .. }), "{error}");
}

#[tokio::test]
async fn a_stream_gives_its_pieces_as_they_come() {
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n";
    let (address, _) = serve(answer).await;
    let mut stream = Client::new(&address, None).expect("a client").stream("/x").await.expect("a stream");
    let mut all = Vec::new();
    while let Some(piece) = stream.next().await.expect("a piece") {
        all.extend_from_slice(&piece);
    }
    assert_eq!(all, b"onetwo");
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_an_error() {
    let (address, _) = serve("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    let mut stream = Client::new(&address, None).expect("a client").stream("/x").await.expect("a stream");
    assert_eq!(stream.next().await.expect("a piece").as_deref(), Some(&b"one"[..]));
    stream.next().await.expect_err("the end is missing");
}

#[tokio::test]
async fn unix_sockets_are_reached() {
    let path = std::env::temp_dir().join(format!("culvert-api-client-{}.sock", std::process::id()));
    drop(std::fs::remove_file(&path));
    let listener = UnixListener::bind(&path).expect("a socket");
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        let head = head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.expect("answered");
        head
    });
    let client = Client::new(&format!("unix://{}", path.display()), None).expect("a client");
    let answer = client.bytes(Method::PUT, "/v1/agent/reload", None::<&()>).await.expect("an answer");
    assert_eq!(&answer[..], b"{}");
    assert!(server.await.expect("served").starts_with("put /v1/agent/reload http/1.1"));
    std::fs::remove_file(&path).expect("removed");
}

#[tokio::test]
async fn nobody_there_is_said_with_the_address_and_a_hint() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let error = Client::new(&address, None).expect("a client").get::<IntentionCheck>("/x").await.expect_err("nobody");
    assert_eq!(error.to_string(), format!("cannot reach the agent at {address}; is `culvert agent` running?"));
}

#[test]
fn addresses_that_cannot_be_are_refused() {
    for address in ["https://h:1", "", "http://", "h:1/path", "http://h/v1"] {
        assert!(matches!(Client::new(address, None), Err(ClientError::Address { .. })), "{address:?}");
    }
    for address in ["h", "h:1", "http://h", "http://h:1/", "unix:///run/x", "[::1]", "http://[::1]:8500"] {
        Client::new(address, None).expect(address);
    }
    let debug = |address: &str| format!("{:?}", Client::new(address, None).expect("a client"));
    assert!(
        debug("[::1]").contains("[::1]:8500") && debug("h").contains("h:8500") && debug("[::1]:9").contains("]:9\"")
    );
}

#[test]
fn user_input_in_paths_is_encoded() {
    assert_eq!(escape("a b/c?d&e%f"), "a%20b%2Fc%3Fd%26e%25f");
    assert_eq!(escape("count-api_v1.~"), "count-api_v1.~");
}
