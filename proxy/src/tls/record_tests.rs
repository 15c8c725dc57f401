//! Records: what a peer may send, and what it may not.

use proptest::prelude::*;
use rustls::crypto::cipher::OutboundChunks;
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::config::TlsVersion;
use crate::testing::Authority;
use crate::tls::{ClientContext, ServerContext, accept, connect};

/// Two ends of one connection, after the handshake.
fn sessions(version: TlsVersion) -> (Session, Session) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let authority = Authority::new();
        let (mut server, mut client) = (authority.downstream("api"), authority.upstream("web", "api"));
        (server.min_version, server.max_version) = (version, version);
        (client.min_version, client.max_version) = (version, version);
        let server = ServerContext::new(&server).expect("context");
        let client = ClientContext::new(&client).expect("context");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (near, far) = (near.expect("connect"), far.expect("accept").0);
        let (client, server) = tokio::join!(connect(&near, &client), accept(&far, &server));
        (client.expect("client").session, server.expect("server").session)
    })
}

fn sealed(session: &mut Session, payload: &[u8]) -> Vec<u8> {
    let mut records = Vec::new();
    session.seal(payload, &mut records).expect("seal");
    records.concat()
}

fn opened(session: &mut Session, mut bytes: Vec<u8>) -> Result<(Vec<u8>, Opened), RecordError> {
    let mut ranges = Vec::new();
    let opened = session.open(&mut bytes, &mut ranges)?;
    Ok((ranges.into_iter().flat_map(|range| bytes[range].to_vec()).collect(), opened))
}

const VERSIONS: [TlsVersion; 2] = [TlsVersion::V1_2, TlsVersion::V1_3];

#[test]
fn payload_of_any_size_passes_in_any_pieces() {
    for version in VERSIONS {
        let (mut one, mut other) = sessions(version);
        for size in [1, 2, MAX_PLAINTEXT - 1, MAX_PLAINTEXT, MAX_PLAINTEXT + 1, 100_000] {
            let payload: Vec<u8> = (0..size).map(|index| (index % 251) as u8).collect();
            let bytes = sealed(&mut one, &payload);
            let (mut received, mut waiting) = (Vec::new(), Vec::new());
            for piece in bytes.chunks(7_919) {
                waiting.extend_from_slice(piece);
                let mut ranges = Vec::new();
                let opened = other.open(&mut waiting, &mut ranges).expect("open");
                ranges.into_iter().for_each(|range| received.extend_from_slice(&waiting[range]));
                waiting.drain(..opened.consumed);
            }
            assert!(received == payload && waiting.is_empty());
        }
    }
}

#[test]
fn close_notify_ends_the_stream_and_what_follows_is_ignored() {
    for version in VERSIONS {
        let (mut one, mut other) = sessions(version);
        let mut bytes = sealed(&mut one, b"last words");
        bytes.extend(one.seal_close().expect("seal"));
        bytes.extend(b"garbage");
        let (payload, opened) = opened(&mut other, bytes).expect("open");
        assert_eq!((payload.as_slice(), opened.closed), (&b"last words"[..], true));
    }
}

#[test]
fn a_flipped_bit_a_missing_and_a_repeated_record_are_noticed() {
    for version in VERSIONS {
        let (mut one, mut other) = sessions(version);
        let mut bytes = sealed(&mut one, b"payload");
        *bytes.last_mut().expect("bytes") ^= 1;
        assert!(matches!(opened(&mut other, bytes), Err(RecordError::Tls(_))));
        let (mut one, mut other) = sessions(version);
        let _lost = sealed(&mut one, b"lost");
        let next = sealed(&mut one, b"next");
        assert!(matches!(opened(&mut other, next), Err(RecordError::Tls(_))));
        let (mut one, mut other) = sessions(version);
        let record = sealed(&mut one, b"once");
        assert!(opened(&mut other, [record.clone(), record].concat()).is_err());
    }
}

#[test]
fn an_alert_is_an_error_that_names_it() {
    let (mut one, mut other) = sessions(TlsVersion::V1_3);
    let alert = [2, u8::from(AlertDescription::CertificateRevoked)];
    let bytes = one.seal_one(ContentType::Alert, &alert).expect("seal");
    assert!(matches!(opened(&mut other, bytes), Err(RecordError::Alert(AlertDescription::CertificateRevoked))));
}

#[test]
fn plaintext_and_oversized_records_are_refused() {
    let (_, mut other) = sessions(TlsVersion::V1_3);
    assert!(opened(&mut other, vec![21, 3, 3, 0, 2, 1, 0]).is_err(), "an alert in plaintext proves nothing");
    let (_, mut other) = sessions(TlsVersion::V1_3);
    assert!(opened(&mut other, vec![20, 3, 3, 0, 1, 1]).is_err(), "no change_cipher_spec after the handshake");
    for version in VERSIONS {
        let (_, mut other) = sessions(version);
        assert!(opened(&mut other, vec![23, 3, 3, 0xff, 0xff]).is_err(), "refused by its header alone");
        let (_, mut other) = sessions(version);
        assert!(opened(&mut other, b"GET / HTTP/1.1\r\n\r\n".to_vec()).is_err());
    }
}

