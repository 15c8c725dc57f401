//! Server names that Consul's proxies put into the TLS handshake, and use as cluster names.

use crate::{Datacenter, ServiceName, TrustDomain};

/// SNI and cluster name of a service: `<service>.default.<dc>.internal.<trust domain>`.
#[must_use]
pub fn service(service: &ServiceName, datacenter: &Datacenter, trust_domain: &TrustDomain) -> String {
    format!("{service}.default.{datacenter}.internal.{trust_domain}")
}
