//! Intentions: writing, listing and asking.
//!
//! Owns the rules about rules: one per pair of names, precedence, the IDs of the old API. Who may talk to whom is decided by
//! `culvert_types::decide` alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use culvert_types::{Action, DecidedBy, Decision, Intention, IntentionSubject, ServiceName};
use uuid::Uuid;

use crate::state::rows::IntentionEntry;
use crate::state::{Ledger, Plan, State, Stored, UpdateError, intention_key};
use crate::store::Table;

/// Most pairs in `Meta`.
const MAX_META_PAIRS: usize = 64;
/// Longest key of `Meta`, in bytes.
const MAX_META_KEY: usize = 128;
/// Longest value of `Meta`, in bytes.
const MAX_META_VALUE: usize = 512;
/// Longest description, in bytes.
const MAX_DESCRIPTION: usize = 512;

/// What a client wants an intention to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Draft {
    /// The rule.
    pub rule: Intention,
    /// For people.
    pub description: String,
    /// Free pairs.
    pub meta: BTreeMap<String, String>,
}

/// Why an intention was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntentionError {
    /// Description too long.
    #[error("Description exceeds maximum length {MAX_DESCRIPTION}")]
    Description,
    /// Too many pairs.
    #[error("Meta exceeds maximum element count {MAX_META_PAIRS}")]
    MetaPairs,
    /// A key too long.
    #[error("Meta key {0:?} exceeds maximum length {MAX_META_KEY}")]
    MetaKey(String),
    /// A value too long.
    #[error("Meta value for key {0:?} exceeds maximum length {MAX_META_VALUE}")]
    MetaValue(String),
    /// The pair has one already, and the old API only creates.
    #[error("duplicate intention found: {0}")]
    Duplicate(String),
    /// No intention has that ID, or the pair has none.
    #[error("Intention not found")]
    NotFound,
    /// The old API does not move an intention.
    #[error("Cannot modify SourceName or DestinationName of an intention once it exists: delete it and create another")]
    Moved,
    /// The store.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// `default/web => default/api (ID: …, Precedence: 9, Action: ALLOW)`, as Consul names an intention; without the ID if it
/// has none.
fn full_text(rule: &Intention, id: Option<&str>) -> String {
    let id = id.map(|id| format!("ID: {id}, ")).unwrap_or_default();
    let (source, destination, action) = (&rule.source, &rule.destination, rule.action.as_str().to_ascii_uppercase());
    let precedence = rule.precedence().0;
    format!("default/{source} => default/{destination} ({id}Precedence: {precedence}, Action: {action})")
}

/// Writes intentions. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Intentions {
    ledger: Ledger,
}

impl Intentions {
    /// Intentions in the store behind `ledger`.
    #[must_use]
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }

    /// Makes the intention of a pair, or replaces it. Says the same again at no cost.
    ///
    /// # Errors
    /// [`IntentionError`].
    pub(crate) async fn upsert(&self, draft: &Draft) -> Result<(), IntentionError> {
        check(draft)?;
        let now = SystemTime::now();
        self.ledger
            .update(|state, plan| {
                let existing = find(state, &draft.rule);
                put(plan, draft, existing, existing.and_then(|entry| entry.id.clone()), now);
                Ok(())
            })
            .await
    }

    /// Makes an intention with an ID, for the old API.
    ///
    /// # Errors
    /// [`IntentionError::Duplicate`] when the pair has one.
    pub(crate) async fn create(&self, draft: &Draft) -> Result<String, IntentionError> {
        check(draft)?;
        let (now, id) = (SystemTime::now(), Uuid::new_v4().to_string());
        self.ledger
            .update(|state, plan| {
                if let Some(existing) = find(state, &draft.rule) {
                    return Err(IntentionError::Duplicate(full_text(&existing.rule, existing.id.as_deref())));
                }
                put(plan, draft, None, Some(id.clone()), now);
                Ok(id.clone())
            })
            .await
    }

    /// Changes the intention with that ID; its pair stays.
    ///
    /// # Errors
    /// [`IntentionError::NotFound`], [`IntentionError::Moved`].
    pub(crate) async fn update(&self, id: &str, draft: &Draft) -> Result<(), IntentionError> {
        check(draft)?;
        let now = SystemTime::now();
        self.ledger
            .update(|state, plan| {
                let existing = by_id(state, id).ok_or(IntentionError::NotFound)?;
                if intention_key(&existing.rule) != intention_key(&draft.rule) {
                    return Err(IntentionError::Moved);
                }
                put(plan, draft, Some(existing), Some(id.to_owned()), now);
                Ok(())
            })
            .await
    }

    /// Removes the intention of a pair. No error if there is none, as in Consul.
    ///
    /// # Errors
    /// [`IntentionError::Update`].
    pub(crate) async fn delete(
        &self,
        source: &IntentionSubject,
        destination: &IntentionSubject,
    ) -> Result<(), IntentionError> {
        let key = format!("{destination}/{source}");
        self.ledger
            .update(|_, plan| {
                plan.delete(Table::Intentions, key.clone());
                Ok(())
            })
            .await
    }

    /// Removes the intention with that ID.
    ///
    /// # Errors
    /// [`IntentionError::NotFound`].
    pub(crate) async fn delete_by_id(&self, id: &str) -> Result<(), IntentionError> {
        self.ledger
            .update(|state, plan| {
                let existing = by_id(state, id).ok_or(IntentionError::NotFound)?;
                plan.delete(Table::Intentions, intention_key(&existing.rule));
                Ok(())
            })
            .await
    }
}