/// `session` announces new keys and asks for the other's.
fn key_update(session: &mut Session, request: u8) -> Vec<u8> {
    let record = session.seal_one(ContentType::Handshake, &[24, 0, 0, 1, request]).expect("seal");
    let (number, secrets) = session.kernel.update_tx().expect("keys");
    (session.encrypter, session.encrypted) = (encrypter(session.kernel.suite(), secrets).expect("keys"), number);
    record
}

#[test]
fn a_key_update_is_followed_and_answered_before_the_next_payload() {
    let (mut one, mut other) = sessions(TlsVersion::V1_3);
    let mut bytes = sealed(&mut one, b"old key, ");
    bytes.extend(key_update(&mut one, 1));
    bytes.extend(sealed(&mut one, b"new key"));
    assert_eq!(opened(&mut other, bytes).expect("open").0, b"old key, new key");
    let answer = sealed(&mut other, b"answer");
    assert!(answer.len() > sealed(&mut other, b"answer").len(), "our own update went first");
    let mut answer_again = answer;
    answer_again.truncate(answer_again.len());
    assert_eq!(opened(&mut one, answer_again).expect("open").0, b"answer");
}

#[test]
fn a_used_up_key_is_renewed_where_the_version_can() {
    let (mut one, mut other) = sessions(TlsVersion::V1_3);
    one.blocks_left = 1;
    let first = sealed(&mut one, b"renewed");
    let second = sealed(&mut one, b", and again");
    assert_eq!(opened(&mut other, [first, second].concat()).expect("open").0, b"renewed, and again");
    let (mut one, _) = sessions(TlsVersion::V1_2);
    one.blocks_left = 1;
    assert!(matches!(one.seal(b"x", &mut Vec::new()), Err(RecordError::KeyUsedUp)));
}

#[test]
fn endless_key_updates_are_refused() {
    let (mut one, mut other) = sessions(TlsVersion::V1_3);
    let bytes: Vec<u8> = (0..=MAX_IDLE_KEY_UPDATES).flat_map(|_| key_update(&mut one, 0)).collect();
    assert!(matches!(opened(&mut other, bytes), Err(RecordError::Unexpected("too many key updates"))));
}

#[test]
fn late_handshake_messages_are_held_to_the_rules() {
    let attempt = |messages: &[&[u8]], from_server: bool| {
        let (mut client, mut server) = sessions(TlsVersion::V1_3);
        let (from, to) = if from_server { (&mut server, &mut client) } else { (&mut client, &mut server) };
        let seal = |message: &&[u8]| from.seal_one(ContentType::Handshake, message).expect("seal");
        let bytes: Vec<u8> = messages.iter().flat_map(seal).collect();
        opened(to, bytes).map(|_| ())
    };
    assert!(attempt(&[&[4, 0, 0, 2, 9, 9]], true).is_ok(), "a ticket is ignored");
    assert!(attempt(&[&[4, 0, 0], &[2, 9], &[9]], true).is_ok(), "also in pieces");
    assert!(attempt(&[&[4, 0, 0, 2, 9, 9]], false).is_err(), "clients have no tickets to give");
    assert!(attempt(&[&[24, 0, 0, 1, 2]], true).is_err(), "neither requested nor not");
    assert!(attempt(&[&[24, 0, 0, 1, 0, 4, 0, 0, 0]], true).is_err(), "a key change ends its record");
    assert!(attempt(&[&[13, 0, 0, 0]], true).is_err(), "a request for another certificate");
    assert!(attempt(&[&[1, 0, 0, 0]], false).is_err(), "a second hello");
    assert!(attempt(&[&[4, 0xff, 0xff, 0xff]], true).is_err(), "too long to hold");
    assert!(attempt(&[&[]], true).is_err(), "nothing");
    let (mut one, mut other) = sessions(TlsVersion::V1_3);
    let half = one.seal_one(ContentType::Handshake, &[4, 0]).expect("seal");
    let data = sealed(&mut one, b"x");
    assert!(opened(&mut other, [half, data].concat()).is_err(), "nothing may come between");
}

#[test]
fn padding_is_removed() {
    // RFC 8446 §5.4: zeros behind the true content type. Sent as payload of our own making: type 23, then zeros.
    let (mut one, mut other) = sessions(TlsVersion::V1_3);
    let padded = OutboundPlainMessage {
        typ: ContentType::Unknown(0),
        version: ProtocolVersion::TLSv1_2,
        payload: OutboundChunks::Single(&[b'h', b'i', 23, 0, 0]),
    };
    let record = one.encrypter.encrypt(padded, one.encrypted).expect("seal").encode();
    assert_eq!(opened(&mut other, record).expect("open").0, b"hi");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), header in any::<bool>()) {
        let (_, mut other) = sessions(TlsVersion::V1_3);
        let mut bytes = bytes;
        if header && bytes.len() > 5 {
            let length = u16::try_from(bytes.len() - 5).expect("short").to_be_bytes();
            bytes[..5].copy_from_slice(&[23, 3, 3, length[0], length[1]]);
            prop_assert!(opened(&mut other, bytes).is_err());
        } else {
            let _outcome = opened(&mut other, bytes);
        }
    }
}
