//! SPIFFE IDs: whatever is accepted prints as something that is read as the same.
#![no_main]

use culvert_types::{ServiceIdentity, SpiffeId};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = SpiffeId::parse(text) {
        assert!(id.to_string().eq_ignore_ascii_case(text));
        assert_eq!(SpiffeId::parse(&id.to_string()).as_ref(), Ok(&id));
    }
    if let Ok(identity) = ServiceIdentity::parse(text) {
        assert_eq!(ServiceIdentity::parse(&identity.to_string()), Ok(identity));
    }
});
