//! What a running agent reacts to, signals and operators, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use culvert_control::{Control, Reloadable};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::policy::PolicyEngine;
use crate::report::chain;
use crate::routes::Ask;
use crate::runner::Runner;
use crate::worker::WorkerHandle;
use crate::workload::Network;

use super::{Asks, SettingsSource, on};

/// For answers to get to who asked.
const ANSWERS_LEAVE: Duration = Duration::from_millis(200);
/// How long connections may go on when the agent leaves.
const LEAVE_DRAIN: Duration = Duration::from_secs(2);

/// What may change while the agent runs.
pub(super) fn reloadable(settings: &Settings) -> Reloadable {
    Reloadable { default_policy: settings.default_policy, encryption: settings.encryption }
}

/// What an agent is told by signals.
pub(super) struct Signals {
    ends: Ends,
    hang_up: Signal,
}

impl Signals {
    /// They are kept from now on.
    pub(super) fn new() -> std::io::Result<Self> {
        let ends = Ends { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? };
        Ok(Self { ends, hang_up: signal(SignalKind::hangup())? })
    }
}

/// Signals that ask the agent to end.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
}

impl Ends {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Who asked while the agent came to its end is answered, too.
async fn answer_others(mut asked: Asks, left: &Result<(), String>) {
    asked.close();
    while let Some((ask, done)) = asked.recv().await {
        drop(done.send(match ask {
            Ask::Leave => left.clone(),
            Ask::Reload => Err("the agent is ending".to_owned()),
        }));
    }
    // The answers leave before the server does.
    tokio::time::sleep(ANSWERS_LEAVE).await;
}

/// Everything that runs.
pub(super) struct Agent {
    pub(super) settings: Settings,
    pub(super) again: SettingsSource,
    pub(super) control: Arc<Control>,
    pub(super) runner: Arc<Runner>,
    pub(super) policy: Arc<PolicyEngine>,
    pub(super) worker: WorkerHandle,
    pub(super) network: Arc<Network>,
}

impl Agent {
    /// Serves signals and operators until the end.
    pub(super) async fn attend(
        mut self,
        signals: Signals,
        mut asked: Asks,
        control_runtime: &Runtime,
    ) -> anyhow::Result<()> {
        let Signals { mut ends, mut hang_up } = signals;
        loop {
            tokio::select! {
                () = ends.recv() => break,
                _ = hang_up.recv() => {
                    if let Err(error) = self.reload().await {
                        error!(error, "the configuration is not reloaded; the one in force stays");
                    }
                }
                ask = asked.recv() => match ask {
                    Some((Ask::Reload, done)) => drop(done.send(self.reload().await)),
                    Some((Ask::Leave, done)) => {
                        let left = self.leave(&mut ends).await;
                        drop(done.send(left.clone()));
                        answer_others(asked, &left).await;
                        return self.end(control_runtime, left).await;
                    }
                    None => break,
                },
            }
        }
        if self.settings.dev {
            // A dev agent keeps its state in memory: what it ran would be nobody's.
            let left = self.leave(&mut ends).await;
            answer_others(asked, &left).await;
            return self.end(control_runtime, left).await;
        }
        info!("ending; workloads, worker and kernel programs go on, the next start takes them over");
        answer_others(asked, &Err("the agent was told to end, and has left nothing".to_owned())).await;
        self.end(control_runtime, Ok(())).await
    }

    /// Reads the configuration again and applies what may change: `encryption` and `default_intention_policy`.
    async fn reload(&mut self) -> Result<(), String> {
        let new = (self.again)().map_err(|error| format!("{error:#}"))?;
        let fixed = self.settings.fixed_changes(&new);
        if !fixed.is_empty() {
            warn!(settings = fixed.join(", "), "these settings need a restart; they stay as they are");
        }
        (self.settings.encryption, self.settings.default_policy) = (new.encryption, new.default_policy);
        self.control.reload(reloadable(&self.settings));
        info!(encryption = %self.settings.encryption, default_policy = %self.settings.default_policy, "configuration reloaded");
        Ok(())
    }

    /// Stops everything and removes everything that carries our names. Who asks again does not want to wait. The error says
    /// what could not be removed.
    async fn leave(&self, ends: &mut Ends) -> Result<(), String> {
        info!("leaving: stopping every job and removing everything");
        let mut stopped = std::pin::pin!(self.runner.stop_all());
        let allocations = tokio::select! {
            left = &mut stopped => left,
            () = ends.recv() => {
                warn!("asked again: tasks that have not ended are killed");
                self.runner.hurry();
                stopped.await
            }
        };
        let mut left: Vec<String> = allocations.iter().map(|id| format!("allocation {id}")).collect();
        left.extend(self.worker.shutdown(LEAVE_DRAIN).await.err());
        left.extend(self.policy.remove_all().await.err());
        left.extend(self.network.close_all().await.err().map(|error| chain(&error)));
        if left.is_empty() { Ok(()) } else { Err(format!("the host is not as it was found: {}", left.join("; "))) }
    }

    async fn end(self, control_runtime: &Runtime, left: Result<(), String>) -> anyhow::Result<()> {
        let control = self.control;
        on(control_runtime.handle(), async move { control.shutdown().await }).await?;
        left.map_err(anyhow::Error::msg)
    }
}
