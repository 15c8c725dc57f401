//! Ctrl-C: the demo removes what it made before it ends.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on, signals that ask to end are remembered instead. Programs that are started get them as ever.
pub(crate) fn remember() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("await signals")?;
    let entered = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    drop(entered);
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hang_up.recv() => {}
            }
            ASKED.store(true, Ordering::SeqCst);
        });
    });
    Ok(())
}

pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// An error when the demo was asked to end.
pub(crate) fn check() -> anyhow::Result<()> {
    if asked() {
        bail!("interrupted");
    }
    Ok(())
}