fn find<'a>(state: &'a State, rule: &Intention) -> Option<&'a Arc<Stored<IntentionEntry>>> {
    state.intention(rule.source.as_str(), rule.destination.as_str())
}

/// The intention with that ID.
#[must_use]
pub(crate) fn by_id<'a>(state: &'a State, id: &str) -> Option<&'a Arc<Stored<IntentionEntry>>> {
    state.intentions().iter().find(|entry| entry.id.as_deref() == Some(id))
}

/// Plans the write; keeps the times of an entry that would not change otherwise.
fn put(
    plan: &mut Plan,
    draft: &Draft,
    existing: Option<&Arc<Stored<IntentionEntry>>>,
    id: Option<String>,
    now: SystemTime,
) {
    let mut entry = IntentionEntry {
        rule: draft.rule.clone(),
        id,
        description: draft.description.clone(),
        meta: draft.meta.clone(),
        created_at: existing.map_or(now, |entry| entry.created_at),
        updated_at: existing.map_or(now, |entry| entry.updated_at),
    };
    if existing.is_some_and(|existing| existing.value != entry) {
        entry.updated_at = now;
    }
    plan.put(Table::Intentions, intention_key(&entry.rule), &entry);
}

fn check(draft: &Draft) -> Result<(), IntentionError> {
    if draft.description.len() > MAX_DESCRIPTION {
        return Err(IntentionError::Description);
    }
    if draft.meta.len() > MAX_META_PAIRS {
        return Err(IntentionError::MetaPairs);
    }
    for (key, value) in &draft.meta {
        if key.len() > MAX_META_KEY {
            return Err(IntentionError::MetaKey(key.clone()));
        }
        if value.len() > MAX_META_VALUE {
            return Err(IntentionError::MetaValue(key.clone()));
        }
    }
    Ok(())
}

/// Intentions that speak about `name` on one side, in the order in which they are tried.
pub(crate) fn matching<'a>(
    state: &'a State,
    side: Side,
    name: &'a IntentionSubject,
) -> impl Iterator<Item = &'a Arc<Stored<IntentionEntry>>> {
    state.intentions().iter().filter(move |entry| {
        let subject = match side {
            Side::Source => &entry.rule.source,
            Side::Destination => &entry.rule.destination,
        };
        *subject == IntentionSubject::Any || subject == name
    })
}

/// One side of an intention.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    /// Who calls.
    Source,
    /// Who is called.
    Destination,
}

/// The verdict on a pair, and Consul's sentence about it.
#[must_use]
pub(crate) fn explain(
    state: &State,
    source: &ServiceName,
    destination: &ServiceName,
    default: Action,
) -> (bool, String) {
    let Decision { action, by } = state.decide(source, destination, default);
    let reason = match by {
        DecidedBy::Default => "Default intention policy".to_owned(),
        DecidedBy::Intention(rule) => {
            let id = find(state, rule).and_then(|entry| entry.id.as_deref());
            format!("Matched L4 intention: {}", full_text(rule, id))
        }
    };
    (action == Action::Allow, reason)
}

#[cfg(test)]
mod tests;
