//! What the worker tells of its connections and proxies.

use culvert_proxy::handoff::{EventRecord, ProxyStatus, ToAgent};
use culvert_types::{ConnectionEvent, ServiceIdentity};
use tracing::warn;

use super::Supervisor;

impl Supervisor {
    /// Takes in what is told of connections; nothing else.
    pub(super) fn hear(&self, message: ToAgent) {
        match message {
            ToAgent::Event(record) => self.event(record),
            ToAgent::Events(records) => records.into_iter().for_each(|record| self.event(record)),
            ToAgent::EventsLost { count } => self.surroundings.events_lost(count),
            _ => {}
        }
    }

    fn event(&self, record: EventRecord) {
        let event = match ConnectionEvent::try_from(record) {
            Ok(event) => event,
            Err(error) => return warn!(%error, "the worker sent an event that is not understood"),
        };
        let service =
            own_service(&event).or_else(|| self.service_of(&event.reporter).map(str::to_owned)).unwrap_or_default();
        self.surroundings.event(&service, event);
    }

    pub(super) fn service_of(&self, proxy: &str) -> Option<&str> {
        let served = self.sockets.get(proxy).map(|served| served.service.as_str());
        served.or_else(|| self.stopping.get(proxy)?.service.as_deref())
    }

    pub(super) fn status(&self, status: ProxyStatus) {
        let proxy = &status.proxy;
        let awaits_its_end = self.stopping.contains_key(proxy) && self.sockets.get(proxy).is_some();
        if self.replaced.contains(proxy) || awaits_its_end {
            return; // of its former life
        }
        if let Some(nack) = &status.nack {
            warn!(
                proxy = status.proxy,
                resource = nack.resource,
                reason = nack.reason,
                "the worker refuses a resource"
            );
        }
        self.view.send_modify(|view| drop(view.proxies.insert(status.proxy.clone(), status)));
    }
}

/// Whose side tells, by the name in its certificate: a connection may end after its proxy was stopped, or before it is served
/// again.
pub(super) fn own_service(event: &ConnectionEvent) -> Option<String> {
    let own = if event.inbound { &event.destination } else { &event.source };
    Some(ServiceIdentity::try_from(own.clone()?).ok()?.service.to_string())
}
