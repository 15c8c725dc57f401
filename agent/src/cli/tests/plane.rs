//! A real control plane for commands to talk to.

use std::sync::Arc;

use culvert_control::{Control, ControlConfig, NodeDialer};
use culvert_types::Datacenter;
use tokio::runtime::Runtime;

use super::{Ran, culvert};

/// A control plane in memory on a free port, and the flag that names it.
pub(super) struct Plane {
    pub(super) runtime: Runtime,
    pub(super) control: Option<Control>,
    pub(super) flag: String,
}

impl Plane {
    pub(super) fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let datacenter = Datacenter::new("dc1").expect("a name");
        let config = ControlConfig::dev("node-1", "11111111-2222-3333-4444-555555555555", datacenter);
        let control = runtime.block_on(Control::start(config, Arc::new(NodeDialer))).expect("started");
        let flag = format!("-http-addr={}", control.http_addrs()[0]);
        Self { runtime, control: Some(control), flag }
    }

    /// `culvert intention <verb> -http-addr=… <args>`
    pub(super) fn intention(&self, verb: &str, args: &[&str]) -> Ran {
        culvert(&[&["intention", verb, self.flag.as_str()], args].concat())
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            self.runtime.block_on(control.shutdown());
        }
    }
}
