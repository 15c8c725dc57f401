//! Answers: JSON with Consul's headers, and errors as bare text.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use culvert_api::{ApiError, DecodeError};
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use tracing::error;

use super::Api;
use super::filter::{Filter, Schema};
use super::query::{Query, ReadOptions};
use crate::state::blocking;
use crate::state::{State, UpdateError};
use crate::store::Revision;

/// What a handler returns.
pub(super) type Reply = Result<Response<Body>, Failure>;

pub(super) const INDEX: HeaderName = HeaderName::from_static("x-consul-index");
pub(super) const KNOWN_LEADER: HeaderName = HeaderName::from_static("x-consul-knownleader");
pub(super) const LAST_CONTACT: HeaderName = HeaderName::from_static("x-consul-lastcontact");
pub(super) const CONSISTENCY: HeaderName = HeaderName::from_static("x-consul-effective-consistency");
pub(super) const DEFAULT_POLICY: HeaderName = HeaderName::from_static("x-consul-default-acl-policy");
pub(super) const CONTENT_HASH: HeaderName = HeaderName::from_static("x-consul-contenthash");
pub(super) const REASON: HeaderName = HeaderName::from_static("x-consul-reason");
pub(super) const QUERY_BACKEND: HeaderName = HeaderName::from_static("x-consul-query-backend");

/// An error on its way out.
#[derive(Debug)]
pub(super) struct Failure(pub(super) ApiError);

impl From<ApiError> for Failure {
    fn from(err: ApiError) -> Self {
        Self(err)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response<Body> {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        text(status, self.0.message)
    }
}

/// A failed write. The cause goes to the log, not to the client: it may name files.
pub(super) fn store_failed(err: &UpdateError) -> ApiError {
    match err {
        UpdateError::Closed => ApiError::internal("No cluster leader"),
        err => {
            error!(err = %chain(err), "state store: write failed");
            ApiError::internal(format!("{err}; see the agent's log"))
        }
    }
}

fn chain(err: &dyn std::error::Error) -> String {
    std::iter::successors(err.source(), |err| err.source()).fold(err.to_string(), |text, err| format!("{text}: {err}"))
}

/// A plain text.
pub(super) fn text(status: StatusCode, message: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(message.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// 200 with nothing in it: what Consul answers to a write.
pub(super) fn empty() -> Response<Body> {
    Response::new(Body::empty())
}

/// JSON as the client asked for it.
pub(super) fn json<T: Serialize>(api: &Api, query: &Query, value: &T) -> Reply {
    let pretty = query.has("pretty");
    let mut bytes = Vec::with_capacity(512);
    let written = if pretty || api.place.dev {
        value.serialize(&mut Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(b"    ")))
    } else {
        value.serialize(&mut Serializer::new(&mut bytes))
    };
    written.map_err(|err| ApiError::internal(format!("answer not serialisable: {err}")))?;
    if pretty {
        bytes.push(b'\n');
    }
    let mut response = Response::new(Body::from(bytes));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Waits as the client asked, and hands over the state to answer from.
pub(super) async fn read_state(
    api: &Api,
    options: &ReadOptions,
    scope: impl Fn(&State) -> Revision + Send,
) -> std::sync::Arc<State> {
    let _blocked = (options.index > 0).then(|| api.metrics.blocked());
    let read = blocking::until(&api.ledger, options.index, options.wait, scope);
    match api.drain.run_until_cancelled(read).await {
        Some(state) => state,
        None => api.ledger.state(),
    }
}

/// Sets the headers of an indexed read.
pub(super) fn indexed(headers: &mut HeaderMap, index: Revision, options: &ReadOptions) {
    // 0 would make clients poll without waiting.
    headers.insert(INDEX, HeaderValue::from(index.0.max(1)));
    headers.insert(KNOWN_LEADER, HeaderValue::from_static("true"));
    headers.insert(LAST_CONTACT, HeaderValue::from_static("0"));
    headers.insert(CONSISTENCY, HeaderValue::from_static(options.consistency));
}

/// A blocking, indexed read: waits, computes, answers.
pub(super) async fn read<T: Serialize>(
    api: &Api,
    query: &Query,
    scope: impl Fn(&State) -> Revision + Send + Sync,
    answer: impl FnOnce(&State, &ReadOptions) -> Result<T, Failure>,
) -> Reply {
    let options = ReadOptions::parse(query, api)?;
    let state = read_state(api, &options, &scope).await;
    let mut response = json(api, query, &answer(&state, &options)?)?;
    indexed(response.headers_mut(), scope(&state), &options);
    Ok(response)
}

/// Keeps the items that `?filter=` lets pass.
pub(super) fn filtered<T: Serialize>(
    filter: Option<&str>,
    schema: Schema,
    items: impl Iterator<Item = T>,
) -> Result<Vec<T>, Failure> {
    let Some(filter) = filter else { return Ok(items.collect()) };
    let filter = Filter::parse(filter, schema).map_err(ApiError::internal)?;
    let mut kept = Vec::new();
    for item in items {
        let value = serde_json::to_value(&item).map_err(ApiError::internal)?;
        if filter.matches(&value) {
            kept.push(item);
        }
    }
    Ok(kept)
}

/// Reads a body; unknown keys are refused.
pub(super) fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    culvert_api::decode(body).map_err(|err: DecodeError| Failure(err.into()))
}
