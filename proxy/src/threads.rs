//! The threads that carry data: each runs one single-threaded tokio runtime, and a connection never leaves its thread.
//!
//! Apart from the control side's runtime, so that a slow scrape or a large configuration does not reach latency. No work is
//! stolen between them: a wake-up stays on the core that has the connection's keys and buffers in its caches.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// Most data threads, however many processors there are; a node's other work wants some too.
pub const MAX_DATA_THREADS: usize = 8;

/// The data threads. They end when this is dropped, and with them what runs on them.
#[derive(Debug)]
pub struct DataThreads {
    placement: Arc<Placement>,
    stop: CancellationToken,
    joins: Vec<JoinHandle<()>>,
}

/// Gives connections their thread.
#[derive(Debug)]
pub struct Placement {
    threads: Vec<DataThread>,
}

#[derive(Debug)]
struct DataThread {
    handle: Handle,
    load: Arc<AtomicUsize>,
}

/// A connection's place on a thread, counted as long as it lives.
#[derive(Debug)]
pub(crate) struct ThreadPlace {
    pub(crate) handle: Handle,
    load: Arc<AtomicUsize>,
}

impl Drop for ThreadPlace {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Relaxed);
    }
}

impl DataThreads {
    /// As many as processors may be used (affinity and cgroup quota counted), at most [`MAX_DATA_THREADS`].
    ///
    /// # Errors
    /// No threads or descriptors left.
    pub fn per_processor() -> io::Result<Self> {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from).min(MAX_DATA_THREADS))
    }

    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// No threads or descriptors left.
    pub fn new(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let (mut threads, mut joins) = (Vec::new(), Vec::new());
        for index in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            threads.push(DataThread { handle: runtime.handle().clone(), load: Arc::default() });
            let stopped = stop.clone();
            let thread = std::thread::Builder::new().name(format!("data-{index}"));
            joins.push(thread.spawn(move || runtime.block_on(stopped.cancelled_owned()))?);
        }
        Ok(Self { placement: Arc::new(Placement { threads }), stop, joins })
    }

    /// What proxies need of the threads; it does not keep them running.
    #[must_use]
    pub fn placement(&self) -> Arc<Placement> {
        Arc::clone(&self.placement)
    }
}

impl Placement {
    /// Returns when every thread has had a turn: none of them hangs.
    pub(crate) async fn all_take_turns(&self) {
        let turns: Vec<_> = self.threads.iter().map(|thread| thread.handle.spawn(async {})).collect();
        for turn in turns {
            let _ends_with_the_process = turn.await;
        }
    }

    /// A place on the thread with the fewest connections.
    pub(crate) fn place(&self) -> ThreadPlace {
        let thread = self.threads.iter().min_by_key(|thread| thread.load.load(Relaxed)).expect("at least one");
        thread.load.fetch_add(1, Relaxed);
        ThreadPlace { handle: thread.handle.clone(), load: Arc::clone(&thread.load) }
    }
}

impl Drop for DataThreads {
    fn drop(&mut self) {
        self.stop.cancel();
        for join in self.joins.drain(..) {
            // A panic there was printed there; connections' panics are caught by their tasks.
            let _ended = join.join();
        }
    }
}
