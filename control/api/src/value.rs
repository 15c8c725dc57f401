//! Scalars with a JSON form of their own: durations, times and secrets.

use std::fmt;
use std::time::{Duration, SystemTime};

use culvert_types::{format_go_duration, parse_go_duration};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

/// A duration: read from a Go string (`"1m30s"`) or an integer of nanoseconds, written as a Go string. An empty string is 0.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct GoDuration(pub Duration);

impl GoDuration {
    /// Is it the zero value, which Go's `omitempty` leaves out?
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.is_zero()
    }
}

impl From<Duration> for GoDuration {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format_go_duration(self.0))
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GoDurationVisitor;
        impl Visitor<'_> for GoDurationVisitor {
            type Value = GoDuration;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as \"10s\", or an integer of nanoseconds")
            }
            fn visit_unit<E: de::Error>(self) -> Result<GoDuration, E> {
                Ok(GoDuration::default())
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<GoDuration, E> {
                if text.is_empty() {
                    return Ok(GoDuration::default());
                }
                parse_go_duration(text).map(GoDuration).map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, nanos: u64) -> Result<GoDuration, E> {
                Ok(GoDuration(Duration::from_nanos(nanos)))
            }
            fn visit_i64<E: de::Error>(self, nanos: i64) -> Result<GoDuration, E> {
                let nanos =
                    u64::try_from(nanos).map_err(|_| E::custom(format_args!("duration {nanos} is negative")))?;
                self.visit_u64(nanos)
            }
        }
        deserializer.deserialize_any(GoDurationVisitor)
    }
}

/// Seconds from Go's zero time (0001-01-01T00:00:00Z) to the Unix epoch.
const GO_ZERO_BEFORE_EPOCH: u64 = 62_135_596_800;

/// Go's zero time.
const FIRST_NANOS: i128 = -(GO_ZERO_BEFORE_EPOCH as i128) * 1_000_000_000;
/// The last nanosecond of year 9999, after which RFC 3339 has no times.
const LAST_NANOS: i128 = 253_402_300_799_999_999_999;

/// A point in time, RFC 3339 on the wire; what is outside of its years is written as the first or the last moment in them. The default is Go's zero time, year 1.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Timestamp(pub SystemTime);

impl Timestamp {
    /// Is it Go's zero time, that is: not set?
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for Timestamp {
    fn default() -> Self {
        Self(SystemTime::UNIX_EPOCH - Duration::from_secs(GO_ZERO_BEFORE_EPOCH))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        Self(time)
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        time.0
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = match self.0.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => i128::try_from(after.as_nanos()).unwrap_or(LAST_NANOS),
            Err(before) => i128::try_from(before.duration().as_nanos()).map_or(FIRST_NANOS, |nanos| -nanos),
        };
        let time = time.clamp(FIRST_NANOS, LAST_NANOS);
        let time = OffsetDateTime::from_unix_timestamp_nanos(time).map_err(|_| fmt::Error)?;
        f.write_str(&time.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time = OffsetDateTime::parse(&text, &Rfc3339)
            .map_err(|_| de::Error::custom(format_args!("{text:?} is not an RFC 3339 time")))?;
        Ok(Self(SystemTime::from(time)))
    }
}

/// A text that must not reach a log: wiped on drop, hidden in `Debug`, without `Display`.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes over a secret.
    #[must_use]
    pub fn new(secret: String) -> Self {
        Self(Zeroizing::new(secret))
    }

    /// The secret itself. Keep what you do with it short.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Secret(empty)" } else { "Secret(hidden)" })
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

/// For `skip_serializing_if`: Go's `omitempty` on plain values.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        for (wire, nanos) in [
            (json!("10s"), 10_000_000_000),
            (json!(10_000_000_000_u64), 10_000_000_000),
            (json!(""), 0),
            (json!(0), 0),
            (json!("1m30s"), 90_000_000_000),
        ] {
            let duration: GoDuration = serde_json::from_value(wire.clone()).expect("a duration");
            assert_eq!(duration.0.as_nanos(), nanos, "{wire}");
        }
        for wire in [json!("ten"), json!(-1), json!(1.5), json!(true), json!("-1s")] {
            serde_json::from_value::<GoDuration>(wire.clone()).expect_err(&wire.to_string());
        }
    }

    #[test]
    fn times_are_rfc_3339_and_start_in_year_one() {
        assert_eq!(serde_json::to_value(Timestamp::default()).expect("time"), json!("0001-01-01T00:00:00Z"));
        let text = json!("2026-11-21T03:49:31.123456789Z");
        let time: Timestamp = serde_json::from_value(text.clone()).expect("time");
        assert_eq!(serde_json::to_value(time).expect("time"), text);
        assert!(serde_json::from_value::<Timestamp>(json!("yesterday")).is_err());
    }

    #[test]
    fn a_time_that_rfc_3339_has_not_is_written_as_the_nearest_that_it_has() {
        let late = SystemTime::UNIX_EPOCH + Duration::from_micros(u64::MAX);
        let early = SystemTime::UNIX_EPOCH - Duration::from_secs(GO_ZERO_BEFORE_EPOCH + 1);
        for (time, text) in [(late, "9999-12-31T23:59:59.999999999Z"), (early, "0001-01-01T00:00:00Z")] {
            assert_eq!(serde_json::to_string(&Timestamp(time)).expect("time"), format!("{text:?}"));
        }
        // A time of year 9999 in its own zone, of year 10000 here.
        let read: Timestamp = serde_json::from_value(json!("9999-12-31T23:59:59-01:00")).expect("time");
        assert_eq!(serde_json::to_value(read).expect("time"), json!("9999-12-31T23:59:59.999999999Z"));
    }

    #[test]
    fn secrets_are_hidden_in_debug_output() {
        assert_eq!(format!("{:?}", Secret::new("hunter2".to_owned())), "Secret(hidden)");
    }
}
