//! Where connections report what happened to them: a bounded queue that never makes data wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use culvert_types::ConnectionEvent;
use tokio::sync::mpsc;

use crate::metrics::Metrics;

/// Events that may wait for their reader. Beyond that they are dropped, and counted.
pub const EVENT_QUEUE: usize = 8192;

/// The connections' end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<ConnectionEvent>,
    lost: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
}

/// The reader's end.
#[derive(Debug)]
pub struct EventReader {
    queue: mpsc::Receiver<ConnectionEvent>,
    lost: Arc<AtomicU64>,
}

impl Events {
    /// Makes both ends. Every event is counted in `metrics`, whether or not it is read.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> (Self, EventReader) {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        (Self { queue: sender, lost: Arc::clone(&lost), metrics }, EventReader { queue: receiver, lost })
    }

    pub(crate) fn emit(&self, event: ConnectionEvent) {
        self.metrics.count(&event);
        if self.queue.try_send(event).is_err() {
            self.lost.fetch_add(1, Relaxed);
            self.metrics.event_lost();
        }
    }
}

impl EventReader {
    /// The next event; `None` when every connection and every proxy is gone. Cancel-safe.
    pub async fn next(&mut self) -> Option<ConnectionEvent> {
        self.queue.recv().await
    }

    /// The next event, if one is there.
    pub fn try_next(&mut self) -> Option<ConnectionEvent> {
        self.queue.try_recv().ok()
    }

    /// How many were dropped since the last call.
    pub fn take_lost(&self) -> u64 {
        self.lost.swap(0, Relaxed)
    }
}
