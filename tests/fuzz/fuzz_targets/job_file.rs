//! A job file: whatever is wrong with it is said with its place.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(errors) = culvert_jobspec::parse(text, "job.nomad.hcl", &BTreeMap::new()) {
        assert!(!errors.is_empty() && !errors.to_string().is_empty());
    }
});
