//! Why a connection was decided as it was, in the words of intentions.
//!
//! RBAC policies are what is obeyed; they do not say which intention they came from. culvert's control plane therefore adds
//! the intentions to the listener as metadata, which Envoy ignores. They name the rule in events and decide nothing.

use std::sync::Arc;

use culvert_types::{Action, Intention, ServiceIdentity, ServiceName, decide};

use crate::rbac::RbacDecision;

/// The word for "no intention matched".
const DEFAULT: &str = "default";

/// The intentions behind a listener's RBAC filter (`metadata.filter_metadata["culvert"]` of the listener).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Explain {
    /// The service behind the listener.
    pub destination: ServiceName,
    /// What holds when no intention matches.
    pub default: Action,
    /// The intentions that speak about the destination, in any order.
    pub intentions: Arc<[Intention]>,
}

impl Explain {
    /// Names the rule behind `decision` on the peer with this SPIFFE ID: `web => api (deny, precedence 9)`, or `default`.
    ///
    /// Should the intentions say something else than RBAC did, RBAC's own policy is named: never a reason that is not true.
    #[must_use]
    pub fn rule(&self, identity: Option<&str>, decision: &RbacDecision) -> String {
        let source = identity.and_then(|identity| ServiceIdentity::parse(identity).ok());
        let by_intention = source.and_then(|source| {
            let why = decide(self.intentions.iter(), &source.service, &self.destination, self.default);
            (why.allowed() == decision.allowed).then(|| why.by.to_string())
        });
        by_intention.unwrap_or_else(|| decision.rule())
    }
}

impl RbacDecision {
    /// The RBAC policy that decided, or `default`: all that can be said where no [`Explain`] came with the listener.
    #[must_use]
    pub fn rule(&self) -> String {
        self.policy.as_deref().unwrap_or(DEFAULT).to_owned()
    }
}
