//! Which live connections policy denies now, and which ends were told so: pure.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use culvert_control::{MeshInstance, MeshView};
use culvert_types::decide;

use super::AttachedWorkload;
use super::pairs::Pairs;
use crate::datapath::FlowEnds;

/// How long after a revocation an end of one of its connections is still its work.
const AFTERMATH: Duration = Duration::from_secs(1);
/// How much earlier than it was an end may seem: times of the kernel are told by another clock, and the two are not read at once.
const SLACK: Duration = Duration::from_millis(100);
/// How long it is remembered: longer than events are on their way.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);

/// Ends between which policy denies connections now, with the rule that does: those of pairs that have gone direct, and those
/// between which upstreams are declared, where a predecessor without memory may have let something through. Health, encryption and
/// expiry move new connections only; they end none. Which of two services of one workload opened a connection the ends do not tell:
/// the denied one decides.
pub(super) fn denied(view: &MeshView, workloads: &[AttachedWorkload], pairs: &Pairs) -> BTreeMap<FlowEnds, String> {
    let home = |instance: &MeshInstance| {
        workloads.iter().find(|workload| workload.sidecars.contains(&instance.sidecar_id)).map(|workload| workload.id)
    };
    let mut denied = pairs.denied(view);
    for source in view.instances.iter() {
        let Some(caller) = home(source) else { continue };
        for upstream in &source.upstreams {
            let decision = decide(view.intentions.iter(), &source.service, &upstream.destination, view.default_action);
            if decision.allowed() {
                continue;
            }
            let called = view.instances.iter().filter(|instance| instance.service == upstream.destination);
            denied.extend(called.filter_map(|instance| {
                let ends = FlowEnds { source: caller, destination: home(instance)?, port: instance.local_port };
                Some((ends, decision.by.to_string()))
            }));
        }
    }
    denied
}

/// Revocations of the last minute.
#[derive(Debug, Default)]
pub(super) struct Revoked(BTreeMap<FlowEnds, Moment>);

#[derive(Debug)]
struct Moment {
    rule: String,
    from: SystemTime,
    until: SystemTime,
}

impl Revoked {
    /// Connections between `ends` were ended from `from` to `to`.
    pub(super) fn note<'a>(
        &mut self,
        ends: impl IntoIterator<Item = (&'a FlowEnds, &'a String)>,
        from: SystemTime,
        to: SystemTime,
    ) {
        self.0.retain(|_, moment| to < moment.until + REMEMBERED_FOR);
        for (ends, rule) in ends {
            self.0.insert(*ends, Moment { rule: rule.clone(), from: from - SLACK, until: to + AFTERMATH });
        }
    }

    /// The rule that ended a connection between `ends` that closed at `at`, if one did.
    pub(super) fn rule(&self, ends: &FlowEnds, at: SystemTime) -> Option<&str> {
        self.0.get(ends).filter(|moment| moment.from <= at && at <= moment.until).map(|moment| moment.rule.as_str())
    }
}

#[cfg(test)]
mod tests {
    use culvert_types::{Action, Encryption, HealthStatus, Intention};

    use super::super::tests::{instance, pair, view, workload};
    use super::*;

    fn nothing() -> (tempfile::TempDir, Pairs) {
        let directory = tempfile::tempdir().expect("a directory");
        let pairs = Pairs::load(directory.path(), 0);
        (directory, pairs)
    }

    const ENDS: FlowEnds = FlowEnds { source: 1, destination: 2, port: 9001 };

    #[test]
    fn a_declared_upstream_that_is_denied_is_denied_with_its_rule() {
        let (_directory, pairs) = nothing();
        let (instances, workloads) = pair();
        let deny = Intention {
            source: "*".parse().expect("a subject"),
            destination: "api".parse().expect("a subject"),
            action: Action::Deny,
        };
        let rule = deny.to_string();
        let by_rule = denied(&view(Action::Allow, vec![deny], instances.clone()), &workloads, &pairs);
        assert_eq!(by_rule, BTreeMap::from([(ENDS, rule)]));
        let by_default = denied(&view(Action::Deny, vec![], instances.clone()), &workloads, &pairs);
        assert_eq!(by_default, BTreeMap::from([(ENDS, "default".to_owned())]));
        assert!(denied(&view(Action::Allow, vec![], instances), &workloads, &pairs).is_empty());
    }

    /// None of them ends a connection.
    #[test]
    fn health_encryption_and_expiry_deny_nothing() {
        let (_directory, pairs) = nothing();
        let (mut instances, workloads) = pair();
        for instance in &mut instances {
            instance.health = HealthStatus::Critical;
            instance.encryption = Encryption::Always;
            instance.certificate_not_after = None;
        }
        assert!(denied(&view(Action::Allow, vec![], instances), &workloads, &pairs).is_empty());
    }

    #[test]
    fn only_ends_in_workloads_of_this_node_are_denied() {
        let (_directory, pairs) = nothing();
        let (instances, workloads) = pair();
        let view = view(Action::Deny, vec![], instances);
        assert!(denied(&view, &workloads[..1], &pairs).is_empty(), "the called is elsewhere");
        assert!(denied(&view, &workloads[1..], &pairs).is_empty(), "the caller is elsewhere");
    }

    #[test]
    fn every_instance_and_a_workload_that_calls_itself_are_ends() {
        let (_directory, pairs) = nothing();
        let (mut instances, mut workloads) = (vec![instance("web", &["api", "web"])], vec![workload(1, "web")]);
        for (id, sidecar) in [(2, "first"), (3, "second")] {
            let mut called = instance("api", &[]);
            called.sidecar_id = sidecar.to_owned();
            instances.push(called);
            workloads.push(AttachedWorkload { sidecars: vec![sidecar.to_owned()], ..workload(id, "api") });
        }
        let ends = denied(&view(Action::Deny, vec![], instances), &workloads, &pairs);
        let destinations: Vec<u32> = ends.keys().map(|ends| ends.destination).collect();
        assert_eq!(destinations, [1, 2, 3]);
    }

    #[test]
    fn what_has_gone_direct_is_denied_without_registration_and_without_workloads() {
        let (_directory, mut pairs) = nothing();
        let (instances, workloads) = pair();
        let allowed = view(Action::Allow, vec![], instances);
        pairs.remember(&super::super::compile(&allowed, &workloads, SystemTime::UNIX_EPOCH)).expect("written");
        assert_eq!(denied(&view(Action::Deny, vec![], vec![]), &[], &pairs).keys().collect::<Vec<_>>(), [&ENDS]);
    }

    #[test]
    fn an_end_is_the_work_of_a_revocation_only_while_it_happens() {
        let (mut revoked, rule) = (Revoked::default(), "rule".to_owned());
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        revoked.note([(&ENDS, &rule)], at(100), at(101));
        assert_eq!(revoked.rule(&ENDS, at(99)), None);
        assert_eq!(revoked.rule(&ENDS, at(100) - SLACK), Some("rule"));
        assert_eq!(revoked.rule(&ENDS, at(102)), Some("rule"), "a moment later");
        assert_eq!(revoked.rule(&ENDS, at(103)), None);
        let other = FlowEnds { port: 1, ..ENDS };
        assert_eq!(revoked.rule(&other, at(100)), None);
        revoked.note([(&other, &rule)], at(110), at(110));
        assert_eq!(revoked.0.len(), 2, "events of the first may still be on their way");
        revoked.note([(&other, &rule)], at(200), at(200));
        assert_eq!(revoked.0.len(), 1);
    }
}
