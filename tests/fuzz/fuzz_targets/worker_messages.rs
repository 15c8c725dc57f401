//! What the worker, which may do less than the agent, says to it: read, counted, and told to whoever observes.
#![no_main]

use culvert_agent::events::EventHub;
use culvert_api::EventRecord as Observed;
use culvert_proxy::handoff::{EventRecord, Message, ToAgent};
use culvert_types::ConnectionEvent;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(message) = serde_json::from_slice::<ToAgent>(data) else { return };
    assert!(message.descriptors() <= 1);
    let written = serde_json::to_vec(&message).expect("it was read");
    assert_eq!(serde_json::from_slice::<ToAgent>(&written).expect("it was written"), message);
    let hub = EventHub::new();
    match message {
        ToAgent::Event(record) => event(&hub, record),
        ToAgent::Events(records) => records.into_iter().for_each(|record| event(&hub, record)),
        ToAgent::EventsLost { count } => hub.lost(count),
        ToAgent::Traffic { proxy, traffic } => {
            hub.traffic(&proxy, "web", &traffic);
            hub.no_traffic(Some(&proxy));
        }
        _ => {}
    }
    hub.exposition().expect("metrics can be printed");
});

fn event(hub: &EventHub, record: EventRecord) {
    let Ok(event) = ConnectionEvent::try_from(record.clone()) else { return };
    let again = EventRecord::from(&event);
    assert_eq!((again.at_us, again.duration_us), (record.at_us, record.duration_us));
    assert_eq!((&again.kind, &again.verdict, &again.reason), (&record.kind, &record.verdict, &record.reason));
    let line = serde_json::to_string(&Observed::from(&event)).expect("observers get every event");
    Observed::parse(&line).expect("observers can read it");
    hub.publish("web", event);
}
