//! The typed, immutable picture of the store at one revision.
//!
//! [`State`] is computed from rows and never changed: every read, view and xDS snapshot is taken from one `Arc<State>`.
//! [`Ledger`] keeps the latest one current, publishes it, and is the only way to write. [`blocking`] holds a reader until
//! what it asked about changes. Rows of the authority stay bytes here: only the CA reads them.

pub mod blocking;
mod ledger;
mod query;
pub mod rows;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

use culvert_types::Intention;
use serde::de::DeserializeOwned;

use self::rows::{Check, IntentionEntry, Node, Service};
use crate::store::{Commit, Contents, Revision, Row, RowKey, Table};

pub use self::ledger::{Ledger, LedgerError, Plan, UpdateError};

/// A row's value and the revisions that made and last changed it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<T> {
    /// The value.
    pub value: T,
    /// `CreateIndex`.
    pub created: Revision,
    /// `ModifyIndex`.
    pub modified: Revision,
}

impl<T> Deref for Stored<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// Rows of one table by key.
type Rows<T> = BTreeMap<String, Arc<Stored<T>>>;

/// Everything at one revision.
#[derive(Clone, Default)]
pub struct State {
    revision: Revision,
    /// The last revision that changed each table, in the order of [`Table::ALL`].
    indexes: [Revision; Table::ALL.len()],
    nodes: Arc<Rows<Node>>,
    services: Arc<Rows<Service>>,
    checks: Arc<Rows<Check>>,
    intentions: Arc<Rows<IntentionEntry>>,
    authority: Arc<BTreeMap<String, Row>>,
    /// Derived from `services`: instances by service name.
    groups: Arc<BTreeMap<String, Arc<Group>>>,
    /// Derived from `checks`: keys of checks by key of their service; `<node>/` for those of the node itself.
    checks_by_service: Arc<BTreeMap<String, Arc<BTreeSet<String>>>>,
    /// Derived from `intentions`: in the order in which they are tried.
    ordered: Arc<[Arc<Stored<IntentionEntry>>]>,
    /// Derived from `intentions`: what `decide` takes.
    rules: Arc<[Intention]>,
    /// The last revision at which a service name lost its last instance.
    extinction: Revision,
    /// The last revision that concerns every service of a node: nodes and their own checks.
    everywhere: Revision,
}

/// Instances that concern one service name.
#[derive(Clone, Debug, Default)]
struct Group {
    /// The last revision that changed one of them or of their checks.
    index: Revision,
    /// Keys of instances with that name.
    members: BTreeSet<String>,
    /// Keys of sidecars of services with that name.
    proxies: BTreeSet<String>,
}

/// A row that this program cannot read.
#[derive(Debug, thiserror::Error)]
#[error("row {key} of the state store is not readable by this version")]
pub struct RowError {
    /// Which.
    pub key: RowKey,
    /// Why.
    #[source]
    pub source: serde_json::Error,
}

/// Key of a service or check row. Node names hold no slash.
#[must_use]
pub fn row_key(node: &str, id: &str) -> String {
    format!("{node}/{id}")
}

/// Key of an intention row. Service names hold no slash.
#[must_use]
pub fn intention_key(rule: &Intention) -> String {
    format!("{}/{}", rule.destination, rule.source)
}

impl State {
    /// Reads all rows.
    ///
    /// # Errors
    /// [`RowError`] for the first row that cannot be read: guessing what an intention said would not be safe.
    pub fn load(contents: Contents) -> Result<Self, RowError> {
        let mut state = Self { revision: contents.revision, ..Self::default() };
        for (key, row) in contents.rows {
            state.put(&key, row)?;
        }
        state.order_intentions();
        // What was deleted before the load left no trace, so every index starts at the store's: a reader that waits from
        // before the restart is answered at once instead of missing a deletion.
        state.indexes = [contents.revision; Table::ALL.len()];
        state.extinction = contents.revision;
        state.everywhere = contents.revision;
        Ok(state)
    }

    /// The state after `commit`. Rows that cannot be read keep their previous value and are returned.
    #[must_use]
    pub fn apply(&self, commit: &Commit) -> (Self, Vec<RowError>) {
        let mut state = Self { revision: commit.revision, ..self.clone() };
        let mut errors = Vec::new();
        for change in &commit.changes {
            let applied = match &change.row {
                Some(row) => state.put(&change.key, row.clone()),
                None => {
                    state.delete(&change.key);
                    Ok(())
                }
            };
            errors.extend(applied.err());
            state.indexes[change.key.table as usize] = commit.revision;
        }
        if commit.changes.iter().any(|change| change.key.table == Table::Intentions) {
            state.order_intentions();
        }
        (state, errors)
    }

