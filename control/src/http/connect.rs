//! `/v1/connect/ca`: the authority as anybody may see it, its settings, and the rotation of its root.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response};
use axum::routing::{get, put};
use culvert_api::{ApiError, CaConfiguration, CaRoots};

use super::query::{Query, ReadOptions, check_scope};
use super::reply::{Failure, Reply, decode, empty, indexed, json, read_state, store_failed};
use super::{Api, Shared, view};
use crate::ca::{ConfigurationUpdate, ConfigureError, Roots, RotateError, ViewError};
use crate::store::Table;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/connect/ca/roots", get(roots))
        .route("/v1/connect/ca/configuration", get(configuration).put(configure))
        // Not Consul's, which rotates when it is given another key: the built-in authority here makes its own.
        .route("/v1/culvert/ca/rotate", put(rotate))
}

impl From<ViewError> for Failure {
    fn from(err: ViewError) -> Self {
        Self(ApiError::internal(err))
    }
}

impl From<ConfigureError> for Failure {
    fn from(err: ConfigureError) -> Self {
        Self(match err {
            ConfigureError::Store(err) => store_failed(&err),
            ConfigureError::Row(_) | ConfigureError::View(_) => ApiError::internal(err),
            err => ApiError::bad_request(err),
        })
    }
}

impl From<RotateError> for Failure {
    fn from(err: RotateError) -> Self {
        Self(match err {
            RotateError::Store(err) => store_failed(&err),
            RotateError::TooMany => ApiError::new(429, err),
            err => ApiError::internal(err),
        })
    }
}

async fn roots(State(api): Shared, query: Query) -> Reply {
    let options = ReadOptions::parse(&query, &api)?;
    let state = read_state(&api, &options, |state| state.index(Table::Authority)).await;
    let roots = api.leaves.authority().roots()?;
    let mut response = render(&api, &query, &roots)?;
    indexed(response.headers_mut(), state.index(Table::Authority), &options);
    Ok(response)
}

/// JSON, or with `?pem` the certificates alone.
pub(super) fn render(api: &Api, query: &Query, roots: &Roots) -> Reply {
    if query.flag("pem")? {
        let mut response = Response::new(Body::from(roots.bundle.to_string()));
        let kind = HeaderValue::from_static("application/pem-certificate-chain");
        response.headers_mut().insert(CONTENT_TYPE, kind);
        return Ok(response);
    }
    let body: CaRoots = view::roots(roots);
    json(api, query, &body)
}

async fn configuration(State(api): Shared, query: Query) -> Reply {
    let options = ReadOptions::parse(&query, &api)?;
    let state = read_state(&api, &options, |state| state.index(Table::Authority)).await;
    let body = view::ca_configuration(&api.leaves.authority().configuration()?);
    let mut response = json(&api, &query, &body)?;
    indexed(response.headers_mut(), state.index(Table::Authority), &options);
    Ok(response)
}

/// Settings that the body does not name stay as they are.
async fn configure(State(api): Shared, query: Query, body: Bytes) -> Reply {
    check_scope(&query, &api)?;
    let update = ConfigurationUpdate::try_from(&decode::<CaConfiguration>(&body)?)?;
    api.leaves.authority().configure(&update).await?;
    Ok(empty())
}

/// Answers with all roots that are trusted now, the new one first.
async fn rotate(State(api): Shared, query: Query) -> Reply {
    check_scope(&query, &api)?;
    let roots = api.leaves.authority().rotate().await?;
    json(&api, &query, &view::roots(&roots))
}
