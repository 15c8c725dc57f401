//! An agent with canned answers: real sockets and bodies, no workloads.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use culvert_api::{
    AgentStatus, AllocationStatus, EbpfStatus, EventRecord, JobListEntry, JobPlan, JobStatus, JobStopped,
    JobSubmission, JobSubmitted, NackStatus, ProxyStatus, ServiceStatus, TaskEvent, TaskStatus, Timestamp,
    WorkerStatus,
};
use tokio::runtime::Runtime;

use super::{Ran, culvert};

/// What the fake agent was asked, and what it answers for jobs.
#[derive(Clone, Default)]
pub(super) struct Fake {
    pub(super) seen: Arc<Mutex<Vec<String>>>,
    pub(super) submissions: Arc<Mutex<Vec<JobSubmission>>>,
    /// Answers of `GET /v1/culvert/job/web` in turn; the last one stays.
    pub(super) states: Arc<Mutex<Vec<JobStatus>>>,
}

pub(super) struct FakeAgent {
    _runtime: Runtime,
    pub(super) fake: Fake,
    pub(super) flag: String,
}

impl FakeAgent {
    pub(super) fn start(states: Vec<JobStatus>) -> Self {
        let fake = Fake { states: Arc::new(Mutex::new(states)), ..Fake::default() };
        let runtime = Runtime::new().expect("a runtime");
        let app = Router::new().fallback(answer).with_state(fake.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address: SocketAddr = listener.local_addr().expect("an address");
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { _runtime: runtime, fake, flag: format!("-http-addr=http://{address}") }
    }

    pub(super) fn run(&self, words: &[&str], args: &[&str]) -> Ran {
        culvert(&[words, &[self.flag.as_str()], args].concat())
    }

    pub(super) fn seen(&self) -> Vec<String> {
        self.fake.seen.lock().expect("no panic").clone()
    }
}

pub(super) async fn answer(State(fake): State<Fake>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let asked = format!("{} {}", parts.method, parts.uri);
    fake.seen.lock().expect("no panic").push(asked.clone());
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
    let path = parts.uri.path().to_owned();
    match (parts.method.as_str(), path.as_str()) {
        ("PUT", "/v1/culvert/jobs") => {
            fake.submissions.lock().expect("no panic").push(culvert_api::decode(&body).expect("a submission"));
            let created = vec![ALLOCATION.to_owned()];
            Json(JobSubmitted { id: "web".into(), created, ..JobSubmitted::default() }).into_response()
        }
        ("POST", "/v1/culvert/jobs/plan") => {
            let changes = String::from_utf8_lossy(&body).contains("group");
            Json(JobPlan { diff: "+ Job: \"web\"\n".into(), changes }).into_response()
        }
        ("GET", "/v1/culvert/jobs") => Json(vec![JobListEntry {
            id: "web".into(),
            job_type: "service".into(),
            priority: 50,
            status: "running".into(),
            submitted: Timestamp(SystemTime::UNIX_EPOCH),
        }])
        .into_response(),
        ("GET", "/v1/culvert/job/web") => {
            let mut states = fake.states.lock().expect("no panic");
            let state = if states.len() > 1 { states.remove(0) } else { states[0].clone() };
            Json(state).into_response()
        }
        ("DELETE", "/v1/culvert/job/web") => Json(JobStopped { stopped: vec![ALLOCATION.into()] }).into_response(),
        ("GET", logs) if logs.starts_with("/v1/culvert/allocation/") => "one\ntwo\nthree\n".into_response(),
        ("GET", "/v1/culvert/observe") => observed().into_response(),
        ("GET", "/v1/culvert/status") => Json(status()).into_response(),
        ("PUT", "/v1/agent/reload" | "/v1/agent/leave") => ().into_response(),
        _ => (StatusCode::NOT_FOUND, format!("unknown path {path:?}")).into_response(),
    }
}

pub(super) const ALLOCATION: &str = "0a1b2c3d-1111-2222-3333-444444444444";
pub(super) const IDENTITY: &str = "spiffe://x.consul/ns/default/dc/dc1/svc/web";

/// A job of one allocation with one task and one service.
pub(super) fn job(status: &str, health: Option<&str>, events: &[&str]) -> JobStatus {
    let event = |kind: &&str| TaskEvent { kind: (*kind).to_owned(), message: "m".into(), ..TaskEvent::default() };
    let failed = status == "failed";
    let state = if status == "running" { "running" } else { "pending" };
    JobStatus {
        id: "web".into(),
        status: status.into(),
        submitted: Timestamp(SystemTime::UNIX_EPOCH),
        datacenters: vec!["dc1".into()],
        allocations: vec![AllocationStatus {
            id: ALLOCATION.into(),
            group: "g".into(),
            status: status.into(),
            error: failed.then(|| "no such program".into()),
            created: Timestamp(SystemTime::UNIX_EPOCH),
            addresses: vec!["172.26.64.2".into()],
            ports: [("http".to_owned(), (9002, 80))].into(),
            services: vec![ServiceStatus {
                service: "web".into(),
                sidecar_id: Some("web-sidecar-proxy".into()),
                sidecar_port: Some(21000),
                identity: Some(IDENTITY.into()),
                health: health.map(str::to_owned),
                ..ServiceStatus::default()
            }],
            tasks: vec![TaskStatus {
                name: "main".into(),
                state: state.into(),
                failed,
                events: events.iter().map(event).collect(),
                ..TaskStatus::default()
            }],
            ..AllocationStatus::default()
        }],
        ..JobStatus::default()
    }
}

pub(super) fn observed() -> String {
    let event = EventRecord {
        at: Timestamp(SystemTime::UNIX_EPOCH),
        kind: "refuse".into(),
        path: "proxied".into(),
        verdict: "deny".into(),
        source: Some(IDENTITY.into()),
        destination: Some(IDENTITY.replace("web", "api")),
        rule: Some("web => api (deny, precedence 9)".into()),
        reason: Some("intention".into()),
        ..EventRecord::default()
    };
    serde_json::to_string(&event).expect("JSON") + "\n"
}

pub(super) fn status() -> AgentStatus {
    AgentStatus {
        version: "0.1.0".into(),
        node: "n1".into(),
        encryption: "always".into(),
        ebpf: EbpfStatus { active: false, reason: Some("no CAP_BPF".into()), routes: 0 },
        worker: WorkerStatus {
            pid: Some(7),
            restarts: 1,
            proxies: vec![ProxyStatus {
                id: "web-sidecar-proxy".into(),
                ready: true,
                xds_version: Some("12".into()),
                nack: Some(NackStatus { resource: "l".into(), reason: "bad".into() }),
                certificate_not_after: Some(Timestamp(SystemTime::UNIX_EPOCH)),
                failures: 2,
            }],
        },
        ..AgentStatus::default()
    }
}
