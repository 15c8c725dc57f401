//! The delta protocol of one stream, without any I/O: what the client has, what it asks for, what to send next.
//!
//! Rules kept here (xDS protocol, "Incremental xDS"):
//!
//! * A client names the versions it has; only what differs is sent. The same holds after a reconnect.
//! * One response per kind is under way until it is acknowledged or refused, so a slow client gets the latest state once
//!   instead of every state in turn, and at most three responses wait for it.
//! * Make before break: clusters, then endpoints, then listeners; an upstream listener waits until the endpoints of its
//!   cluster were sent (at most [`HOLD`]); clusters and endpoints are removed after the listeners that used them.
//! * A refused (NACKed) version is not sent again; a later one is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as PbResource,
};
use tokio::time::Instant;

use super::render::{Kind, Resource, Resources};

/// Longest wait of a listener for its cluster's endpoints: a client may never ask for them.
pub const HOLD: Duration = Duration::from_secs(1);
/// Most resource names that a client may subscribe to or know, per kind.
pub const MAX_NAMES: usize = 10_000;
/// Longest part of a client's reason that is kept.
const MAX_REASON: usize = 2048;
/// Subscribes to everything of a kind.
const WILDCARD: &str = "*";

/// A stream that cannot go on.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SessionError {
    /// [`MAX_NAMES`].
    #[error("more than {MAX_NAMES} {} names on one stream", .0.as_str())]
    TooManyNames(Kind),
}

/// What a request told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Heard {
    /// A subscription, or a type that this server does not have.
    Nothing,
    /// The response under way is in force.
    Ack(Kind),
    /// The response under way was refused; the client keeps what it had.
    Nack(Refusal),
}

/// A response that a client refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Of its resources.
    pub kind: Kind,
    /// Every resource of the response; `reason` says which.
    pub resources: Vec<String>,
    /// The client's text.
    pub reason: String,
}

/// The state of one stream.
#[derive(Debug, Default)]
pub struct Session {
    clusters: Subscription,
    endpoints: Subscription,
    listeners: Subscription,
    nonce: u64,
    /// Since when listeners wait for endpoints.
    held_since: Option<Instant>,
}

/// The state of one kind.
#[derive(Debug, Default)]
struct Subscription {
    /// Was there a request?
    started: bool,
    wildcard: bool,
    names: BTreeSet<String>,
    /// Versions that the client has or was sent.
    known: BTreeMap<String, String>,
    /// Asked for expressly: to be answered whatever the client is believed to have.
    asked: BTreeSet<String>,
    in_flight: Option<InFlight>,
    /// Was the last response refused?
    refused: bool,
    /// Was there a response?
    told: bool,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    names: Vec<String>,
}

impl Session {
    /// Takes a request in.
    ///
    /// # Errors
    /// [`SessionError`]; the stream has to be ended then.
    pub fn hear(&mut self, request: &DeltaDiscoveryRequest) -> Result<Heard, SessionError> {
        let Some(kind) = Kind::from_type_url(&request.type_url) else { return Ok(Heard::Nothing) };
        let subscription = self.of_mut(kind);
        subscription.subscribe(kind, request);
        if subscription.names.len().max(subscription.known.len()).max(subscription.asked.len()) > MAX_NAMES {
            return Err(SessionError::TooManyNames(kind));
        }
        Ok(subscription.answered(kind, request))
    }

    /// The next response for a client that is to have `resources`; `None` when there is nothing to send now.
    pub fn next(&mut self, resources: &Resources, now: Instant) -> Option<DeltaDiscoveryResponse> {
        let held = self.held(resources, now);
        for kind in Kind::ALL {
            if self.of(kind).in_flight.is_some() {
                continue;
            }
            let mut changed = self.of(kind).changed(resources.of(kind));
            changed.retain(|resource| kind != Kind::Listener || !held.contains(&resource.name));
            let mut removed = self.of(kind).unknown(resources.of(kind));
            if kind == Kind::Listener {
                removed.extend(self.of(kind).surplus(resources.of(kind)));
            }
            // A client that asked for all must learn that there is nothing: it waits for its first answer.
            let nothing = self.of(kind).awaits_first() && resources.of(kind).is_empty();
            if nothing || !changed.is_empty() || !removed.is_empty() {
                return Some(self.respond(kind, resources, changed, removed));
            }
        }
        self.next_removal(resources, &held)
    }

    /// When [`Self::next`] has to be asked again although nothing happened.
    #[must_use]
    pub fn wake_at(&self, now: Instant) -> Option<Instant> {
        self.held_since.map(|since| since + HOLD).filter(|at| *at > now)
    }

    /// Has the client acknowledged everything that it asked for?
    #[must_use]
    pub fn settled(&self) -> bool {
        Kind::ALL.iter().all(|kind| self.of(*kind).in_flight.is_none()) && self.held_since.is_none()
    }

    /// Clusters, then endpoints, once the listeners are settled.
    fn next_removal(&mut self, resources: &Resources, held: &BTreeSet<String>) -> Option<DeltaDiscoveryResponse> {
        let listeners = &self.listeners;
        if listeners.in_flight.is_some() || listeners.refused || !held.is_empty() {
            return None; // an old listener may still use what is to go
        }
        for kind in [Kind::Cluster, Kind::Endpoints] {
            if self.of(kind).in_flight.is_some() {
                return None;
            }
            let surplus = self.of(kind).surplus(resources.of(kind));
            if !surplus.is_empty() {
                return Some(self.respond(kind, resources, Vec::new(), surplus));
            }
        }
        None
    }

