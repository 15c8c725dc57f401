//! Files of the data directory that an agent reads of the one before it (the first byte chooses): none makes it panic, and what
//! is understood is written as something that says the same.
#![no_main]

use culvert_agent::fuzz::{Record, record};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let kind = Record::of(*kind);
    match record(kind, data) {
        Ok(written) => assert_eq!(record(kind, &written).expect("it was written"), written),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
