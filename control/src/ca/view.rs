//! What the authority's rows say, ready for use: the trusted roots, the one that signs, the settings in force.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use culvert_types::TrustDomain;

use super::key::{KeyError, PrivateKey};
use super::rows::{self, RowError, Rows};
use super::settings::CaSettings;
use crate::state::State;
use crate::store::{Revision, Table};

/// One trusted root, without its key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Root {
    /// SHA-1 of the certificate, colon-separated hex.
    pub id: String,
    /// For people.
    pub name: String,
    /// Serial number of the certificate.
    pub serial: u64,
    /// Identifier of the key, colon-separated hex.
    pub signing_key_id: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// The certificate, PEM.
    pub certificate: String,
    /// Certificates that older roots made for this root's key, PEM.
    pub intermediates: Vec<String>,
    /// Does it sign?
    pub active: bool,
    /// `CreateIndex`.
    pub created: Revision,
    /// `ModifyIndex`.
    pub modified: Revision,
}

/// Everything that verifies certificates of the mesh.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Roots {
    /// Of the cluster, for its whole life.
    pub trust_domain: TrustDomain,
    /// Id of the root that signs.
    pub active_id: String,
    /// The active root first, then the others, newest first.
    pub roots: Vec<Root>,
    /// The last revision that changed one of them or the configuration.
    pub index: Revision,
    /// All certificates in one text, PEM, in the order of `roots`.
    pub bundle: Arc<str>,
}

impl Roots {
    /// The root that signs.
    #[must_use]
    pub fn active(&self) -> Option<&Root> {
        self.roots.iter().find(|root| root.active)
    }
}

/// The authority at one revision.
pub(crate) struct View {
    /// Of the state's table, to know when this is old.
    pub(crate) revision: Revision,
    pub(crate) settings: CaSettings,
    pub(crate) rotation_period: Option<String>,
    pub(crate) roots: Arc<Roots>,
    pub(crate) key: PrivateKey,
    /// The active root's cross-signed certificates with the end of their validity.
    pub(crate) intermediates: Vec<(String, SystemTime)>,
    pub(crate) config_created: Revision,
    pub(crate) config_modified: Revision,
}

/// Why the rows cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// A row.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The key of the active root.
    #[error("private key of the active root")]
    Key(#[from] KeyError),
    /// There is no authority yet.
    #[error("the authority is not made yet")]
    Missing,
}

impl View {
    pub(crate) fn read(state: &State, local: &CaSettings) -> Result<Self, ViewError> {
        let rows = Rows::read(state)?.ok_or(ViewError::Missing)?;
        let active = rows.active()?;
        let key = active.private_key.as_deref().ok_or(RowError::NoActiveRoot)?;
        let key = PrivateKey::from_pkcs8_pem(key)?;
        let end = |row: &rows::IntermediateRow| (row.certificate.clone(), rows::time(row.not_after));
        Ok(Self {
            revision: state.index(Table::Authority),
            settings: rows.config.settings(local),
            rotation_period: rows.config.rotation_period.clone(),
            intermediates: active.intermediates.iter().map(end).collect(),
            roots: Arc::new(roots(&rows)?),
            key,
            config_created: rows.config.created,
            config_modified: rows.config.modified,
        })
    }
}

fn roots(rows: &Rows) -> Result<Roots, RowError> {
    let mut roots: Vec<Root> = rows
        .roots
        .values()
        .map(|row| Root {
            id: row.id.clone(),
            name: row.name.clone(),
            serial: row.serial,
            signing_key_id: row.signing_key_id.clone(),
            not_before: rows::time(row.not_before),
            not_after: rows::time(row.not_after),
            certificate: row.certificate.clone(),
            intermediates: row.intermediates.iter().map(|one| one.certificate.clone()).collect(),
            active: row.active,
            created: row.created,
            modified: row.modified,
        })
        .collect();
    roots.sort_by_key(|root| std::cmp::Reverse((root.active, root.serial)));
    let changed = roots.iter().map(|root| root.modified).max();
    Ok(Roots {
        trust_domain: TrustDomain::new(&rows.config.trust_domain)?,
        active_id: rows.active()?.id.clone(),
        index: rows.config.modified.max(changed.unwrap_or_default()),
        bundle: roots.iter().map(|root| root.certificate.as_str()).collect::<String>().into(),
        roots,
    })
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("revision", &self.revision).field("roots", &self.roots).finish_non_exhaustive()
    }
}
