//! What changes when a job is submitted: the tree behind `culvert job plan`, in Nomad's form.
//!
//! `tree` lays a job out as named fields and objects, this module compares two such trees and says what happens to the
//! running allocations, `render` prints.

mod render;
mod tree;

use crate::{Group, Job};
use std::collections::BTreeMap;
use tree::Node;

/// What happened to a field, an object, a task, a group or the job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DiffKind {
    /// The same in both.
    None,
    /// Only in the new job.
    Added,
    /// Only in the old job.
    Deleted,
    /// In both, with differences.
    Edited,
}

/// The difference between two versions of a job. Printing it gives Nomad's short form; see [`JobDiff::render`].
#[derive(Clone, Debug, PartialEq)]
pub struct JobDiff {
    /// The job's id.
    pub id: String,
    /// Added, edited or none; a job is never deleted by a plan.
    pub kind: DiffKind,
    /// Fields of the job itself.
    pub fields: Vec<FieldDiff>,
    /// `Datacenters`.
    pub objects: Vec<ObjectDiff>,
    /// Every group of either version, by name.
    pub groups: Vec<GroupDiff>,
}

/// The difference between two versions of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupDiff {
    /// The group's name.
    pub name: String,
    /// What happened to the block.
    pub kind: DiffKind,
    /// What happens to its allocations.
    pub updates: Updates,
    /// `Count`, `Meta[…]`.
    pub fields: Vec<FieldDiff>,
    /// `Network`, `Service`.
    pub objects: Vec<ObjectDiff>,
    /// Its sidecars and tasks, by name.
    pub tasks: Vec<TaskDiff>,
}

/// The difference between two versions of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskDiff {
    /// The task's name.
    pub name: String,
    /// What happened to the block.
    pub kind: DiffKind,
    /// Whether this is a service's sidecar, which culvert's worker serves.
    pub sidecar: bool,
    /// Fields of the task.
    pub fields: Vec<FieldDiff>,
    /// `Config`, `Resources` and so on.
    pub objects: Vec<ObjectDiff>,
}

/// The difference between two blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectDiff {
    /// Nomad's name of the block, for example `ConsulConnect`.
    pub name: String,
    /// What happened to it.
    pub kind: DiffKind,
    /// Its fields; those of an edited block include what stayed.
    pub fields: Vec<FieldDiff>,
    /// Blocks inside.
    pub objects: Vec<ObjectDiff>,
}

/// The difference between two values.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldDiff {
    /// Nomad's name of the field.
    pub name: String,
    /// What happened to it.
    pub kind: DiffKind,
    /// Empty if added.
    pub old: String,
    /// Empty if deleted.
    pub new: String,
}

/// What happens to the allocations of a group, as counts.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Updates {
    /// New allocations.
    pub create: u32,
    /// Allocations that are stopped.
    pub destroy: u32,
    /// Stopped, and started anew in another allocation.
    pub replace: u32,
    /// Left alone.
    pub ignore: u32,
}

/// What a new version means for the running allocations of a group. Nomad has in-place updates besides: culvert replaces
/// an allocation for any difference but the count, so that what runs is always what one version of the job says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// They stay as they are.
    Nothing,
    /// They are stopped and others take their place.
    Replace,
}

/// What changes from `old` (nothing runs: `None`) to `new`.
#[must_use]
pub fn diff(old: Option<&Job>, new: &Job) -> JobDiff {
    let before = old.map(tree::job);
    let after = tree::job(new);
    let own = compare(before.as_ref(), Some(&after), false);
    let mut names: Vec<&str> = new.groups.iter().map(|group| group.name.as_str()).collect();
    names.extend(old.iter().flat_map(|old| &old.groups).map(|group| group.name.as_str()));
    names.sort_unstable();
    names.dedup();
    let groups: Vec<GroupDiff> = names.into_iter().map(|name| group_diff(old, new, name)).collect();
    let edited = own.kind != DiffKind::None || groups.iter().any(|group| group.kind != DiffKind::None);
    let kind = match (old, edited) {
        (None, _) => DiffKind::Added,
        (Some(_), true) => DiffKind::Edited,
        (Some(_), false) => DiffKind::None,
    };
    JobDiff { id: new.id.clone(), kind, fields: own.fields, objects: own.objects, groups }
}

/// What happens to the running allocations of `group` when `old` becomes `new`. The runner asks the same function, so
/// that a plan says what a run does.
#[must_use]
pub fn group_change(old: &Job, new: &Job, group: &str) -> Change {
    let (Some(before), Some(after)) = (old.group(group), new.group(group)) else { return Change::Replace };
    // What reaches a task's environment from outside its group.
    let environment = |job: &Job| (job.region.clone(), job.namespace.clone(), job.meta.clone());
    let same = environment(old) == environment(new) && Group { count: after.count, ..before.clone() } == *after;
    if same { Change::Nothing } else { Change::Replace }
}

