//! Pairs of services that went direct: their numbers in the kernel tables, and the ends between which their connections may live.
//!
//! A connection outlives the route that led it, the registration of either service, and the agent. So a pair is written down
//! before the kernel is told of it, and its ends are forgotten only with their workloads. Numbers are never reused: live
//! sockets carry them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use culvert_control::MeshView;
use culvert_types::{Decision, ServiceName, decide};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Route, RouteKey};
use crate::datapath::FlowEnds;
use crate::report::chain;
use crate::task::{read_json, write_json};

/// Name of the file in the data directory.
const FILE: &str = "direct.json";
/// Layout of the file.
const VERSION: u32 = 1;
/// Pairs without workloads that are kept for events that come late; the oldest go.
const MAX_PAST: usize = 4096;

/// Two services between which direct connections are let through, or were.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pair {
    /// Who calls.
    pub source: ServiceName,
    /// Who is called.
    pub destination: ServiceName,
    /// The rule that allows it, or was the last to; empty while an earlier agent's is not known.
    pub rule: String,
}

#[derive(Clone, Debug)]
struct Known {
    pair: Pair,
    /// Workloads that have had a route.
    callers: BTreeSet<u32>,
    /// Workloads and ports that a route led to.
    called: BTreeSet<(u32, u16)>,
}

impl Known {
    /// May a connection of the pair live?
    fn is_alive(&self) -> bool {
        !self.callers.is_empty() && !self.called.is_empty()
    }
}

/// The file's content.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Content {
    version: u32,
    /// The lowest number never given out.
    next: u32,
    pairs: Vec<Row>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Row {
    number: u32,
    source: String,
    destination: String,
    callers: BTreeSet<u32>,
    called: BTreeSet<(u32, u16)>,
}

impl Row {
    fn known(&self) -> Option<Known> {
        let name = |text: &str| ServiceName::from_stored(text).ok();
        let (source, destination) = (name(&self.source)?, name(&self.destination)?);
        let pair = Pair { source, destination, rule: String::new() };
        Some(Known { pair, callers: self.callers.clone(), called: self.called.clone() })
    }
}

/// All pairs by their numbers, in memory and on disk. In memory those without workloads stay for a while: events come late.
pub(super) struct Pairs {
    file: PathBuf,
    next: u32,
    known: BTreeMap<u32, Known>,
    stored: Option<Content>,
}

impl Pairs {
    /// Reads what an earlier agent wrote. `highest` is the highest number in the kernel's tables: when the file is lost, what the
    /// numbers there stood for is not known, and none of them must come again.
    pub(super) fn load(data_dir: &Path, highest: u32) -> Self {
        let file = data_dir.join(FILE);
        let stored = read_json::<Content>(&file).unwrap_or_else(|error| {
            warn!(file = %file.display(), error = chain(&error), "which services went direct is not known any more");
            None
        });
        let stored = stored.filter(|content| content.version == VERSION);
        let rows = stored.iter().flat_map(|content| &content.pairs);
        let known: BTreeMap<u32, Known> = rows.filter_map(|row| Some((row.number, row.known()?))).collect();
        let next = stored.as_ref().map_or(1, |content| content.next).max(highest.saturating_add(1));
        Self { file, next, known, stored }
    }

    /// Writes down what the kernel is about to be told.
    ///
    /// # Errors
    /// When the file cannot be written; nothing has changed then.
    pub(super) fn remember(&mut self, routes: &BTreeMap<RouteKey, Route>) -> io::Result<()> {
        let before = (self.next, self.known.clone());
        for ((workload, _), route) in routes {
            let number = self.number(&route.source, &route.destination).unwrap_or_else(|| {
                self.next += 1;
                self.next - 1
            });
            let known = self.known.entry(number).or_insert_with(|| Known {
                pair: Pair {
                    source: route.source.clone(),
                    destination: route.destination.clone(),
                    rule: String::new(),
                },
                callers: BTreeSet::new(),
                called: BTreeSet::new(),
            });
            known.callers.insert(*workload);
            known.called.extend(route.instances.iter().map(|instance| (instance.workload, instance.port)));
        }
        self.store().inspect_err(|_| (self.next, self.known) = before)
    }

    /// The number under which all that `route` may lead to is written down, if it is.
    pub(super) fn covers(&self, (workload, _): &RouteKey, route: &Route) -> Option<u32> {
        let number = self.number(&route.source, &route.destination)?;
        let known = self.known.get(&number)?;
        let called = route.instances.iter().all(|instance| known.called.contains(&(instance.workload, instance.port)));
        (called && known.callers.contains(workload)).then_some(number)
    }

    pub(super) fn get(&self, number: u32) -> Option<&Pair> {
        self.known.get(&number).map(|known| &known.pair)
    }

    /// The rules that allow the pairs now, for events.
    pub(super) fn note_rules(&mut self, view: &MeshView) {
        for Known { pair, .. } in self.known.values_mut() {
            let decision = judge(view, pair);
            if decision.allowed() {
                pair.rule = decision.by.to_string();
            }
        }
    }

    /// Ends between which connections may live that policy denies now, with the rule that denies.
    pub(super) fn denied(&self, view: &MeshView) -> BTreeMap<FlowEnds, String> {
        let mut denied = BTreeMap::new();
        for Known { pair, callers, called } in self.known.values() {
            let decision = judge(view, pair);
            if decision.allowed() {
                continue;
            }
            for &source in callers {
                let ends = called.iter().map(|&(destination, port)| FlowEnds { source, destination, port });
                denied.extend(ends.map(|ends| (ends, decision.by.to_string())));
            }
        }
        denied
    }