    /// Listeners that wait for the endpoints of their cluster.
    fn held(&mut self, resources: &Resources, now: Instant) -> BTreeSet<String> {
        let ready = |cluster: &str| {
            // Known because they were sent on this stream, or because the client came with them.
            self.clusters.known.contains_key(cluster) && self.endpoints.known.contains_key(cluster)
        };
        let waits = |listener: &&Arc<Resource>| listener.needs.as_deref().is_some_and(|cluster| !ready(cluster));
        let changed = self.listeners.changed(resources.of(Kind::Listener));
        let held: BTreeSet<String> = changed.iter().filter(waits).map(|listener| listener.name.clone()).collect();
        if held.is_empty() {
            self.held_since = None;
            return held;
        }
        let since = *self.held_since.get_or_insert(now);
        if now.duration_since(since) < HOLD { held } else { BTreeSet::new() }
    }

    fn respond(
        &mut self,
        kind: Kind,
        resources: &Resources,
        changed: Vec<Arc<Resource>>,
        removed: Vec<String>,
    ) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        let nonce = format!("{:08x}", self.nonce);
        if kind == Kind::Cluster {
            // Envoy keeps a changed cluster warming until it gets its endpoints again, changed or not.
            let again = changed.iter().filter(|cluster| self.endpoints.known.contains_key(&cluster.name));
            self.endpoints.asked.extend(again.map(|cluster| cluster.name.clone()));
        }
        let subscription = self.of_mut(kind);
        subscription.told = true;
        for resource in &changed {
            subscription.known.insert(resource.name.clone(), resource.version.clone());
            subscription.asked.remove(&resource.name);
        }
        for name in &removed {
            subscription.known.remove(name);
            subscription.asked.remove(name);
        }
        let names = changed.iter().map(|resource| resource.name.clone()).chain(removed.iter().cloned()).collect();
        subscription.in_flight = Some(InFlight { nonce: nonce.clone(), names });
        DeltaDiscoveryResponse {
            system_version_info: resources.version(),
            resources: changed.iter().map(|resource| wire(resource)).collect(),
            type_url: kind.type_url().to_owned(),
            removed_resources: removed,
            nonce,
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn of(&self, kind: Kind) -> &Subscription {
        match kind {
            Kind::Cluster => &self.clusters,
            Kind::Endpoints => &self.endpoints,
            Kind::Listener => &self.listeners,
        }
    }

    fn of_mut(&mut self, kind: Kind) -> &mut Subscription {
        match kind {
            Kind::Cluster => &mut self.clusters,
            Kind::Endpoints => &mut self.endpoints,
            Kind::Listener => &mut self.listeners,
        }
    }
}

impl Subscription {
    fn subscribe(&mut self, kind: Kind, request: &DeltaDiscoveryRequest) {
        if !std::mem::replace(&mut self.started, true) {
            let versions = &request.initial_resource_versions;
            self.known.extend(versions.iter().map(|(name, version)| (name.clone(), version.clone())));
            // The first request of a kind without a name means all of it, except for endpoints.
            self.wildcard = request.resource_names_subscribe.is_empty() && kind != Kind::Endpoints;
        }
        for name in &request.resource_names_subscribe {
            if name == WILDCARD {
                self.wildcard = true;
                continue;
            }
            self.names.insert(name.clone());
            if !request.initial_resource_versions.contains_key(name) {
                self.asked.insert(name.clone());
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
                let names = &self.names;
                self.known.retain(|known, _| names.contains(known));
                continue;
            }
            self.names.remove(name);
            self.asked.remove(name);
            self.known.remove(name);
            if self.wildcard {
                self.asked.insert(name.clone()); // the client cannot know whether it is still part of everything
            }
        }
    }

    fn answered(&mut self, kind: Kind, request: &DeltaDiscoveryRequest) -> Heard {
        // Without a nonce it answers nothing; with another one it answers what nobody waits for any more.
        let Some(in_flight) = self.in_flight.take_if(|sent| sent.nonce == request.response_nonce) else {
            return Heard::Nothing;
        };
        self.refused = request.error_detail.is_some();
        let Some(error) = &request.error_detail else { return Heard::Ack(kind) };
        let reason = error.message.chars().take(MAX_REASON).collect();
        Heard::Nack(Refusal { kind, resources: in_flight.names, reason })
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// Asked for everything, and was told nothing yet.
    fn awaits_first(&self) -> bool {
        self.started && self.wildcard && !self.told
    }

    /// What the client is to have and does not.
    fn changed(&self, present: &BTreeMap<String, Arc<Resource>>) -> Vec<Arc<Resource>> {
        let differs = |resource: &&Arc<Resource>| {
            self.asked.contains(&resource.name) || self.known.get(&resource.name) != Some(&resource.version)
        };
        if !self.started {
            return Vec::new();
        }
        present.values().filter(|resource| self.wants(&resource.name)).filter(differs).cloned().collect()
    }

    /// Asked for by name, and not there: the client is told so instead of left waiting.
    fn unknown(&self, present: &BTreeMap<String, Arc<Resource>>) -> Vec<String> {
        self.asked.iter().filter(|name| !present.contains_key(*name)).cloned().collect()
    }

    /// What the client has and is not to have any more.
    fn surplus(&self, present: &BTreeMap<String, Arc<Resource>>) -> Vec<String> {
        let gone = |name: &&String| !present.contains_key(*name) && !self.asked.contains(*name);
        self.known.keys().filter(gone).cloned().collect()
    }
}

fn wire(resource: &Resource) -> PbResource {
    PbResource {
        name: resource.name.clone(),
        version: resource.version.clone(),
        resource: Some(resource.body.clone()),
        ..PbResource::default()
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
