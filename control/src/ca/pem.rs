//! PEM text (RFC 7468) of private keys, which rcgen does not write at all or does not wipe.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// Label of a SEC 1 elliptic curve key (RFC 5915), the form that Consul's clients expect.
pub(crate) const EC_PRIVATE_KEY: &str = "EC PRIVATE KEY";
/// Label of a PKCS #8 key (RFC 5958), as the state store keeps it.
pub(crate) const PRIVATE_KEY: &str = "PRIVATE KEY";
/// Characters on a line (RFC 7468 §2).
const LINE: usize = 64;

/// Text of `der` under `label`, with a final newline. The text is wiped on drop: it may be a key.
pub(crate) fn encode(label: &str, der: &[u8]) -> Zeroizing<String> {
    let body = Zeroizing::new(STANDARD.encode(der));
    let mut text = String::with_capacity(body.len() + body.len() / LINE + 2 * label.len() + 40);
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(LINE));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    Zeroizing::new(text)
}
