//! The agent's configuration, HCL or JSON: whatever is wrong with it is said with its place.
#![no_main]

use culvert_agent::config::{MAX_TEXT, check};
use culvert_agent::fuzz::finish;
use libfuzzer_sys::fuzz_target;

const FILE: &str = "agent.hcl";

fuzz_target!(|text: &str| {
    if let Err(error) = check(text, FILE) {
        let message = error.to_string();
        let (line, column) = place(&message).unwrap_or_else(|| panic!("no place: {message}"));
        assert!((1..=text.lines().count() + 1).contains(&line), "{message}");
        assert!((1..=MAX_TEXT + 1).contains(&column), "{message}");
    } else if let Err(error) = finish(text, FILE) {
        assert!(!error.to_string().is_empty());
    }
});

/// `agent.hcl:3:14: …`
fn place(message: &str) -> Option<(usize, usize)> {
    let mut parts = message.strip_prefix(FILE)?.strip_prefix(':')?.splitn(3, ':');
    let place = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next()?.strip_prefix(' ').filter(|what| !what.is_empty())?;
    Some(place)
}
