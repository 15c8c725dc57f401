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

/// POST with a JSON body; the JSON answer.
///
/// # Errors
/// As [`get`], or no JSON.
pub fn post_json(address: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
    serde_json::from_str(&exchange(address, "POST", path, &body.to_string())?)
        .with_context(|| format!("{address}{path}"))
}

fn exchange(address: &str, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let (length, host) = (body.len(), format!("host: {address}\r\nconnection: close"));
    write!(stream, "{method} {path} HTTP/1.1\r\n{host}\r\ncontent-length: {length}\r\n\r\n{body}")?;
    let mut answer = Vec::new();
    let head = loop {
        let mut piece = [0; 8192];
        let count = stream.read(&mut piece)?;
        answer.extend_from_slice(&piece[..count]);
        if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
            break String::from_utf8(answer.drain(..end + 4).collect())?;
        }
        if count == 0 {
            bail!("{method} {path}: no answer");
        }
    };
    // Not every server ends the connection, whatever it is asked.
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    match length {
        Some(length) => {
            let have = answer.len();
            answer.resize(length.max(have), 0);
            stream.read_exact(&mut answer[have..])?;
        }
        None => drop(stream.read_to_end(&mut answer)?),
    }
    let body = String::from_utf8(answer)?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if !status.starts_with('2') {
        bail!("{method} {path}: {status}: {body}");
    }
    Ok(body)
}
