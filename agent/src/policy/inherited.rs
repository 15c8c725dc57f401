//! Routes that an earlier agent left in the kernel: they stay while this one finds its feet.
//!
//! After a start the workloads are attached one after the other, certificates are signed anew and checks run again: for a moment
//! the compiler sees less than there is. What it does not see yet stays as it is, for [`INHERITED_FOR`] at most, but only as long
//! as policy still allows the pair to go direct.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use culvert_control::{MeshInstance, MeshView};
use culvert_types::{Encryption, ServiceName, decide};

use super::pairs::Pairs;
use super::{Pair, Route, RouteKey};
use crate::datapath::{Upstream, UpstreamKey};

/// How long a route that is not compiled again outlives the agent that wrote it. Its own end, that of the certificates, holds too.
pub(super) const INHERITED_FOR: Duration = Duration::from_secs(30);

/// What is left of an earlier agent's routes, with the numbers of their pairs.
pub(super) struct Inherited {
    routes: BTreeMap<RouteKey, u32>,
    until: Instant,
}

impl Inherited {
    pub(super) fn new(found: &BTreeMap<UpstreamKey, Upstream>, now: Instant) -> Self {
        let routes = found.iter().map(|(key, entry)| ((key.workload, key.address), entry.service)).collect();
        Self { routes, until: now + INHERITED_FOR }
    }

    /// Gives up what is compiled again, and what may not stay; returns what does.
    pub(super) fn settle(
        &mut self,
        view: &MeshView,
        pairs: &Pairs,
        compiled: &BTreeMap<RouteKey, Route>,
        now: Instant,
    ) -> BTreeSet<UpstreamKey> {
        let stays = |key: &RouteKey, number: &u32| {
            let pair = pairs.get(*number);
            now < self.until && !compiled.contains_key(key) && pair.is_some_and(|pair| may_go_direct(view, pair))
        };
        self.routes.retain(|key, number| stays(key, number));
        self.routes.keys().map(|&(workload, address)| UpstreamKey { workload, address }).collect()
    }

    /// Forgets every route of a workload that is not in `live`.
    pub(super) fn retain(&mut self, live: impl Fn(u32) -> bool) {
        self.routes.retain(|(workload, _), _| live(*workload));
    }

    /// When the last of them goes.
    pub(super) fn end(&self) -> Option<Instant> {
        (!self.routes.is_empty()).then_some(self.until)
    }
}

/// As far as is known now: does policy allow the pair, and no end want encryption?
fn may_go_direct(view: &MeshView, pair: &Pair) -> bool {
    let of = |service: &ServiceName| -> Vec<&MeshInstance> {
        view.instances.iter().filter(|instance| instance.service == *service).collect()
    };
    let (sources, destinations) = (of(&pair.source), of(&pair.destination));
    let strict = if sources.is_empty() || destinations.is_empty() {
        view.encryption == Encryption::Always
    } else {
        let between = |source: &MeshInstance, called: &MeshInstance| source.encryption.between(called.encryption);
        let mut all = sources.iter().flat_map(|source| destinations.iter().map(move |called| between(source, called)));
        all.any(|encryption| encryption == Encryption::Always)
    };
    !strict && decide(view.intentions.iter(), &pair.source, &pair.destination, view.default_action).allowed()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use culvert_types::{Action, Intention};

    use super::super::compile;
    use super::super::tests::{pair, view};
    use super::*;

    /// Two routes of one pair, and what wrote them down.
    fn inherited(directory: &tempfile::TempDir, now: Instant) -> (Inherited, Pairs) {
        let (instances, workloads) = pair();
        let routes = compile(&view(Action::Allow, vec![], instances), &workloads, SystemTime::UNIX_EPOCH);
        let mut pairs = Pairs::load(directory.path(), 0);
        pairs.remember(&routes).expect("written");
        let entry = Upstream { service: 1, instances: Vec::new(), not_after: None };
        let found = routes.keys().map(|&(workload, address)| (UpstreamKey { workload, address }, entry.clone()));
        (Inherited::new(&found.collect(), now), pairs)
    }

    #[test]
    fn what_is_not_compiled_yet_stays_for_a_while() {
        let (directory, now) = (tempfile::tempdir().expect("a directory"), Instant::now());
        let (mut inherited, pairs) = inherited(&directory, now);
        let nothing = view(Action::Allow, vec![], vec![]);
        let kept =
            |inherited: &mut Inherited, after| inherited.settle(&nothing, &pairs, &BTreeMap::new(), now + after).len();
        assert_eq!(kept(&mut inherited, INHERITED_FOR / 2), 2);
        assert_eq!(inherited.end(), Some(now + INHERITED_FOR));
        assert_eq!(kept(&mut inherited, INHERITED_FOR), 0);
        assert_eq!(inherited.end(), None);
    }

    #[test]
    fn what_is_compiled_again_is_the_compilers() {
        let (directory, now) = (tempfile::tempdir().expect("a directory"), Instant::now());
        let (mut inherited, pairs) = inherited(&directory, now);
        let (instances, workloads) = pair();
        let view = view(Action::Allow, vec![], instances);
        let routes = compile(&view, &workloads, SystemTime::UNIX_EPOCH);
        assert!(inherited.settle(&view, &pairs, &routes, now).is_empty());
        assert!(inherited.settle(&view, &pairs, &BTreeMap::new(), now).is_empty(), "it does not come back");
    }

    /// Each reason alone takes it away.
    #[test]
    fn what_may_not_go_direct_any_more_does_not_stay() {
        type Change = fn(&mut MeshView, &mut Inherited);
        let deny = Intention {
            source: "web".parse().expect("a subject"),
            destination: "*".parse().expect("a subject"),
            action: Action::Deny,
        };
        let changes: [(&str, Change); 5] = [
            ("denied", |view, _| view.default_action = Action::Deny),
            ("encryption everywhere", |view, _| {
                (view.encryption, view.instances) = (Encryption::Always, [].into());
            }),
            ("an end wants encryption", |view, _| {
                let mut instances = view.instances.to_vec();
                instances[1].encryption = Encryption::Always;
                view.instances = instances.into();
            }),
            ("a pair that nobody knows", |_, inherited| {
                inherited.routes.values_mut().for_each(|number| *number = 99);
            }),
            ("its workload is gone", |_, inherited| inherited.retain(|workload| workload != 1)),
        ];
        for (what, change) in changes {
            let (directory, now) = (tempfile::tempdir().expect("a directory"), Instant::now());
            let (mut inherited, pairs) = inherited(&directory, now);
            let mut view = view(Action::Allow, vec![], pair().0);
            assert_eq!(inherited.settle(&view, &pairs, &BTreeMap::new(), now).len(), 2, "{what}");
            change(&mut view, &mut inherited);
            assert!(inherited.settle(&view, &pairs, &BTreeMap::new(), now).is_empty(), "{what}");
        }
        let (directory, now) = (tempfile::tempdir().expect("a directory"), Instant::now());
        let (mut inherited, pairs) = inherited(&directory, now);
        let view = view(Action::Allow, vec![deny], vec![]);
        assert!(inherited.settle(&view, &pairs, &BTreeMap::new(), now).is_empty(), "denied by an intention");
    }
}
