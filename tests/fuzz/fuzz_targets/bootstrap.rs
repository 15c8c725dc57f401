//! A sidecar's bootstrap file.
#![no_main]

use culvert_proxy::bootstrap::Bootstrap;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match Bootstrap::parse(data) {
        Ok(bootstrap) => assert!(!bootstrap.node.id.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