    /// Forgets every end that is not in a workload of `live`.
    pub(super) fn retain(&mut self, live: impl Fn(u32) -> bool) {
        for known in self.known.values_mut() {
            known.callers.retain(|workload| live(*workload));
            known.called.retain(|(workload, _)| live(*workload));
        }
        let past: Vec<u32> =
            self.known.iter().filter(|(_, known)| !known.is_alive()).map(|(number, _)| *number).collect();
        for number in &past[..past.len().saturating_sub(MAX_PAST)] {
            self.known.remove(number);
        }
        if let Err(error) = self.store() {
            // Too much is written down then, which does no harm.
            warn!(file = %self.file.display(), error = chain(&error), "workloads that are gone are not forgotten");
        }
    }

    /// Forgets everything, and removes the file: the agent leaves.
    pub(super) fn remove(&mut self) -> io::Result<()> {
        (self.known, self.stored) = (BTreeMap::new(), None);
        match std::fs::remove_file(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn number(&self, source: &ServiceName, destination: &ServiceName) -> Option<u32> {
        let same = |known: &Known| known.pair.source == *source && known.pair.destination == *destination;
        self.known.iter().find(|(_, known)| same(known)).map(|(number, _)| *number)
    }

    /// Brings the file in line with the memory: pairs between which something may live.
    fn store(&mut self) -> io::Result<()> {
        let alive = self.known.iter().filter(|(_, known)| known.is_alive());
        let rows = alive.map(|(number, known)| Row {
            number: *number,
            source: known.pair.source.to_string(),
            destination: known.pair.destination.to_string(),
            callers: known.callers.clone(),
            called: known.called.clone(),
        });
        let content = Content { version: VERSION, next: self.next, pairs: rows.collect() };
        if self.stored.as_ref() != Some(&content) && !(self.stored.is_none() && content.pairs.is_empty()) {
            write_json(&self.file, &content)?;
            self.stored = Some(content);
        }
        Ok(())
    }
}

fn judge<'a>(view: &'a MeshView, pair: &Pair) -> Decision<'a> {
    decide(view.intentions.iter(), &pair.source, &pair.destination, view.default_action)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use culvert_types::Action;

    use super::super::tests::{pair, view, workload};
    use super::super::{compile, tests::instance};
    use super::*;

    fn routes() -> BTreeMap<RouteKey, Route> {
        let (instances, workloads) = pair();
        compile(&view(Action::Allow, vec![], instances), &workloads, SystemTime::UNIX_EPOCH)
    }

    #[test]
    fn numbers_and_ends_survive_the_agent_and_go_with_the_workloads() {
        let directory = tempfile::tempdir().expect("a directory");
        let routes = routes();
        let (key, route) = routes.iter().next().expect("a route");
        let mut pairs = Pairs::load(directory.path(), 0);
        assert_eq!(pairs.covers(key, route), None);
        pairs.remember(&routes).expect("written");
        assert_eq!(pairs.covers(key, route), Some(1));
        let mut pairs = Pairs::load(directory.path(), 0);
        assert_eq!(pairs.covers(key, route), Some(1));
        let ends = FlowEnds { source: 1, destination: 2, port: 9001 };
        let denied = view(Action::Deny, vec![], vec![]);
        assert_eq!(pairs.denied(&denied), BTreeMap::from([(ends, "default".to_owned())]));
        assert!(pairs.denied(&view(Action::Allow, vec![], vec![])).is_empty());
        pairs.retain(|workload| workload != 2);
        assert!(pairs.denied(&denied).is_empty());
        assert!(pairs.get(1).is_some(), "for events that come late");
        let mut pairs = Pairs::load(directory.path(), 0);
        assert!(pairs.get(1).is_none());
        pairs.remember(&routes).expect("written");
        assert_eq!(pairs.covers(key, route), Some(2), "a number never comes again");
        pairs.remove().expect("removed");
        pairs.remove().expect("nothing to remove");
        assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn names_that_earlier_agents_took_are_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let row = r#"{"number":1,"source":"a..b","destination":"a-.b","callers":[1],"called":[[2,80]]}"#;
        let content = format!(r#"{{"version":1,"next":2,"pairs":[{row}]}}"#);
        std::fs::write(directory.path().join(FILE), content).expect("written");
        let pairs = Pairs::load(directory.path(), 0);
        assert_eq!(pairs.get(1).expect("a pair").source.as_str(), "a..b");
        assert_eq!(pairs.denied(&view(Action::Deny, vec![], vec![])).len(), 1);
    }

    #[test]
    fn what_cannot_be_written_down_is_not_covered() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut pairs = Pairs::load(directory.path(), 0);
        let routes = routes();
        pairs.remember(&routes).expect("written");
        let (mut instances, mut workloads) = pair();
        let mut second = instance("api", &[]);
        second.sidecar_id = "second".to_owned();
        instances.push(second);
        workloads.push(workload(3, "third"));
        workloads[2].sidecars = vec!["second".to_owned()];
        let more = compile(&view(Action::Allow, vec![], instances), &workloads, SystemTime::UNIX_EPOCH);
        drop(directory);
        pairs.remember(&more).expect_err("no directory");
        assert!(more.iter().all(|(key, route)| pairs.covers(key, route).is_none()));
        assert!(routes.iter().all(|(key, route)| pairs.covers(key, route).is_some()));
    }

    #[test]
    fn a_damaged_file_is_nobodys_and_its_numbers_are_not_given_out_again() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join(FILE), "{\"version\":").expect("written");
        let mut pairs = Pairs::load(directory.path(), 7);
        assert!(pairs.get(7).is_none());
        let routes = routes();
        pairs.remember(&routes).expect("written");
        let (key, route) = routes.iter().next().expect("a route");
        assert_eq!(pairs.covers(key, route), Some(8));
    }
}
