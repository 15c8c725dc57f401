//! What an operator can set about the authority, and the rules those settings obey.

use std::time::Duration;

use culvert_types::format_go_duration;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Shortest life of a leaf (Consul's rule).
pub const MIN_LEAF_TTL: Duration = HOUR;
/// Longest life of a leaf (Consul's rule).
pub const MAX_LEAF_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
/// Shortest life of an intermediate (Consul's rule); at least three times the leaf's as well.
pub const MIN_INTERMEDIATE_TTL: Duration = Duration::from_secs(3 * 3600);

/// Settings of the built-in authority. [`Default`] holds Consul's defaults.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CaSettings {
    /// Life of a leaf certificate, 1 h to 1 y. Default 72 h.
    pub leaf_ttl: Duration,
    /// Life of an intermediate. The built-in authority signs leaves with the root and makes none; kept for the API. 1 y.
    pub intermediate_ttl: Duration,
    /// Life of a root. Default 10 y.
    pub root_ttl: Duration,
    /// Requests signed per second, beyond which the answer is 429; 0 means no limit. Default 50.
    pub csr_max_per_second: u32,
    /// After a change of the root, each leaf is renewed at a random moment within this time. Default 30 s.
    pub root_change_smear: Duration,
    /// For tests only: lifts the lower limits of the three lives, so that a test can watch certificates expire.
    pub allow_short_ttls_for_tests: bool,
}

impl Default for CaSettings {
    fn default() -> Self {
        Self {
            leaf_ttl: 72 * HOUR,
            intermediate_ttl: 365 * DAY,
            root_ttl: 3650 * DAY,
            csr_max_per_second: 50,
            root_change_smear: Duration::from_secs(30),
            allow_short_ttls_for_tests: false,
        }
    }
}

/// A setting outside its limits.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// [`MIN_LEAF_TTL`] … [`MAX_LEAF_TTL`].
    #[error("leaf cert TTL must be between 1h and 8760h, got {}", format_go_duration(*.0))]
    LeafTtl(Duration),
    /// At least [`MIN_INTERMEDIATE_TTL`] and three times the leaf's.
    #[error("Intermediate Cert TTL must be greater or equal than 3h and than 3 * LeafCertTTL, got {}", format_go_duration(*.0))]
    IntermediateTtl(Duration),
    /// At least the intermediate's.
    #[error("root cert TTL must not be less than the intermediate cert TTL, got {}", format_go_duration(*.0))]
    RootTtl(Duration),
}

impl CaSettings {
    /// Checks every limit.
    ///
    /// # Errors
    /// [`SettingsError`], the first that is broken.
    pub fn check(&self) -> Result<(), SettingsError> {
        let short = self.allow_short_ttls_for_tests;
        if self.leaf_ttl > MAX_LEAF_TTL || self.leaf_ttl.is_zero() || (!short && self.leaf_ttl < MIN_LEAF_TTL) {
            return Err(SettingsError::LeafTtl(self.leaf_ttl));
        }
        let intermediate_least = MIN_INTERMEDIATE_TTL.max(3 * self.leaf_ttl);
        if !short && self.intermediate_ttl < intermediate_least {
            return Err(SettingsError::IntermediateTtl(self.intermediate_ttl));
        }
        if (!short && self.root_ttl < self.intermediate_ttl) || self.root_ttl <= self.leaf_ttl {
            return Err(SettingsError::RootTtl(self.root_ttl));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_consuls_and_valid() {
        let settings = CaSettings::default();
        settings.check().expect("defaults");
        assert_eq!(format_go_duration(settings.leaf_ttl), "72h0m0s");
        assert_eq!(format_go_duration(settings.root_ttl), "87600h0m0s");
    }

    #[test]
    fn lives_outside_the_limits_are_refused() {
        let with = |leaf: Duration| CaSettings { leaf_ttl: leaf, ..CaSettings::default() };
        for leaf in [Duration::ZERO, Duration::from_secs(60), 366 * DAY] {
            assert_eq!(with(leaf).check(), Err(SettingsError::LeafTtl(leaf)));
        }
        let long = with(200 * DAY);
        assert_eq!(long.check(), Err(SettingsError::IntermediateTtl(long.intermediate_ttl)));
        let root = CaSettings { root_ttl: 100 * DAY, ..CaSettings::default() };
        assert_eq!(root.check(), Err(SettingsError::RootTtl(root.root_ttl)));
    }

    #[test]
    fn only_the_setting_for_tests_allows_short_lives() {
        let short = CaSettings { leaf_ttl: Duration::from_secs(5), ..CaSettings::default() };
        assert!(short.check().is_err());
        CaSettings { allow_short_ttls_for_tests: true, ..short }.check().expect("named for tests");
    }
}
