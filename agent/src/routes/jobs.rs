//! Job routes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use culvert_api::{
    AllocationStatus, JobListEntry, JobPlan, JobStatus, JobStopped, JobSubmission, JobSubmitted, ServiceStatus,
    TaskEvent, TaskStatus, Timestamp,
};
use culvert_control::MeshView;
use culvert_jobspec::Job;
use culvert_types::ServiceIdentity;

use super::{Failure, RouteState};
use crate::runner::{AllocationView, JobRecord, Runner, ServiceView, SubmitError, TaskView};

fn refused(message: impl std::fmt::Display) -> Failure {
    Failure(StatusCode::BAD_REQUEST, message.to_string())
}

fn read(body: &[u8]) -> Result<(JobSubmission, Job), Failure> {
    let decoded: Result<JobSubmission, _> = culvert_api::decode(body);
    let submission = decoded.map_err(|error| refused(format_args!("Request decode failed: {error}")))?;
    let job = culvert_jobspec::parse(&submission.source, &submission.file, &submission.variables).map_err(refused)?;
    Ok((submission, job))
}

#[cfg(any(test, feature = "fuzz"))]
pub(super) fn judge(body: &[u8], node: &culvert_jobspec::NodeContext) -> Result<(), Failure> {
    let (_, job) = read(body)?;
    Ok(crate::runner::check(&job, node)?)
}

