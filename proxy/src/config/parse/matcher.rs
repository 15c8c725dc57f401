//! String matchers.

use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher as PbStringMatcher};

use super::error::{Path, ResourceError};
use crate::config::{MatcherError, StringMatcher};

/// Reads a matcher. The regular expression engine may be named (Consul 1.10 names RE2, today's leave it out): it is the same.
pub(super) fn string_matcher(matcher: PbStringMatcher, path: &Path<'_>) -> Result<StringMatcher, ResourceError> {
    let PbStringMatcher { ignore_case, match_pattern } = matcher;
    let at = |field: &str, parsed: Result<StringMatcher, MatcherError>| {
        parsed.map_err(|error| path.field(field).invalid(error))
    };
    match match_pattern {
        Some(MatchPattern::Exact(text)) => at("exact", StringMatcher::exact(&text, ignore_case)),
        Some(MatchPattern::Prefix(text)) => at("prefix", StringMatcher::prefix(&text, ignore_case)),
        Some(MatchPattern::Suffix(text)) => at("suffix", StringMatcher::suffix(&text, ignore_case)),
        Some(MatchPattern::Contains(text)) => at("contains", StringMatcher::contains(&text, ignore_case)),
        // `ignore_case` has no effect on regular expressions: so says the API.
        Some(MatchPattern::SafeRegex(RegexMatcher { regex, engine_type: _ })) => {
            at("safe_regex", StringMatcher::regex(&regex))
        }
        Some(MatchPattern::Custom(_)) => Err(path.field("custom").unsupported()),
        None => Err(path.missing()),
    }
}
