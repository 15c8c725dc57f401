//! Bodies of the HTTP API (the first byte chooses the endpoint): each is taken, or refused with a text as the client's fault.
#![no_main]

use culvert_agent::fuzz::submission;
use culvert_control::fuzz::{Endpoint, body};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let Some(endpoint) = Endpoint::of(*kind) else { return job(data) };
    if let Err(error) = body(endpoint, data) {
        // A check may name a service that is not there.
        let unknown = matches!(endpoint, Endpoint::Check) && error.status == 404;
        assert!(error.status == 400 || unknown, "{error:?}");
        assert!(!error.message.is_empty());
    }
});

fn job(data: &[u8]) {
    if let Err((status, text)) = submission(data) {
        assert!(status == 400 && !text.is_empty(), "{status}: {text}");
    }
}
