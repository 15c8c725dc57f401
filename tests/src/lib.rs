//! End-to-end tests: a whole node in a world of its own, the real binary, real network namespaces, real eBPF.
//!
//! [`World`] puts the calling thread, and every process it starts, into a network and a mount namespace of their own, with
//! their own `/run` and BPF file system: names need not be changed, and nothing is left when the last process ends.
//! [`Node`] is an agent in it, steered as a user would: by the command line and the HTTP API. Its applications are programs
//! of the workspace, or the test itself ([`Apps`]).

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "what a failing test prints is its report")]

mod apps;
mod browser;
pub mod envoy;
mod http;
mod node;
mod pair;
mod sniff;
mod world;

pub use apps::{Accepted, App, Apps, End, GREETING, Server, echo, greeting, is_direct};
pub use browser::Browser;
pub use http::{get, get_json, post_json, put};
pub use node::{API, Node, NodeOptions};
pub use pair::{Pair, calls, group, service, upstream, upstream_mapped, upstream6, wants};
pub use sniff::{Seen, Sniffer};
pub use world::{DATA_DIR, Process, World};

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Patience of tests on a slow and noisy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A binary of the workspace, from the folder of this program's own or, for a test, from the one above.
///
/// # Panics
/// When it was not built: `cargo xtask test` builds all of them first.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a program has a path");
    // target/<profile>/<program>, or target/<profile>/deps/<test>
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built beside {}; run `cargo xtask test`", own.display()))
}

/// Waits until `done`.
///
/// # Panics
/// After [`PATIENCE`], naming `what`.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
