//! Intentions as network RBAC: the same verdict as `culvert_types::decide`, in Envoy's words.
//!
//! Default deny becomes `ALLOW` with one policy per allowing intention, default allow becomes `DENY` with one per denying
//! intention. A policy matches exactly the peers for which its intention is the one that decides: what an intention of higher
//! precedence says otherwise is excluded with `not_id`. `rules` is always there: Envoy lets everything pass without it.
//!
//! | Default | Intentions | Rules |
//! |---|---|---|
//! | deny | none | `ALLOW` nothing: all denied |
//! | allow | none | `DENY` nothing: all allowed (as Consul sends it) |
//!
//! A limit of Envoy, with Consul's configuration as with ours: its filter judges a connection when the first byte comes from
//! the client, while the connection to the application is opened before. What a server says unasked (a greeting) can therefore
//! reach a denied peer that has a certificate of the mesh. culvert's worker judges before it connects.

use std::collections::{BTreeMap, BTreeSet};

use culvert_types::{Action, Intention, IntentionSubject, ServiceName, TrustDomain};
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule;
use envoy_types::pb::envoy::config::rbac::v3::principal::{Authenticated, Identifier, Set};
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action as RbacAction;
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as GeneratedFilter;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use super::wire::{RbacFilter, Rules};
use crate::xds::snapshot::Snapshot;

/// Consul's name of the filter in statistics.
const STAT_PREFIX: &str = "connect_authz";

/// The filter for the public listener of `snapshot`.
pub(super) fn filter(snapshot: &Snapshot) -> Any {
    let rules = rules(&snapshot.intentions, snapshot.default_action, &snapshot.identity.trust_domain);
    let filter = RbacFilter { rules: Some(rules), stat_prefix: STAT_PREFIX.to_owned() };
    Any { type_url: GeneratedFilter::type_url(), value: filter.encode_to_vec() }
}

/// The name of an intention's policy: what events and logs show, for example `web => api (allow, precedence 9)`.
#[must_use]
pub fn policy_name(intention: &Intention) -> String {
    intention.to_string()
}

/// Rules for intentions that all speak about one destination.
pub(super) fn rules(intentions: &[Intention], default: Action, trust_domain: &TrustDomain) -> Rules {
    let (action, listed) = match default {
        Action::Deny => (RbacAction::Allow, Action::Allow),
        Action::Allow => (RbacAction::Deny, Action::Deny),
    };
    let mut policies = BTreeMap::new();
    let mut decided: BTreeSet<&ServiceName> = BTreeSet::new();
    for intention in in_order(intentions) {
        let principal = match &intention.source {
            IntentionSubject::Exact(name) if !decided.insert(name) => continue,
            IntentionSubject::Exact(name) => authenticated(trust_domain, Some(name)),
            IntentionSubject::Any => anyone_but(trust_domain, &decided),
        };
        if intention.action == listed {
            let permission = Permission { rule: Some(Rule::Any(true)) };
            let policy = Policy { permissions: vec![permission], principals: vec![principal], ..Policy::default() };
            policies.insert(policy_name(intention), policy);
        }
        if intention.source == IntentionSubject::Any {
            break; // what follows never decides
        }
    }
    Rules { action: action as i32, policies }
}

/// As `decide` tries them: by precedence; of two of one pair, which the store does not allow, the denying one.
fn in_order(intentions: &[Intention]) -> Vec<&Intention> {
    let mut ordered: Vec<&Intention> = intentions.iter().collect();
    ordered.sort_by_key(|intention| std::cmp::Reverse((intention.precedence(), intention.action == Action::Deny)));
    ordered
}

/// Every service of the trust domain except those that an exact intention has decided about.
fn anyone_but(trust_domain: &TrustDomain, decided: &BTreeSet<&ServiceName>) -> Principal {
    let any = authenticated(trust_domain, None);
    if decided.is_empty() {
        return any;
    }
    let not = |name: &&ServiceName| principal(Identifier::NotId(Box::new(authenticated(trust_domain, Some(name)))));
    let ids = std::iter::once(any).chain(decided.iter().map(not)).collect();
    principal(Identifier::AndIds(Set { ids }))
}

/// A peer with a verified certificate of that service, or of any.
fn authenticated(trust_domain: &TrustDomain, service: Option<&ServiceName>) -> Principal {
    let service = service.map_or_else(|| "[^/]+".to_owned(), |name| escape(name.as_str()));
    let domain = escape(trust_domain.as_str());
    let regex = format!("^spiffe://{domain}/ns/default/dc/[^/]+/svc/{service}$");
    let pattern = MatchPattern::SafeRegex(RegexMatcher { regex, ..RegexMatcher::default() });
    let principal_name = Some(StringMatcher { match_pattern: Some(pattern), ..StringMatcher::default() });
    principal(Identifier::Authenticated(Authenticated { principal_name }))
}

fn principal(identifier: Identifier) -> Principal {
    Principal { identifier: Some(identifier) }
}

/// Of the bytes that names hold, only the dot means something in a regular expression.
fn escape(name: &str) -> String {
    name.replace('.', "\\.")
}

#[cfg(test)]
#[path = "rbac_tests.rs"]
mod tests;
