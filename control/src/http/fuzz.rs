//! What the fuzz targets call: the readers of `?filter=` and of bodies, with nothing behind them but a store in memory.

use std::sync::Arc;

use culvert_api::{ApiError, CaConfiguration, CheckDefinition, Intention as Wire, ServiceRegistration};
use culvert_types::Datacenter;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::filter::{AGENT_SERVICE, Filter, INTENTION};
use super::reply::{Failure, decode};
use super::{agent_check, intentions, view};
use crate::ca::{CaSettings, ConfigurationUpdate, ConfigureError};
use crate::catalog::{Catalog, Place};
use crate::intentions::Intentions;
use crate::state::Ledger;
use crate::store::MemoryStore;

/// Longest filter, in bytes.
pub const MAX_LENGTH: usize = super::filter::MAX_LENGTH;
/// Deepest nesting of a filter.
pub const MAX_DEPTH: usize = super::filter::MAX_DEPTH;

/// Items that a filter is written for.
#[derive(Clone, Copy, Debug)]
pub enum Items {
    /// Of `/v1/agent/services`.
    Services,
    /// Of `/v1/connect/intentions`.
    Intentions,
}

/// What a filter that was understood says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Verdict {
    /// The item passes.
    pub passes: bool,
    /// Nodes from the root of the expression to the deepest leaf.
    pub depth: usize,
}

/// Reads `text` as a filter of `items`, and asks it about `item`.
///
/// # Errors
/// What the client is told.
pub fn filter(text: &str, items: Items, item: &Value) -> Result<Verdict, ApiError> {
    let schema = match items {
        Items::Services => AGENT_SERVICE,
        Items::Intentions => INTENTION,
    };
    let filter = Filter::parse(text, schema).map_err(ApiError::internal)?;
    Ok(Verdict { passes: filter.matches(item), depth: filter.depth() })
}

/// Whose body it is.
#[derive(Clone, Copy, Debug)]
pub enum Endpoint {
    /// `PUT /v1/agent/service/register`.
    Service,
    /// `PUT /v1/agent/check/register`.
    Check,
    /// `PUT /v1/agent/check/update/:id`.
    CheckUpdate,
    /// `PUT /v1/connect/intentions/exact`, for the pair that the body names.
    Intention,
    /// `PUT /v1/connect/ca/configuration`.
    CaConfiguration,
}

impl Endpoint {
    /// Chosen by the first byte of an input; `None` for bodies that are not read here.
    #[must_use]
    pub fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            b's' => Self::Service,
            b'c' => Self::Check,
            b'u' => Self::CheckUpdate,
            b'i' => Self::Intention,
            b'a' => Self::CaConfiguration,
            _ => return None,
        })
    }
}

/// Takes `body` twice, as the endpoint would on an empty node, and prints what came of it.
///
/// # Errors
/// What the client is told.
///
/// # Panics
/// When saying the same again changes something.
pub fn body(endpoint: Endpoint, body: &[u8]) -> Result<Vec<Value>, ApiError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(ApiError::internal)?;
    let taken = runtime.block_on(async {
        match endpoint {
            Endpoint::Service | Endpoint::Check => registration(endpoint, body).await,
            Endpoint::CheckUpdate => agent_check::update_of(body).map(|_| Vec::new()),
            Endpoint::Intention => intention(body).await,
            Endpoint::CaConfiguration => {
                let update = ConfigurationUpdate::try_from(&decode::<CaConfiguration>(body)?)?;
                update.check()?;
                update.over(CaSettings::default()).check().map_err(ConfigureError::from)?;
                Ok(Vec::new())
            }
        }
    });
    taken.map_err(|Failure(error)| error)
}

async fn ledger() -> Result<Ledger, Failure> {
    let started = Ledger::start(Arc::new(MemoryStore::default()), CancellationToken::new()).await;
    Ok(started.map_err(ApiError::internal)?)
}

async fn registration(endpoint: Endpoint, body: &[u8]) -> Result<Vec<Value>, Failure> {
    let place = Place {
        node: "n1".to_owned(),
        advertise: [10, 0, 0, 1].into(),
        datacenter: Datacenter::new("dc1").map_err(ApiError::internal)?,
        sidecar_ports: Some(21000..=21255),
        dev: false,
    };
    let ledger = ledger().await?;
    let (place, mut revision) = (Arc::new(place), None);
    let catalog = Catalog::new(ledger.clone(), Arc::clone(&place));
    for _ in 0..2 {
        if matches!(endpoint, Endpoint::Service) {
            let body = ServiceRegistration::decode(body).map_err(|err| Failure(err.into()))?;
            catalog.register_service(body, false).await?;
        } else {
            catalog.register_check(decode::<CheckDefinition>(body)?).await?;
        }
        let now = ledger.state().revision();
        assert_eq!(now, *revision.get_or_insert(now), "the same again is another revision");
    }
    let state = ledger.state();
    let services = state.services().map(|service| serde_json::to_value(view::agent_service(service, &place)));
    let checks = state.checks().map(|check| serde_json::to_value(view::health_check(check, None)));
    Ok(services.chain(checks).collect::<Result<_, _>>().map_err(ApiError::internal)?)
}

async fn intention(body: &[u8]) -> Result<Vec<Value>, Failure> {
    let wire: Wire = decode(body)?;
    let (source, destination) = (wire.source_name.clone(), wire.destination_name.clone());
    let draft = intentions::draft(wire, &source, &destination)?;
    let (ledger, mut revision) = (ledger().await?, None);
    for _ in 0..2 {
        Intentions::new(ledger.clone()).upsert(&draft).await?;
        let now = ledger.state().revision();
        assert_eq!(now, *revision.get_or_insert(now), "the same again is another revision");
    }
    let state = ledger.state();
    let printed = state.intentions().iter().map(|entry| serde_json::to_value(view::intention(entry)));
    Ok(printed.collect::<Result<_, _>>().map_err(ApiError::internal)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    /// Name and content of every seed of `target`.
    fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds").join(target);
        let seed = |path: &Path| (path.display().to_string(), std::fs::read(path).expect("a seed"));
        let seeds: Vec<_> =
            std::fs::read_dir(folder).expect("seeds").map(|entry| seed(&entry.expect("a seed").path())).collect();
        assert!(!seeds.is_empty(), "{target}");
        seeds
    }

    #[test]
    fn the_seeds_are_what_their_readers_understand() {
        for (name, bytes) in seeds("filter") {
            let text = std::str::from_utf8(&bytes).expect("text");
            let items = if name.ends_with("intention") { Items::Intentions } else { Items::Services };
            filter(text, items, &json!({})).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        for (name, bytes) in seeds("http_bodies") {
            let Some(endpoint) = Endpoint::of(bytes[0]) else {
                assert_eq!(bytes[0], b'j', "{name} is for nobody; jobs are the agent's");
                continue;
            };
            match body(endpoint, &bytes[1..]) {
                Ok(_) => {}
                // The recorded check is of a service that was registered before it.
                Err(error) if error.status == 404 && name.ends_with("check") => {}
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
}
