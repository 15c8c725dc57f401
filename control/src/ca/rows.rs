//! What the authority keeps in the state store: three kinds of rows of [`Table::Authority`], JSON.
//!
//! | Key | Holds |
//! |---|---|
//! | `config` | trust domain (never changes) and settings |
//! | `root/<id>` | one root; the active one with its private key |
//! | `serial` | the next serial number that nobody has reserved |
//!
//! The private key of the active root is the only private key in the store: whoever reads the state file can sign in the
//! mesh's name. The file is readable by its owner alone, the key is never served by the API, and it is deleted from the
//! store by the same transaction that makes the next root active. Deleted means unreachable: redb does not overwrite the page
//! that held it until it needs the room, so copies of the file may show keys of roots that are still trusted.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use culvert_types::{SpiffeError, TrustDomain};

use super::settings::CaSettings;
use crate::state::{Plan, State, Stored};
use crate::store::{Row, Table};

const CONFIG: &str = "config";
const SERIAL: &str = "serial";
const ROOT: &str = "root/";
/// The serial number of the first certificate.
pub(crate) const FIRST_SERIAL: u64 = 1;

/// A row that does not hold what it should.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// Not the JSON expected.
    #[error("authority row {key:?} is damaged: {reason}")]
    Damaged {
        /// Which.
        key: String,
        /// serde's text, which names fields and positions, never values of keys.
        reason: String,
    },
    /// The trust domain.
    #[error("authority row \"config\"")]
    TrustDomain(#[from] SpiffeError),
    /// Roots, but none that signs.
    #[error("the authority has no active root")]
    NoActiveRoot,
    /// A row that this version does not know.
    #[error("authority row {0:?} is of an unknown kind")]
    Unknown(String),
}

/// `config`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ConfigRow {
    pub(crate) trust_domain: String,
    pub(crate) leaf_ttl_seconds: u64,
    pub(crate) intermediate_ttl_seconds: u64,
    pub(crate) root_ttl_seconds: u64,
    pub(crate) csr_max_per_second: u32,
    /// Consul accepts and keeps it without effect; so do we.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rotation_period: Option<String>,
    /// When every leaf of a longer life than the present one has ended, seconds since 1970.
    #[serde(default)]
    pub(crate) leaves_until: u64,
    /// Counts roots that were dropped: a deletion leaves no row whose revision could tell of it.
    #[serde(default)]
    pub(crate) dropped_roots: u64,
}

impl ConfigRow {
    pub(crate) fn new(trust_domain: &TrustDomain, settings: &CaSettings) -> Self {
        let mut row = Self {
            trust_domain: trust_domain.to_string(),
            leaf_ttl_seconds: 0,
            intermediate_ttl_seconds: 0,
            root_ttl_seconds: 0,
            csr_max_per_second: 0,
            rotation_period: None,
            leaves_until: 0,
            dropped_roots: 0,
        };
        row.take(settings);
        row
    }

    /// Replaces the settings.
    pub(crate) fn take(&mut self, settings: &CaSettings) {
        self.leaf_ttl_seconds = settings.leaf_ttl.as_secs();
        self.intermediate_ttl_seconds = settings.intermediate_ttl.as_secs();
        self.root_ttl_seconds = settings.root_ttl.as_secs();
        self.csr_max_per_second = settings.csr_max_per_second;
    }

    /// The settings in force: what is stored, and from `local` what is not.
    pub(crate) fn settings(&self, local: &CaSettings) -> CaSettings {
        CaSettings {
            leaf_ttl: Duration::from_secs(self.leaf_ttl_seconds),
            intermediate_ttl: Duration::from_secs(self.intermediate_ttl_seconds),
            root_ttl: Duration::from_secs(self.root_ttl_seconds),
            csr_max_per_second: self.csr_max_per_second,
            ..local.clone()
        }
    }
}

/// `root/<id>`. No `Debug`: it may hold the key.
#[derive(Clone, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct RootRow {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) common_name: String,
    pub(crate) serial: u64,
    pub(crate) signing_key_id: String,
    pub(crate) not_before: u64,
    pub(crate) not_after: u64,
    pub(crate) certificate: String,
    pub(crate) intermediates: Vec<IntermediateRow>,
    pub(crate) active: bool,
    /// When it stops being trusted after another root took over, seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) trusted_until: Option<u64>,
    /// PKCS #8 PEM; only while active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) private_key: Option<String>,
}

/// A certificate that another root made for this root's key.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct IntermediateRow {
    pub(crate) certificate: String,
    pub(crate) not_after: u64,
}

/// `serial`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct SerialRow {
    pub(crate) next: u64,
}

/// All rows of the authority, at one revision.
pub(crate) struct Rows {
    pub(crate) config: Stored<ConfigRow>,
    pub(crate) next_serial: u64,
    pub(crate) roots: BTreeMap<String, Stored<RootRow>>,
}

impl Rows {
    /// Reads them; `None` before the authority was made.
    ///
    /// # Errors
    /// [`RowError`] for the first row that cannot be read: an authority that guesses must not sign.
    pub(crate) fn read(state: &State) -> Result<Option<Self>, RowError> {
        let (mut config, mut next_serial, mut roots) = (None, FIRST_SERIAL, BTreeMap::new());
        for (key, row) in state.authority_rows() {
            match key {
                CONFIG => config = Some(read(key, row)?),
                SERIAL => next_serial = read::<SerialRow>(key, row)?.value.next,
                name => {
                    let id = name.strip_prefix(ROOT).ok_or_else(|| RowError::Unknown(name.to_owned()))?;
                    roots.insert(id.to_owned(), read(key, row)?);
                }
            }
        }
        Ok(config.map(|config| Self { config, next_serial, roots }))
    }

    /// The root that signs.
    pub(crate) fn active(&self) -> Result<&Stored<RootRow>, RowError> {
        self.roots.values().find(|root| root.active).ok_or(RowError::NoActiveRoot)
    }
}

fn read<T: for<'de> Deserialize<'de>>(key: &str, row: &Row) -> Result<Stored<T>, RowError> {
    let value = serde_json::from_slice(&row.value).map_err(|error| RowError::Damaged {
        key: key.to_owned(),
        reason: format!("{:?} error at column {}", error.classify(), error.column()),
    })?;
    Ok(Stored { value, created: row.created, modified: row.modified })
}

pub(crate) fn put_config(plan: &mut Plan, row: &ConfigRow) {
    plan.put(Table::Authority, CONFIG, row);
}

pub(crate) fn put_serial(plan: &mut Plan, next: u64) {
    plan.put(Table::Authority, SERIAL, &SerialRow { next });
}

pub(crate) fn put_root(plan: &mut Plan, row: &RootRow) {
    plan.put(Table::Authority, format!("{ROOT}{}", row.id), row);
}

pub(crate) fn delete_root(plan: &mut Plan, id: &str) {
    plan.delete(Table::Authority, format!("{ROOT}{id}"));
}

/// Seconds since 1970, as rows keep times.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Back from [`seconds`].
pub(crate) fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}
