//! The least HTTP that a test needs, on plain sockets of the calling thread's network namespace.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

/// GET; the body of a 2xx answer.
///
/// # Errors
/// No connection, no answer, another status.
pub fn get(address: &str, path: &str) -> anyhow::Result<String> {
    exchange(address, "GET", path, "")
}

/// GET as JSON.
///
/// # Errors
/// As [`get`], or no JSON.
pub fn get_json(address: &str, path: &str) -> anyhow::Result<Value> {
    serde_json::from_str(&get(address, path)?).with_context(|| format!("{address}{path}"))
}

/// PUT with a body.
///
/// # Errors
/// As [`get`].
pub fn put(address: &str, path: &str, body: &str) -> anyhow::Result<String> {
    exchange(address, "PUT", path, body)
}

fn exchange(address: &str, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(stream, "{method} {path} HTTP/1.0\r\nhost: {address}\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if !status.starts_with('2') {
        bail!("{method} {path}: {status}: {body}");
    }
    Ok(body.to_owned())
}