    fn put(&mut self, key: &RowKey, row: Row) -> Result<(), RowError> {
        let RowKey { table, key: name } = key;
        match table {
            Table::Nodes => {
                Arc::make_mut(&mut self.nodes).insert(name.clone(), parse(key, &row)?);
                self.everywhere = self.revision;
            }
            Table::Services => {
                let service: Arc<Stored<Service>> = parse(key, &row)?;
                self.leave_groups(name);
                self.join_groups(name, &service);
                Arc::make_mut(&mut self.services).insert(name.clone(), service);
            }
            Table::Checks => {
                let check: Arc<Stored<Check>> = parse(key, &row)?;
                self.unlink_check(name);
                self.link_check(name, &check);
                Arc::make_mut(&mut self.checks).insert(name.clone(), check);
            }
            Table::Intentions => {
                Arc::make_mut(&mut self.intentions).insert(name.clone(), parse(key, &row)?);
            }
            Table::Authority => {
                Arc::make_mut(&mut self.authority).insert(name.clone(), row);
            }
        }
        Ok(())
    }

    fn delete(&mut self, key: &RowKey) {
        let RowKey { table, key } = key;
        match table {
            Table::Nodes => {
                Arc::make_mut(&mut self.nodes).remove(key);
                self.everywhere = self.revision;
            }
            Table::Services => {
                self.leave_groups(key);
                Arc::make_mut(&mut self.services).remove(key);
            }
            Table::Checks => {
                self.unlink_check(key);
                Arc::make_mut(&mut self.checks).remove(key);
            }
            Table::Intentions => {
                Arc::make_mut(&mut self.intentions).remove(key);
            }
            Table::Authority => {
                Arc::make_mut(&mut self.authority).remove(key);
            }
        }
    }

    fn join_groups(&mut self, key: &str, service: &Service) {
        let groups = Arc::make_mut(&mut self.groups);
        let group = Arc::make_mut(groups.entry(service.name.clone()).or_default());
        group.members.insert(key.to_owned());
        group.index = self.revision;
        if let Some(proxy) = &service.proxy {
            let group = Arc::make_mut(groups.entry(proxy.destination_service_name.clone()).or_default());
            group.proxies.insert(key.to_owned());
            group.index = self.revision;
        }
    }

    fn leave_groups(&mut self, key: &str) {
        let Some(service) = self.services.get(key).cloned() else { return };
        let groups = Arc::make_mut(&mut self.groups);
        let proxied = service.proxy.as_ref().map(|proxy| proxy.destination_service_name.as_str());
        for name in proxied.into_iter().chain([service.name.as_str()]) {
            let Some(group) = groups.get_mut(name) else { continue };
            let group = Arc::make_mut(group);
            group.members.remove(key);
            group.proxies.remove(key);
            group.index = self.revision;
            if group.members.is_empty() && group.proxies.is_empty() {
                groups.remove(name);
                self.extinction = self.revision;
            }
        }
    }

    fn link_check(&mut self, key: &str, check: &Check) {
        let owner = row_key(&check.node, &check.service_id);
        let linked = Arc::make_mut(&mut self.checks_by_service).entry(owner.clone()).or_default();
        Arc::make_mut(linked).insert(key.to_owned());
        self.touch_owner(&owner, check);
    }

    fn unlink_check(&mut self, key: &str) {
        let Some(check) = self.checks.get(key).cloned() else { return };
        let owner = row_key(&check.node, &check.service_id);
        let by_service = Arc::make_mut(&mut self.checks_by_service);
        if let Some(linked) = by_service.get_mut(&owner) {
            let linked = Arc::make_mut(linked);
            linked.remove(key);
            if linked.is_empty() {
                by_service.remove(&owner);
            }
        }
        self.touch_owner(&owner, &check);
    }

    /// A check changed: so did the index of every name that its service goes by.
    fn touch_owner(&mut self, owner: &str, check: &Check) {
        if check.service_id.is_empty() {
            self.everywhere = self.revision;
            return;
        }
        let proxied = self.services.get(owner).and_then(|service| service.proxy.as_ref());
        let proxied = proxied.map(|proxy| proxy.destination_service_name.clone());
        let groups = Arc::make_mut(&mut self.groups);
        for name in proxied.iter().chain([&check.service_name]) {
            if let Some(group) = groups.get_mut(name) {
                Arc::make_mut(group).index = self.revision;
            }
        }
    }

    fn order_intentions(&mut self) {
        let mut ordered: Vec<_> = self.intentions.values().cloned().collect();
        ordered.sort_by(|left, right| {
            let (l, r) = (&left.rule, &right.rule);
            let names = || (&l.destination, &l.source).cmp(&(&r.destination, &r.source));
            r.precedence().cmp(&l.precedence()).then_with(names)
        });
        self.rules = ordered.iter().map(|entry| entry.rule.clone()).collect();
        self.ordered = ordered.into();
    }
}

fn parse<T: DeserializeOwned>(key: &RowKey, row: &Row) -> Result<Arc<Stored<T>>, RowError> {
    let value = serde_json::from_slice(&row.value).map_err(|source| RowError { key: key.clone(), source })?;
    Ok(Arc::new(Stored { value, created: row.created, modified: row.modified }))
}

#[cfg(test)]
mod tests;
