//! A node of culvert with two workloads: one whose pair may go direct, and one that wants mutual TLS.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use culvert_tests::{Node, NodeOptions, World};

use crate::place::Place;

/// Where the caller reaches the service that may go direct, and the one that is proxied.
pub(super) const DIRECT: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 8080));
pub(super) const PROXIED: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 8081));

/// Seconds.
const SETTLES_WITHIN: usize = 30;

/// A running node.
pub(super) struct Mesh {
    node: Node,
    /// Where the caller's application runs.
    pub(super) caller: Place,
}

impl Mesh {
    /// Starts the node and the job, and waits until both services answer on their path.
    pub(super) fn start(world: &World, own: &Path) -> anyhow::Result<Self> {
        let node = Node::start(world, NodeOptions { encryption: "between-nodes", ..NodeOptions::default() });
        node.run_job("bench", &job(own));
        let allocation = node.allocation("bench", "caller");
        let id = allocation["ID"].as_str().context("an allocation has an ID")?;
        schedule_like_others(&node.allocation("bench", "called"))?;
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup/unified/{}/{id}/park", world.cgroup_parent()));
        let cgroup = if cgroup.is_dir() { cgroup } else { unified(&cgroup)? };
        let caller =
            Place { netns: Some(PathBuf::from(format!("/run/netns/culvert-{}", &id[..8]))), cgroup: Some(cgroup) };
        Ok(Self { node, caller })
    }

    /// Those that carry the mesh: the worker, and the agent, which hands it sockets and follows the kernel's events.
    pub(super) fn processes(&self) -> anyhow::Result<Vec<u32>> {
        Ok(vec![self.worker()?, u32::try_from(self.node.pid())?])
    }

    /// The process that holds the proxied connections.
    pub(super) fn worker(&self) -> anyhow::Result<u32> {
        let status = self.node.api("/v1/culvert/status");
        let pid = status["Worker"]["Pid"].as_u64().context("no worker runs")?;
        Ok(u32::try_from(pid)?)
    }

    /// Connections that were let through on `path` so far.
    pub(super) fn connections(&self, path: &str) -> u64 {
        self.node.metric("culvert_connections_total", &[&format!("path=\"{path}\""), "side=\"outbound\""])
    }

    /// Waits until nothing more is told of connections of before.
    pub(super) fn settle(&self) -> anyhow::Result<()> {
        let told = || ["direct", "proxied"].map(|path| self.connections(path));
        for _ in 0..SETTLES_WITHIN {
            let before = told();
            std::thread::sleep(Duration::from_secs(1));
            if told() == before {
                return Ok(());
            }
        }
        anyhow::bail!("the mesh still tells of new connections {SETTLES_WITHIN} s after the last")
    }

    /// Removes everything.
    pub(super) fn leave(mut self) {
        self.node.leave();
    }
}

/// Takes the task of `allocation` out of its share of the processor, where that is a hierarchy of its own: the applications of
/// the other contenders have no share either. In cgroup2 the share cannot be told apart from the mesh's membership.
fn schedule_like_others(allocation: &serde_json::Value) -> anyhow::Result<()> {
    let task = allocation["Tasks"][0]["Pid"].as_u64().context("a task runs")?;
    let mounts = fs::read_to_string("/proc/mounts")?;
    let controls_processor = |options: &str| options.split(',').any(|option| option == "cpu");
    for mount in mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()) {
        if mount[2] == "cgroup" && controls_processor(mount[3]) {
            let processes = Path::new(mount[1]).join("cgroup.procs");
            fs::write(&processes, task.to_string()).with_context(|| format!("{}", processes.display()))?;
        }
    }
    Ok(())
}

/// Where cgroup2 is the only hierarchy, it is mounted one level higher.
fn unified(path: &Path) -> anyhow::Result<PathBuf> {
    let below = path.strip_prefix("/sys/fs/cgroup/unified")?;
    let path = Path::new("/sys/fs/cgroup").join(below);
    fs::metadata(&path).with_context(|| format!("cgroup {}", path.display()))?;
    Ok(path)
}

fn job(own: &Path) -> String {
    let command = own.display();
    format!(
        r#"
job "bench" {{
  group "called" {{
    network {{ mode = "bridge" }}
    service {{
      name = "echo-direct"
      port = "9001"
      connect {{
        sidecar_service {{}}
      }}
    }}
    service {{
      name = "echo-proxied"
      port = "9002"
      connect {{
        sidecar_service {{
          proxy {{
            config {{ encryption = "always" }}
          }}
        }}
      }}
    }}
    task "serve" {{
      driver = "raw_exec"
      config {{
        command = "{command}"
        args    = ["serve", "127.0.0.1:9001", "127.0.0.1:9002"]
      }}
    }}
  }}
  group "caller" {{
    network {{ mode = "bridge" }}
    service {{
      name = "caller"
      port = "9009"
      connect {{
        sidecar_service {{
          proxy {{
            upstreams {{
              destination_name = "echo-direct"
              local_bind_port  = 8080
            }}
            upstreams {{
              destination_name = "echo-proxied"
              local_bind_port  = 8081
            }}
          }}
        }}
      }}
    }}
    task "park" {{
      driver = "raw_exec"
      config {{
        command = "{command}"
        args    = ["serve", "127.0.0.1:9009"]
      }}
    }}
  }}
}}
"#
    )
}
