//! When a row of results changes the verdict of a check.

use culvert_types::HealthStatus;

use crate::state::rows::CheckDefinition;

/// Counts results of one check. Source: Consul's `success_before_passing`, `failures_before_warning` and
/// `failures_before_critical`.
#[derive(Debug, Default)]
pub(super) struct Thresholds {
    successes: u32,
    failures: u32,
}

impl Thresholds {
    /// The verdict after one more result; `None` while too few agree to change it. A result that warns counts as a success.
    pub(super) fn verdict(&mut self, definition: &CheckDefinition, result: HealthStatus) -> Option<HealthStatus> {
        if result != HealthStatus::Critical {
            self.failures = 0;
            self.successes = self.successes.saturating_add(1);
            return (self.successes >= definition.success_before_passing).then_some(result);
        }
        self.successes = 0;
        self.failures = self.failures.saturating_add(1);
        let warning = definition.failures_before_warning;
        if self.failures >= definition.failures_before_critical {
            Some(HealthStatus::Critical)
        } else if warning > 0 && self.failures >= warning {
            Some(HealthStatus::Warning)
        } else {
            None
        }
    }

    /// Has there been a success since the last failure?
    pub(super) fn succeeding(&self) -> bool {
        self.successes > 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::state::rows::Probe;

    fn definition(passing: u32, warning: u32, critical: u32) -> CheckDefinition {
        CheckDefinition {
            probe: Probe::Fixed,
            interval: Duration::ZERO,
            timeout: Duration::ZERO,
            success_before_passing: passing,
            failures_before_warning: warning,
            failures_before_critical: critical,
            output_max_size: 1,
            deregister_critical_service_after: Duration::ZERO,
        }
    }

    /// Verdicts for a text of results: `+` success, `!` warning, `-` failure; `.` stands for "no change".
    fn verdicts(definition: &CheckDefinition, results: &str) -> String {
        let mut thresholds = Thresholds::default();
        let result = |byte| match byte {
            b'+' => HealthStatus::Passing,
            b'!' => HealthStatus::Warning,
            _ => HealthStatus::Critical,
        };
        let verdict = |verdict| match verdict {
            None => '.',
            Some(HealthStatus::Passing) => '+',
            Some(HealthStatus::Warning) => '!',
            Some(HealthStatus::Critical) => '-',
        };
        results.bytes().map(|byte| verdict(thresholds.verdict(definition, result(byte)))).collect()
    }

    #[test]
    fn without_thresholds_every_result_counts() {
        assert_eq!(verdicts(&definition(0, 0, 0), "+-!+-"), "+-!+-");
    }

    #[test]
    fn verdicts_need_that_many_results_in_a_row() {
        assert_eq!(verdicts(&definition(3, 0, 0), "++-+++!"), "..-..+!");
        assert_eq!(verdicts(&definition(0, 0, 3), "--+---+"), "..+..-+");
        assert_eq!(verdicts(&definition(0, 2, 4), "-----"), ".!!--");
    }
}