impl From<SubmitError> for Failure {
    fn from(error: SubmitError) -> Self {
        let status = match &error {
            SubmitError::UnknownJob(_) => StatusCode::NOT_FOUND,
            SubmitError::Record(_) | SubmitError::Left { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            SubmitError::Leaving => StatusCode::SERVICE_UNAVAILABLE,
            SubmitError::NotRunnable(_)
            | SubmitError::Datacenter { .. }
            | SubmitError::Services { .. }
            | SubmitError::Port(_) => StatusCode::BAD_REQUEST,
        };
        Self(status, crate::report::chain(&error))
    }
}

/// `PUT /v1/culvert/jobs`
pub(super) async fn submit(State(state): State<Arc<RouteState>>, body: Bytes) -> Result<Json<JobSubmitted>, Failure> {
    let (_, job) = read(&body)?;
    let id = job.id.clone();
    let runner = Arc::clone(&state.node()?.runner);
    let submitted = detached(&state.node()?.runner, async move { runner.submit(job) }).await?;
    let (version, created) = (submitted.version, submitted.created);
    Ok(Json(JobSubmitted { id, version, created, stopped: submitted.stopped, kept: submitted.kept }))
}

/// `POST /v1/culvert/jobs/plan`
pub(super) async fn plan(State(state): State<Arc<RouteState>>, body: Bytes) -> Result<Json<JobPlan>, Failure> {
    let (_, job) = read(&body)?;
    let plan = state.node()?.runner.plan(job)?;
    Ok(Json(JobPlan { diff: plan.diff.to_string(), changes: plan.changes }))
}

/// `GET /v1/culvert/jobs`
pub(super) async fn list(State(state): State<Arc<RouteState>>) -> Result<Json<Vec<JobListEntry>>, Failure> {
    let runner = &state.node()?.runner;
    let views = runner.views();
    let entry = |record: JobRecord| JobListEntry {
        job_type: "service".to_owned(),
        priority: record.job.priority,
        status: job_status(&record, &views).to_owned(),
        submitted: time(record.submitted),
        id: record.job.id,
    };
    Ok(Json(runner.jobs().into_iter().map(entry).collect()))
}

/// `GET /v1/culvert/job/:id`
pub(super) async fn status(
    State(state): State<Arc<RouteState>>,
    Path(id): Path<String>,
) -> Result<Json<JobStatus>, Failure> {
    let node = state.node()?;
    let record = node.runner.job(&id).ok_or_else(|| Failure::from(SubmitError::UnknownJob(id)))?;
    let views = node.runner.views();
    let view = node.mesh.borrow().clone();
    let own = views.iter().filter(|allocation| allocation.record.job.id == record.job.id);
    let mut own: Vec<&AllocationView> = own.collect();
    own.sort_by_key(|allocation| allocation.record.stopping); // what is on its way out comes last
    Ok(Json(JobStatus {
        version: record.version,
        status: job_status(&record, &views).to_owned(),
        stopped: record.stopped,
        submitted: time(record.submitted),
        datacenters: record.job.datacenters.clone(),
        allocations: own.into_iter().map(|allocation| allocation_status(allocation, &node.runner, &view)).collect(),
        id: record.job.id,
    }))
}

/// `DELETE /v1/culvert/job/:id?purge=`
pub(super) async fn stop(
    State(state): State<Arc<RouteState>>,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<JobStopped>, Failure> {
    let purge = match query.get("purge").map(String::as_str) {
        None | Some("false") => false,
        Some("" | "true") => true,
        Some(other) => return Err(refused(format_args!("Invalid value for purge: {other:?}"))),
    };
    let runner = Arc::clone(&state.node()?.runner);
    let stopped = detached(&state.node()?.runner, async move { runner.stop(&id, purge).await }).await?;
    Ok(Json(JobStopped { stopped }))
}

/// Does `work` on the node's own threads and to its end, also when the client goes away: a job must not be left half changed.
async fn detached<T: Send + 'static>(
    runner: &Runner,
    work: impl Future<Output = Result<T, SubmitError>> + Send + 'static,
) -> Result<T, Failure> {
    match runner.runtime().spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(Failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

/// Nomad's word for a job: pending until something runs, dead when it is stopped or everything failed.
fn job_status(record: &JobRecord, views: &[AllocationView]) -> &'static str {
    let own = || views.iter().filter(|view| view.record.job.id == record.job.id);
    if record.stopped {
        "dead"
    } else if own().any(|view| view.status == crate::runner::AllocationStatus::Running) {
        "running"
    } else if own().next().is_some() && own().all(|view| view.status == crate::runner::AllocationStatus::Failed) {
        "dead"
    } else {
        "pending"
    }
}

fn allocation_status(allocation: &AllocationView, runner: &Runner, view: &MeshView) -> AllocationStatus {
    let record = &allocation.record;
    AllocationStatus {
        id: record.id.clone(),
        group: record.group.clone(),
        index: record.index,
        version: record.job_version,
        status: allocation.status.as_str().to_owned(),
        stopping: record.stopping,
        error: allocation.error.clone(),
        created: time(record.created),
        addresses: allocation.addresses.iter().map(ToString::to_string).collect(),
        ports: record.ports.iter().map(|(label, port)| (label.clone(), (port.host, port.inside))).collect(),
        services: allocation.services.iter().map(|service| service_status(service, runner, view)).collect(),
        tasks: allocation.tasks.iter().map(|(name, task)| task_status(name, task)).collect(),
    }
}

fn service_status(service: &ServiceView, runner: &Runner, view: &MeshView) -> ServiceStatus {
    let instance = view.instances.iter().find(|instance| Some(&instance.sidecar_id) == service.sidecar_id.as_ref());
    let identity = instance.map(|instance| {
        let (trust_domain, datacenter) = (view.trust_domain.clone(), view.datacenter.clone());
        ServiceIdentity { trust_domain, datacenter, service: instance.service.clone() }.to_string()
    });
    ServiceStatus {
        service_id: service.service_id.clone(),
        service: service.service.clone(),
        sidecar_id: service.sidecar_id.clone(),
        sidecar_port: service.sidecar_port,
        identity,
        health: runner.health(service).map(|health| health.as_str().to_owned()),
    }
}

fn task_status(name: &str, task: &TaskView) -> TaskStatus {
    TaskStatus {
        name: name.to_owned(),
        state: task.state.as_str().to_owned(),
        failed: task.failed,
        restarts: task.restarts,
        pid: task.pid,
        exit_code: task.exit.as_ref().map(|exit| exit.exit_code),
        events: task
            .events
            .iter()
            .map(|event| TaskEvent { at: event.at.into(), kind: event.kind.to_owned(), message: event.message.clone() })
            .collect(),
    }
}

fn time(seconds: u64) -> Timestamp {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH).into()
}
