//! Durations as Go prints and reads them: `10s`, `1m30s`, `72h0m0s`, `500ms`.

use std::fmt::Write as _;
use std::time::Duration;

/// Why a text is not a duration.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DurationError {
    /// Empty, without a unit, or with an unknown one.
    #[error("invalid duration {0:?}: use a number with a unit (ns, us, ms, s, m, h), as in \"1m30s\"")]
    Syntax(String),
    /// Longer than a `u64` of nanoseconds.
    #[error("duration {0:?} is too long")]
    TooLong(String),
    /// Negative durations have no meaning in any setting.
    #[error("duration {0:?} is negative")]
    Negative(String),
}

/// Reads a Go duration (`time.ParseDuration`).
///
/// # Errors
/// [`DurationError`] with the offending text.
pub fn parse_go_duration(text: &str) -> Result<Duration, DurationError> {
    let syntax = || DurationError::Syntax(text.to_owned());
    let too_long = || DurationError::TooLong(text.to_owned());
    if let Some(rest) = text.strip_prefix('-') {
        return Err(if rest.is_empty() { syntax() } else { DurationError::Negative(text.to_owned()) });
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(syntax());
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let number = rest.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
        let unit = rest[number..].bytes().take_while(|byte| !byte.is_ascii_digit() && *byte != b'.').count();
        let (value, tail) = rest.split_at(number);
        let (unit, tail) = tail.split_at(unit);
        total = total.checked_add(nanoseconds(value, unit).ok_or_else(syntax)?).ok_or_else(too_long)?;
        rest = tail;
    }
    u64::try_from(total).map(Duration::from_nanos).map_err(|_| too_long())
}

/// `value` (digits with at most one dot) times `unit`, truncated to whole nanoseconds.
fn nanoseconds(value: &str, unit: &str) -> Option<u128> {
    let scale: u128 = match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanos = whole.checked_mul(scale)?;
    let mut place = scale;
    for digit in fraction.bytes() {
        place /= 10;
        nanos = nanos.checked_add(u128::from(digit - b'0') * place)?;
    }
    Some(nanos)
}

/// Prints as Go does (`time.Duration.String`): `1h30m0s`, `1.5s`, `500ms`, `0s`.
#[must_use]
pub fn format_go_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    if nanos < 1_000_000_000 {
        let (scale, unit) = match nanos {
            0..1_000 => (1, "ns"),
            1_000..1_000_000 => (1_000, "µs"),
            _ => (1_000_000, "ms"),
        };
        return format!("{}{unit}", decimal(nanos, scale));
    }
    let (hours, rest) = (nanos / 3_600_000_000_000, nanos % 3_600_000_000_000);
    let (minutes, rest) = (rest / 60_000_000_000, rest % 60_000_000_000);
    let mut out = String::new();
    if hours > 0 {
        write!(out, "{hours}h").expect("writing to a String cannot fail");
    }
    if hours > 0 || minutes > 0 {
        write!(out, "{minutes}m").expect("writing to a String cannot fail");
    }
    out.push_str(&decimal(rest, 1_000_000_000));
    out.push('s');
    out
}

/// `nanos / scale` with as many decimals as are needed.
fn decimal(nanos: u128, scale: u128) -> String {
    let (whole, fraction) = (nanos / scale, nanos % scale);
    if fraction == 0 {
        return whole.to_string();
    }
    let width = scale.ilog10() as usize;
    let digits = format!("{fraction:0width$}");
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_prints_as_go() {
        for (text, nanos, printed) in [
            ("10s", 10_000_000_000, "10s"),
            ("1m30s", 90_000_000_000, "1m30s"),
            ("72h", 259_200_000_000_000, "72h0m0s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            ("500ms", 500_000_000, "500ms"),
            ("0", 0, "0s"),
            (".5h", 1_800_000_000_000, "30m0s"),
        ] {
            let duration = parse_go_duration(text).expect(text);
            assert_eq!(duration.as_nanos(), nanos, "{text}");
            assert_eq!(format_go_duration(duration), printed);
        }
    }

    #[test]
    fn refuses_what_go_refuses() {
        for text in ["", "10", "s", "1x", "1.2.3s", "-", "-5s", "+", ".s", "99999999999h"] {
            assert!(parse_go_duration(text).is_err(), "{text:?}");
        }
    }
}