fn group_diff(old: Option<&Job>, new: &Job, name: &str) -> GroupDiff {
    let before = old.and_then(|old| old.group(name));
    let after = new.group(name);
    let own = compare(before.map(tree::group).as_ref(), after.map(tree::group).as_ref(), false);
    let tasks = task_diffs(before, after);
    let change = match (old, before, after) {
        (Some(old), Some(_), Some(_)) => group_change(old, new, name),
        _ => Change::Replace,
    };
    let touched = own.kind != DiffKind::None || tasks.iter().any(|task| task.kind != DiffKind::None);
    let kind = match (before, after) {
        (None, _) => DiffKind::Added,
        (_, None) => DiffKind::Deleted,
        _ if touched => DiffKind::Edited,
        _ => DiffKind::None,
    };
    let count = |group: Option<&Group>| group.map_or(0, |group| group.count);
    let updates = updates(count(before), count(after), change);
    GroupDiff { name: name.to_owned(), kind, updates, fields: own.fields, objects: own.objects, tasks }
}

fn updates(before: u32, after: u32, change: Change) -> Updates {
    let kept = before.min(after);
    let on = |wanted: Change| if change == wanted { kept } else { 0 };
    Updates {
        create: after.saturating_sub(before),
        destroy: before.saturating_sub(after),
        replace: on(Change::Replace),
        ignore: on(Change::Nothing),
    }
}

fn task_diffs(before: Option<&Group>, after: Option<&Group>) -> Vec<TaskDiff> {
    let layout = |group: &Group| {
        let tasks = group.tasks.iter().map(|task| (task.name.clone(), (tree::task(task), false)));
        let sidecars = group.sidecars();
        let sidecars = sidecars.iter().map(|sidecar| (sidecar.task.clone(), (tree::sidecar(sidecar), true)));
        tasks.chain(sidecars).collect::<BTreeMap<_, _>>()
    };
    let (before, after) = (before.map(layout).unwrap_or_default(), after.map(layout).unwrap_or_default());
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let task = |name: &String| {
        let (old, new) = (before.get(name), after.get(name));
        let own = compare(old.map(|(node, _)| node), new.map(|(node, _)| node), false);
        let sidecar = new.or(old).is_some_and(|(_, sidecar)| *sidecar);
        TaskDiff { name: name.clone(), kind: own.kind, sidecar, fields: own.fields, objects: own.objects }
    };
    names.into_iter().map(task).collect()
}

/// Compares two versions of a block. `context` keeps fields that stayed, as Nomad shows blocks that changed.
fn compare(old: Option<&Node>, new: Option<&Node>, context: bool) -> ObjectDiff {
    let name = new.or(old).map(|node| node.name.clone()).unwrap_or_default();
    let empty = BTreeMap::new();
    let (before, after) = (old.map_or(&empty, |node| &node.fields), new.map_or(&empty, |node| &node.fields));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let mut fields: Vec<FieldDiff> =
        names.into_iter().map(|name| field(name, before.get(name), after.get(name))).collect();
    let objects = objects(old, new);
    let changed = fields.iter().any(|field| field.kind != DiffKind::None) || !objects.is_empty();
    let kind = match (old, new) {
        (None, _) => DiffKind::Added,
        (_, None) => DiffKind::Deleted,
        _ if changed => DiffKind::Edited,
        _ => DiffKind::None,
    };
    if !context {
        fields.retain(|field| field.kind != DiffKind::None);
    }
    ObjectDiff { name, kind, fields, objects }
}

fn field(name: &str, old: Option<&String>, new: Option<&String>) -> FieldDiff {
    let kind = match (old, new) {
        (None, _) => DiffKind::Added,
        (_, None) => DiffKind::Deleted,
        (Some(old), Some(new)) if old == new => DiffKind::None,
        _ => DiffKind::Edited,
    };
    let text = |value: Option<&String>| value.cloned().unwrap_or_default();
    FieldDiff { name: name.to_owned(), kind, old: text(old), new: text(new) }
}

/// The blocks inside that changed. Blocks of one kind are told apart by their key, equal keys by their order.
fn objects(old: Option<&Node>, new: Option<&Node>) -> Vec<ObjectDiff> {
    fn keyed(node: Option<&Node>) -> BTreeMap<(&str, &str, usize), &Node> {
        let mut seen: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let mut keyed = BTreeMap::new();
        for object in node.iter().flat_map(|node| &node.objects) {
            let name = (object.name.as_str(), object.key.as_str());
            let nth = seen.entry(name).or_default();
            keyed.insert((name.0, name.1, *nth), object);
            *nth += 1;
        }
        keyed
    }
    let (before, after) = (keyed(old), keyed(new));
    let mut keys: Vec<_> = before.keys().chain(after.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let pairs = keys.into_iter().map(|key| compare(before.get(key).copied(), after.get(key).copied(), true));
    pairs.filter(|object| object.kind != DiffKind::None).collect()
}
