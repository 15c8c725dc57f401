//! `node.json`: what makes this node itself, made once and kept: its ID and its IPv6 prefix.

use std::io;
use std::net::Ipv6Addr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use culvert_control::disk::remedy;
use serde::{Deserialize, Serialize};

use crate::task::{read_json, write_json};

/// Name of the file in the data directory.
const FILE: &str = "node.json";

/// The node's identity. Fields that this version does not know are kept.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NodeFile {
    /// A random UUID: Consul's node ID.
    pub node_id: uuid::Uuid,
    /// A /64 of a random unique local prefix (RFC 4193 §3.2.2): `fd`, 40 random bits, subnet 0.
    pub ula_prefix: Ipv6Addr,
    #[serde(flatten)]
    other: serde_json::Map<String, serde_json::Value>,
}

/// `node.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("node identity {} cannot be used ({})", path.display(), remedy_of_identity(source))]
pub struct NodeFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Unlike other files, this one can be made anew: others will take the node for another one.
fn remedy_of_identity(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            "it is damaged: restore it from a backup, or remove it and a new identity will be made"
        }
        _ => remedy(error),
    }
}

impl NodeFile {
    /// Reads the file, or makes a new identity and keeps it. Makes the data directory (mode 0711) if it is missing.
    ///
    /// # Errors
    /// [`NodeFileError`] when it cannot be read, understood or written.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, NodeFileError> {
        let path = data_dir.join(FILE);
        let failed = |source| NodeFileError { path: path.clone(), source };
        if let Some(node) = read_json::<Self>(&path).map_err(failed)? {
            let bad = "ula_prefix is not a /64 below fd00::/8";
            let usable = node.ula_prefix.octets()[0] == 0xfd && node.ula_prefix.segments()[4..] == [0; 4];
            return if usable { Ok(node) } else { Err(failed(io::Error::new(io::ErrorKind::InvalidData, bad))) };
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(data_dir).map_err(failed)?;
        let node = Self { node_id: uuid::Uuid::new_v4(), ula_prefix: random_prefix(), other: serde_json::Map::new() };
        write_json(&path, &node).map_err(failed)?;
        Ok(node)
    }
}

/// `fdxx:xxxx:xxxx::`; the first six bytes of a random UUID are all random.
fn random_prefix() -> Ipv6Addr {
    let mut bytes = [0_u8; 16];
    bytes[..6].copy_from_slice(&uuid::Uuid::new_v4().as_bytes()[..6]);
    bytes[0] = 0xfd;
    Ipv6Addr::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_keeps_what_others_wrote() {
        let directory = tempfile::tempdir().expect("a directory");
        let data = directory.path().join("new");
        let first = NodeFile::load_or_create(&data).expect("made");
        assert_eq!(NodeFile::load_or_create(&data).expect("read"), first);
        assert_eq!(first.ula_prefix.octets()[0], 0xfd);
        assert_eq!(first.ula_prefix.segments()[3..], [0; 5]);
        let mut json = serde_json::to_value(&first).expect("JSON");
        json["later"] = serde_json::json!({"a": 1});
        std::fs::write(data.join(FILE), json.to_string()).expect("written");
        let again = NodeFile::load_or_create(&data).expect("read");
        assert_eq!(serde_json::to_value(&again).expect("JSON"), json);
    }

    #[test]
    fn a_damaged_identity_is_an_error_and_stays_as_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        for text in ["", "{}", r#"{"node_id":"b6d4f8c2-0000-4000-8000-00000000002a","ula_prefix":"2001:db8::"}"#] {
            std::fs::write(directory.path().join(FILE), text).expect("written");
            assert!(NodeFile::load_or_create(directory.path()).is_err(), "{text:?}");
            assert_eq!(std::fs::read_to_string(directory.path().join(FILE)).expect("read"), text);
        }
    }
}
