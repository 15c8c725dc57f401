//! What one proxy carries and has carried, by side.
//!
//! Events tell of bytes when a connection ends, and events may be lost; this is what holds. It costs a connection nothing while
//! it lives: its own counters are read when somebody asks, and added up when it ends.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::listener::Shared;
use crate::config::Direction;
use crate::handoff::{SideTraffic, Traffic};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<Parts>);

#[derive(Debug, Default)]
struct Parts {
    listeners: Vec<Weak<Shared>>,
    /// Of listeners that are gone.
    past: Traffic,
    /// Bytes that are not counted any more.
    base: Traffic,
}

impl Tally {
    pub(super) fn add(&self, listener: &Arc<Shared>) {
        let mut parts = self.0.lock();
        parts.listeners.retain(|listener| listener.strong_count() > 0);
        parts.listeners.push(Arc::downgrade(listener));
    }

    /// One of connections that are gone.
    #[cfg(test)]
    pub(crate) fn of_past(past: Traffic) -> Self {
        Self(Mutex::new(Parts { past, ..Parts::default() }))
    }

    /// `listener` is about to be gone.
    pub(super) fn keep(&self, listener: &Shared) {
        listener.count(&mut self.0.lock().past);
    }

    /// Connections that are open now, and bytes since the start or the last [`Self::count_anew`].
    pub(crate) fn read(&self) -> Traffic {
        let all = self.all();
        let base = self.0.lock().base;
        let since = |now: SideTraffic, base: SideTraffic| SideTraffic {
            open: now.open,
            bytes_to_destination: now.bytes_to_destination.saturating_sub(base.bytes_to_destination),
            bytes_to_source: now.bytes_to_source.saturating_sub(base.bytes_to_source),
        };
        Traffic { inbound: since(all.inbound, base.inbound), outbound: since(all.outbound, base.outbound) }
    }

    /// Counts bytes from here on.
    pub(crate) fn count_anew(&self) {
        let all = self.all();
        self.0.lock().base = all;
    }

    fn all(&self) -> Traffic {
        let parts = self.0.lock();
        let (mut traffic, listeners) = (parts.past, parts.listeners.clone());
        drop(parts); // whoever drops the last reference to a listener takes it again
        listeners.iter().filter_map(Weak::upgrade).for_each(|listener| listener.count(&mut traffic));
        traffic
    }
}

/// The side of `traffic` that a listener of `direction` belongs to.
pub(super) fn side(traffic: &mut Traffic, direction: Direction) -> &mut SideTraffic {
    match direction {
        Direction::Inbound => &mut traffic.inbound,
        Direction::Outbound => &mut traffic.outbound,
    }
}
