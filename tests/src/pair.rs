//! A job without programs of its own: the test plays its applications.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{App, Node};

/// Three allocations whose applications are played by the test: `caller` and `stranger` reach `called` at port 8080.
#[derive(Debug)]
pub struct Pair {
    /// Its service is at port 9001.
    pub called: App,
    /// May call, unless an intention says otherwise.
    pub caller: App,
    /// As `caller`.
    pub stranger: App,
}

/// Where `called` listens, on both families.
#[must_use]
pub fn service() -> [SocketAddr; 2] {
    [(Ipv4Addr::LOCALHOST, 9001).into(), (Ipv6Addr::LOCALHOST, 9001).into()]
}

/// Where callers reach `called`.
#[must_use]
pub fn upstream() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 8080).into()
}

/// The same by IPv6.
#[must_use]
pub fn upstream6() -> SocketAddr {
    (Ipv6Addr::LOCALHOST, 8080).into()
}

/// The same by an IPv6 socket that speaks IPv4.
#[must_use]
pub fn upstream_mapped() -> SocketAddr {
    (Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 8080).into()
}

/// A group with one service in the mesh; `proxy` is what its sidecar is told.
#[must_use]
pub fn group(name: &str, port: u16, proxy: &str) -> String {
    format!(
        r#"
  group "{name}" {{
    network {{ mode = "bridge" }}
    service {{
      name = "{name}"
      port = "{port}"
      connect {{
        sidecar_service {{
          proxy {{
{proxy}
          }}
        }}
      }}
    }}
    task "park" {{
      driver = "raw_exec"
      config {{
        command = "/bin/sleep"
        args    = ["infinity"]
      }}
      resources {{ memory = 10 }}
    }}
  }}
"#
    )
}

/// What a sidecar is told that reaches `service` at `port`.
#[must_use]
pub fn calls(service: &str, port: u16) -> String {
    format!("upstreams {{\n destination_name = {service:?}\n local_bind_port = {port}\n }}\n")
}

/// What a sidecar is told that wants `encryption`.
#[must_use]
pub fn wants(encryption: &str) -> String {
    format!("config {{ encryption = {encryption:?} }}\n")
}

impl Node {
    /// Runs the job `pair`. `called` is what its sidecar is told, beside its being called.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn run_pair(&self, called: &str) -> Pair {
        let groups = [
            group("called", 9001, called),
            group("caller", 9002, &calls("called", 8080)),
            group("stranger", 9003, &calls("called", 8080)),
        ];
        self.run_job("pair", &format!("job \"pair\" {{\n{}\n}}\n", groups.concat()));
        self.pair()
    }

    /// The allocations of the job `pair`.
    #[must_use]
    pub fn pair(&self) -> Pair {
        let of = |group| App::of(self, "pair", group);
        Pair { called: of("called"), caller: of("caller"), stranger: of("stranger") }
    }
}
