//! Questions to a [`State`].

use std::collections::BTreeSet;
use std::sync::Arc;

use culvert_types::{Action, Decision, HealthStatus, Intention, ServiceName, aggregate, decide};

use serde::de::DeserializeOwned;

use super::rows::{Check, IntentionEntry, Node, Service, ServiceKind};
use super::{State, Stored, row_key};
use crate::store::{Revision, Row, RowKey, Table};

impl State {
    /// The last commit that is included.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The last revision that changed `table`.
    #[must_use]
    pub fn index(&self, table: Table) -> Revision {
        self.indexes[table as usize]
    }

    /// The last revision that changed what is known about a service name: instances, sidecars, checks, nodes.
    #[must_use]
    pub fn service_index(&self, name: &str) -> Revision {
        let own = self.groups.get(name).map_or(self.extinction, |group| group.index);
        own.max(self.everywhere)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Stored<Node>>> {
        self.nodes.values()
    }

    /// The node of that name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Arc<Stored<Node>>> {
        self.nodes.get(name)
    }

    /// All service instances, by node and ID.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Stored<Service>>> {
        self.services.values()
    }

    /// One instance.
    #[must_use]
    pub fn service(&self, node: &str, id: &str) -> Option<&Arc<Stored<Service>>> {
        self.services.get(&row_key(node, id))
    }

    /// All instances that `node` registered, by ID.
    pub fn services_of(&self, node: &str) -> impl Iterator<Item = &Arc<Stored<Service>>> {
        in_node(&self.services, node)
    }

    /// All instances called `name`.
    pub fn services_named(&self, name: &str) -> impl Iterator<Item = &Arc<Stored<Service>>> {
        let keys = self.groups.get(name).map(|group| &group.members);
        self.by_keys(keys)
    }

    /// What takes mesh connections for the service `name`: its sidecars, and instances that terminate TLS themselves.
    pub fn connect_instances(&self, name: &str) -> impl Iterator<Item = &Arc<Stored<Service>>> {
        let group = self.groups.get(name);
        let native = self.by_keys(group.map(|group| &group.members)).filter(|service| service.connect_native);
        self.by_keys(group.map(|group| &group.proxies)).chain(native)
    }

    /// Every sidecar, by node and ID.
    pub fn sidecars(&self) -> impl Iterator<Item = &Arc<Stored<Service>>> {
        self.services().filter(|service| service.kind == ServiceKind::ConnectProxy)
    }

    fn by_keys<'a>(&'a self, keys: Option<&'a BTreeSet<String>>) -> impl Iterator<Item = &'a Arc<Stored<Service>>> {
        keys.into_iter().flatten().filter_map(|key| self.services.get(key))
    }

    /// All checks, by node and ID.
    pub fn checks(&self) -> impl Iterator<Item = &Arc<Stored<Check>>> {
        self.checks.values()
    }

    /// One check.
    #[must_use]
    pub fn check(&self, node: &str, id: &str) -> Option<&Arc<Stored<Check>>> {
        self.checks.get(&row_key(node, id))
    }

    /// All checks that run on `node`, by ID.
    pub fn checks_on(&self, node: &str) -> impl Iterator<Item = &Arc<Stored<Check>>> {
        in_node(&self.checks, node)
    }

    /// Checks about one instance; with an empty `service_id`, about the node itself.
    pub fn checks_of(&self, node: &str, service_id: &str) -> impl Iterator<Item = &Arc<Stored<Check>>> {
        let keys = self.checks_by_service.get(&row_key(node, service_id));
        keys.into_iter().flat_map(|keys| keys.iter()).filter_map(|key| self.checks.get(key))
    }

    /// Health of an instance: the worst of its own checks and its node's.
    #[must_use]
    pub fn health(&self, node: &str, service_id: &str) -> HealthStatus {
        let checks = self.checks_of(node, service_id).chain(self.checks_of(node, ""));
        aggregate(checks.map(|check| check.status))
    }

    /// Health of a mesh end point: of the sidecar (or native instance) and of the application behind it.
    #[must_use]
    pub fn mesh_health(&self, end_point: &Service) -> HealthStatus {
        let own = self.health(&end_point.node, &end_point.id);
        let behind = end_point.proxy.as_ref().map(|proxy| proxy.destination_service_id.as_str());
        let behind = behind.filter(|id| !id.is_empty()).map(|id| self.health(&end_point.node, id));
        own.max(behind.unwrap_or(HealthStatus::Passing))
    }

    /// Every intention with what is kept beside it, in the order in which they are tried.
    #[must_use]
    pub fn intentions(&self) -> &Arc<[Arc<Stored<IntentionEntry>>]> {
        &self.ordered
    }

    /// Every intention, in the order in which they are tried.
    #[must_use]
    pub fn rules(&self) -> &Arc<[Intention]> {
        &self.rules
    }

    /// The intention of exactly this pair of names (`*` for any).
    #[must_use]
    pub fn intention(&self, source: &str, destination: &str) -> Option<&Arc<Stored<IntentionEntry>>> {
        self.intentions.get(&format!("{destination}/{source}"))
    }

    /// May `source` call `destination`?
    #[must_use]
    pub fn decide(&self, source: &ServiceName, destination: &ServiceName, default: Action) -> Decision<'_> {
        decide(self.rules.iter(), source, destination, default)
    }

    /// A row of the certificate authority.
    #[must_use]
    pub fn authority(&self, key: &str) -> Option<&Row> {
        self.authority.get(key)
    }

    /// All rows of the certificate authority, by key.
    pub fn authority_rows(&self) -> impl Iterator<Item = (&str, &Row)> {
        self.authority.iter().map(|(key, row)| (key.as_str(), row))
    }

    /// The revision of a row's last change, for guards.
    #[must_use]
    pub fn modified(&self, table: Table, key: &str) -> Option<Revision> {
        match table {
            Table::Nodes => self.nodes.get(key).map(|row| row.modified),
            Table::Services => self.services.get(key).map(|row| row.modified),
            Table::Checks => self.checks.get(key).map(|row| row.modified),
            Table::Intentions => self.intentions.get(key).map(|row| row.modified),
            Table::Authority => self.authority.get(key).map(|row| row.modified),
        }
    }

    /// Does the row already say `value`? Then a put would change nothing.
    pub(super) fn says(&self, key: &RowKey, value: &[u8]) -> bool {
        fn equal<T: PartialEq + DeserializeOwned>(rows: &super::Rows<T>, key: &str, value: &[u8]) -> bool {
            rows.get(key).is_some_and(|row| serde_json::from_slice::<T>(value).is_ok_and(|new| new == row.value))
        }
        let RowKey { table, key } = key;
        match table {
            Table::Nodes => equal(&self.nodes, key, value),
            Table::Services => equal(&self.services, key, value),
            Table::Checks => equal(&self.checks, key, value),
            Table::Intentions => equal(&self.intentions, key, value),
            Table::Authority => self.authority.get(key).is_some_and(|row| row.value == value),
        }
    }
}

/// Rows whose key starts with `<node>/`.
fn in_node<'a, T>(rows: &'a super::Rows<T>, node: &str) -> impl Iterator<Item = &'a Arc<Stored<T>>> + use<'a, T> {
    let prefix = format!("{node}/");
    rows.range(prefix.clone()..).take_while(move |(key, _)| key.starts_with(&prefix)).map(|(_, row)| row)
}
