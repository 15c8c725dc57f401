//! `filter_metadata["culvert"]`: what only culvert's worker reads.

use culvert_types::Intention;

use super::wire::{ListValue, Metadata, Struct, Value, ValueKind};
use crate::xds::snapshot::{Instance, Snapshot};

const NAMESPACE: &str = "culvert";
/// Most intentions that are listed on a listener (the worker takes no more). Beyond, the policies' names have to do.
pub(super) const MAX_EXPLAINED: usize = 10_000;

/// Where an instance runs.
pub(super) fn instance(instance: &Instance) -> Metadata {
    let workload = instance.workload.map(|address| ("workload", text(&address.to_string())));
    ours([("node", text(&instance.node))].into_iter().chain(workload))
}

/// The intentions behind the RBAC filter, so that a proxy can say which rule decided.
pub(super) fn explanation(snapshot: &Snapshot) -> Metadata {
    let listed = (snapshot.intentions.len() <= MAX_EXPLAINED).then(|| {
        let values = snapshot.intentions.iter().map(intention).collect();
        ("intentions", Value { kind: Some(ValueKind::List(ListValue { values })) })
    });
    let head = listed.is_some().then(|| {
        [("destination", text(snapshot.identity.service.as_str())), ("default", text(snapshot.default_action.as_str()))]
    });
    ours(head.into_iter().flatten().chain(listed))
}

fn intention(intention: &Intention) -> Value {
    let fields = [
        ("source", text(intention.source.as_str())),
        ("destination", text(intention.destination.as_str())),
        ("action", text(intention.action.as_str())),
    ];
    Value { kind: Some(ValueKind::Struct(object(fields))) }
}

fn ours<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> Metadata {
    Metadata { filter_metadata: [(NAMESPACE.to_owned(), object(fields))].into() }
}

fn object<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> Struct {
    Struct { fields: fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
}

fn text(text: &str) -> Value {
    Value { kind: Some(ValueKind::String(text.to_owned())) }
}
