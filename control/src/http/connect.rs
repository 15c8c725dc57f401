//! `/v1/connect/ca`: the authority as anybody may see it. Its configuration changes through the agent's configuration file.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response};
use axum::routing::get;
use culvert_api::{ApiError, CaRoots};

use super::query::{Query, ReadOptions};
use super::reply::{Failure, Reply, indexed, json, read_state};
use super::{Api, Shared, view};
use crate::ca::{Roots, ViewError};
use crate::store::Table;

pub(super) fn routes() -> Router<Arc<Api>> {
    Router::new().route("/v1/connect/ca/roots", get(roots)).route("/v1/connect/ca/configuration", get(configuration))
}

impl From<ViewError> for Failure {
    fn from(err: ViewError) -> Self {
        Self(ApiError::internal(err))
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
