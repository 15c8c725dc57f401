//! `culvert observe`, `status`, `services`, `reload`, `leave`.

use culvert_api::AgentStatus;

use super::fake::{FakeAgent, job, observed, status};
use super::plane::Plane;
use super::{culvert, said};

#[test]
fn observe_prints_lines_or_json_and_asks_for_denied_ones_only() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    let ran = agent.run(&["observe", "-denied"], &[]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let line = ran.out.lines().nth(1).expect("a line under the header");
    assert!(
        line.contains("deny") && line.contains("web => api ") && line.ends_with("precedence 9) [intention]"),
        "{line}"
    );
    assert_eq!(agent.run(&["observe", "-json"], &[]), said(&observed()));
    assert_eq!(agent.seen(), ["GET /v1/culvert/observe?denied=true", "GET /v1/culvert/observe"]);
}

#[test]
fn status_says_why_ebpf_is_off_and_what_was_refused() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    let text = agent.run(&["status"], &[]).out;
    for line in [
        "eBPF           = off: no CAP_BPF",
        "Worker         = pid 7, restarted 1 times",
        "ID                 Ready  Config  Certificate Until",
        "web-sidecar-proxy  true   12      1970-01-01T00:00:00Z",
        "web-sidecar-proxy refuses l: bad",
        "web-sidecar-proxy failed in the worker and was started again, 2 times",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} in:\n{text}");
    }
    let json = agent.run(&["status", "-json"], &[]).out;
    assert_eq!(culvert_api::decode_known::<AgentStatus>(json.as_bytes()).expect("JSON"), status());
}

#[test]
fn reload_and_leave_say_what_consul_says() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    assert_eq!(agent.run(&["reload"], &[]), said("Configuration reload triggered\n"));
    assert_eq!(agent.run(&["leave"], &[]), said("Graceful leave complete\n"));
}

#[test]
fn services_are_listed_with_their_addresses() {
    let plane = Plane::start();
    let empty = culvert(&["services", &plane.flag]);
    assert_eq!((empty.code, empty.err.as_str()), (0, "There are no services.\n"));
    let body = culvert_api::ServiceRegistration {
        name: "web".into(),
        port: 80,
        address: "192.0.2.1".into(),
        ..culvert_api::ServiceRegistration::default()
    };
    let control = plane.control.as_ref().expect("runs");
    plane.runtime.block_on(control.register_service(body)).expect("registered");
    let wanted = "Service  Kind     Address       ID\nweb      typical  192.0.2.1:80  web\n";
    assert_eq!(culvert(&["services", &plane.flag]), said(wanted));
}
