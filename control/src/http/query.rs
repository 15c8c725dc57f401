//! Query parameters: read once, all of them, with Consul's texts for what is wrong.

use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use culvert_api::ApiError;
use culvert_types::parse_go_duration;

use super::Api;
use super::reply::Failure;
use crate::state::blocking::{DEFAULT_WAIT, MAX_WAIT};

/// Most parameters of one request.
const MAX_PARAMETERS: usize = 256;

/// The parameters of a request, in order, repetitions kept.
#[derive(Clone, Debug, Default)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// The first value of `name`.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The first value of `name`, or nothing if it is empty.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|value| !value.is_empty())
    }

    /// Is `name` there, with any value?
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Every value of `name`.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A boolean parameter: absent is false, bare is true.
    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some("") => Ok(true),
            Some(text) => bool_from_go(text).ok_or_else(|| ApiError::bad_request(format!("Invalid value for ?{name}"))),
        }
    }
}

/// Go's `strconv.ParseBool`.
pub(super) fn bool_from_go(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&parts.uri);
        let pairs = pairs.map_err(|err| ApiError::bad_request(format!("Failed to parse query: {err}")))?.0;
        if pairs.len() > MAX_PARAMETERS {
            return Err(ApiError::bad_request(format!("more than {MAX_PARAMETERS} query parameters")).into());
        }
        Ok(Self(pairs))
    }
}

/// What every read may ask for.
#[derive(Clone, Debug)]
pub(super) struct ReadOptions {
    /// Wait until the index exceeds this; 0: answer at once.
    pub(super) index: u64,
    /// At most this long.
    pub(super) wait: Duration,
    /// Value of `X-Consul-Effective-Consistency`. One server: every mode gives the same.
    pub(super) consistency: &'static str,
    /// `filter`.
    pub(super) filter: Option<String>,
    /// `node-meta=key:value`, all of which a node must have.
    pub(super) node_meta: Vec<(String, String)>,
}

impl ReadOptions {
    /// Reads the common parameters.
    ///
    /// # Errors
    /// With Consul's status and text: 400 for what is malformed, 500 for a datacenter that cannot be reached.
    pub(super) fn parse(query: &Query, api: &Api) -> Result<Self, ApiError> {
        check_scope(query, api)?;
        let index = query.text("index").map_or(Ok(0), str::parse);
        let index = index.map_err(|_| ApiError::bad_request("Invalid index"))?;
        let wait = query.text("wait").map_or(Ok(DEFAULT_WAIT), parse_go_duration);
        let wait = wait.map_err(|_| ApiError::bad_request("Invalid wait time"))?;
        let (stale, consistent) = (query.has("stale") || query.has("max_stale"), query.has("consistent"));
        if stale && consistent {
            let text = "Cannot specify ?stale with ?consistent, conflicting semantics.";
            return Err(ApiError::bad_request(text));
        }
        if query.has("cached") && consistent {
            let text = "Cannot specify ?cached with ?consistent, conflicting semantics.";
            return Err(ApiError::bad_request(text));
        }
        let pair = |text: &str| {
            let (key, value) = text.split_once(':').unwrap_or((text, ""));
            (key.to_owned(), value.to_owned())
        };
        Ok(Self {
            index,
            wait: if wait.is_zero() { DEFAULT_WAIT } else { wait.min(MAX_WAIT) },
            consistency: match (stale, consistent) {
                (true, _) => "stale",
                (_, true) => "consistent",
                _ => "leader",
            },
            filter: query.text("filter").map(str::to_owned),
            node_meta: query.all("node-meta").map(pair).collect(),
        })
    }
}

/// Refuses what belongs to another datacenter, or to a scope that does not exist here.
pub(super) fn check_scope(query: &Query, api: &Api) -> Result<(), ApiError> {
    let datacenter = query.text("datacenter").or_else(|| query.text("dc"));
    if datacenter.is_some_and(|name| name != api.place.datacenter.as_str()) {
        return Err(ApiError::internal("No path to datacenter"));
    }
    for (name, what) in [("ns", "Namespaces are"), ("partition", "Partitions are")] {
        if query.text(name).is_some_and(|value| value != "default") {
            let text = format!("Invalid query parameter: {name:?} - {what} a Consul Enterprise feature");
            return Err(ApiError::bad_request(text));
        }
    }
    for name in ["peer", "sg"] {
        if query.text(name).is_some() {
            let text = format!("Invalid query parameter: {name:?} - cluster peering is not supported by culvert yet");
            return Err(ApiError::bad_request(text));
        }
    }
    Ok(())
}
