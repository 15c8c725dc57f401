//! How soon an intention that turns to deny is enforced, counted from the moment the API has answered: on a live connection, and
//! on new ones.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use culvert_tests::put;
use serde::{Deserialize, Serialize};

use crate::compare::percentile;
use crate::contenders::{API, Contender, Running};
use crate::probe::{Seen, now};

/// How long is watched after the API's answer.
const WATCH: Duration = Duration::from_millis(300);

/// Milliseconds from the API's answer to the effect.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Enforcement {
    pub(crate) contender: String,
    /// How often an intention was turned.
    pub(crate) flips: usize,
    /// Until a live connection had ended.
    pub(crate) live_p50: f64,
    pub(crate) live_p99: f64,
    /// Until the beginning of the last new connection that was let through.
    pub(crate) new_p50: f64,
    pub(crate) new_p99: f64,
}

/// Turns the intention from the caller to `service` so many times.
pub(crate) fn measure(contender: &Contender, service: &str, flips: usize) -> anyhow::Result<Enforcement> {
    let (mut live, mut new) = (Vec::new(), Vec::new());
    for flip in 0..flips {
        set(service, "allow")?;
        let (answered, seen) = turn(contender, service)?;
        let ended = seen.live_ended.with_context(|| format!("{}: a denied connection lives on", contender.name))?;
        ensure!(seen.refused > 0, "{}: flip {flip}: nothing was refused", contender.name);
        let millis = |time: u64| time.saturating_sub(answered) as f64 / 1e6;
        live.push(millis(ended));
        new.push(millis(seen.last_allowed));
    }
    set(service, "allow")?;
    let [live_p50, live_p99] = [0.5, 0.99].map(|q| percentile(&mut live, q));
    let [new_p50, new_p99] = [0.5, 0.99].map(|q| percentile(&mut new, q));
    Ok(Enforcement { contender: contender.name.to_owned(), flips, live_p50, live_p99, new_p50, new_p99 })
}

/// Denies while a prober watches; returns when the API had answered, and what was seen.
fn turn(contender: &Contender, service: &str) -> anyhow::Result<(u64, Seen)> {
    let mut command = Running::own_command(&contender.place, &["probe", &contender.target.to_string()])?;
    let mut prober = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start the prober")?;
    let mut lines = BufReader::new(prober.stdout.take().context("its output")?).lines();
    lines.next().context("the prober ended")??;
    set(service, "deny")?;
    let answered = now();
    std::thread::sleep(WATCH);
    prober.stdin.take().context("its input")?.write_all(b"stop\n")?;
    let seen = lines.next().context("the prober ended")??;
    ensure!(prober.wait()?.success(), "the prober failed");
    Ok((answered, serde_json::from_str(&seen)?))
}

fn set(service: &str, action: &str) -> anyhow::Result<()> {
    let path = format!("/v1/connect/intentions/exact?source=caller&destination={service}");
    put(API, &path, &format!("{{\"Action\": {action:?}}}")).map(drop)
}
