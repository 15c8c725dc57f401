//! Durations as job files write them (`30s`, `1m30s`), and their form in the persisted job.

use std::time::Duration;

/// Reads a Go duration (`time.ParseDuration`); `None` if `text` is none, is negative or exceeds `u64` nanoseconds.
#[must_use]
pub fn parse_go_duration(text: &str) -> Option<Duration> {
    culvert_types::parse_go_duration(text).ok()
}

pub use culvert_types::format_go_duration;

/// Serde form of a duration in a persisted job: Go's text, as in the job file.
pub(crate) mod text {
    use super::{format_go_duration, parse_go_duration};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use std::time::Duration;

    pub(crate) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_go_duration(*duration))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_go_duration(&text).ok_or_else(|| D::Error::custom(format!("invalid duration {text:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_go_refuses() {
        for text in ["", "10", "s", "1x", "1.2.3s", "-", "-5s", "+", ".s", "99999999999h"] {
            assert_eq!(parse_go_duration(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(nanos: u64) {
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!(parse_go_duration(&format_go_duration(duration)), Some(duration));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[-+0-9.a-zµ]{0,20}") {
            let _ = parse_go_duration(&text).map(format_go_duration);
        }
    }
}
