//! A service as one allocation registers it: every text rendered, every port a number inside the network namespace.

use crate::decode::is_service_name;
use crate::{
    AllocContext, Check, CheckKind, CheckStatus, Connect, Environment, Group, HttpCheck, PortRef, Service, Template,
    TemplateError,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// A [`Service`] of one allocation.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedService {
    /// A valid service name; lower case if it is part of the mesh.
    pub name: String,
    /// What the job file says: the label, or the number as text. Part of the service's id.
    pub port_label: String,
    /// Where the application listens, inside the network namespace.
    pub port: Option<u16>,
    /// `tags`.
    pub tags: Vec<String>,
    /// `meta`.
    pub meta: BTreeMap<String, String>,
    /// `check` blocks.
    pub checks: Vec<ResolvedCheck>,
    /// `connect`, with the sidecar's texts rendered.
    pub connect: Option<ResolvedConnect>,
}

/// What the sidecar of a [`ResolvedService`] registers with.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedConnect {
    /// The block as written: proxy, upstreams, settings.
    pub block: Connect,
    /// `tags` of the sidecar, else those of the service.
    pub tags: Vec<String>,
    /// `meta` of the sidecar, else that of the service.
    pub meta: BTreeMap<String, String>,
    /// Where the proxy finds the application: `local_service_port`, else the service's port.
    pub local_service_port: Option<u16>,
}

/// A [`Check`] of one allocation.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedCheck {
    /// `name`.
    pub name: String,
    /// Port inside the network namespace.
    pub port: u16,
    /// `None`: a TCP check.
    pub http: Option<ResolvedHttp>,
    /// `interval`.
    pub interval: Duration,
    /// `timeout`.
    pub timeout: Duration,
    /// `initial_status`.
    pub initial_status: CheckStatus,
    /// `success_before_passing`.
    pub success_before_passing: u32,
    /// `failures_before_critical`.
    pub failures_before_critical: u32,
    /// `failures_before_warning`.
    pub failures_before_warning: u32,
}

/// What an HTTP check of one allocation sends.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedHttp {
    /// Path and query.
    pub path: String,
    /// `method`.
    pub method: String,
    /// `header`.
    pub headers: BTreeMap<String, Vec<String>>,
    /// `body`.
    pub body: String,
}

/// Why a service cannot be registered for an allocation.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ResolveError {
    /// A text refers to what this allocation does not have.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The rendered name is none.
    #[error("service name {template:?} becomes {name:?} here, which is not a valid name")]
    Name {
        /// As written.
        template: String,
        /// As rendered.
        name: String,
    },
    /// The rendered text of a check would change the request's meaning.
    #[error("{field} of check {check:?} holds a blank or a control character here: {value:?}")]
    Check {
        /// Name of the check.
        check: String,
        /// Which field.
        field: &'static str,
        /// As rendered.
        value: String,
    },
    /// The allocation was given no port for a label. Nomad's wording.
    #[error("No port of label {label:?} defined")]
    NoPort {
        /// The label.
        label: String,
    },
}

impl Group {
    /// All services of this group for one allocation; `environment` is [`Environment::of_group`].
    ///
    /// # Errors
    /// The first [`ResolveError`] of any service.
    pub fn resolve_services(
        &self,
        environment: &Environment,
        context: &AllocContext,
    ) -> Result<Vec<ResolvedService>, ResolveError> {
        self.services.iter().map(|service| service.resolve(environment, context)).collect()
    }
}

impl Service {
    /// This service for one allocation.
    ///
    /// # Errors
    /// [`ResolveError`] when a name, path or header refers to what the allocation does not have, or becomes invalid.
    pub fn resolve(&self, environment: &Environment, context: &AllocContext) -> Result<ResolvedService, ResolveError> {
        let name = self.name.render_strict("service name", environment)?;
        let mesh_case = self.connect.is_none() || !name.chars().any(char::is_uppercase);
        if !is_service_name(&name) || !mesh_case {
            return Err(ResolveError::Name { template: self.name.to_string(), name });
        }
        let port = self.port.as_ref().map(|port| inside(port, context)).transpose()?;
        let tags = texts(&self.tags, "tag", environment)?;
        let meta = map(&self.meta, "service meta", environment)?;
        let connect = match &self.connect {
            None => None,
            Some(block) => Some(ResolvedConnect {
                tags: match &block.sidecar.tags {
                    Some(own) => texts(own, "sidecar tag", environment)?,
                    None => tags.clone(),
                },
                meta: match block.sidecar.meta.is_empty() {
                    true => meta.clone(),
                    false => map(&block.sidecar.meta, "sidecar meta", environment)?,
                },
                local_service_port: block.sidecar.proxy.local_service_port.or(port),
                block: block.clone(),
            }),
        };
        let port_label = match &self.port {
            None => String::new(),
            Some(PortRef::Label(label)) => label.clone(),
            Some(PortRef::Number(number)) => number.to_string(),
        };
        let checks = self.checks.iter().map(|check| self.resolve_check(check, environment, context));
        Ok(ResolvedService { checks: checks.collect::<Result<_, _>>()?, name, port_label, port, tags, meta, connect })
    }

    fn resolve_check(
        &self,
        check: &Check,
        environment: &Environment,
        context: &AllocContext,
    ) -> Result<ResolvedCheck, ResolveError> {
        let name = check.name.render_strict("check name", environment)?;
        let port = check.port.as_ref().or(self.port.as_ref());
        let no_port = || ResolveError::NoPort { label: String::new() };
        Ok(ResolvedCheck {
            port: inside(port.ok_or_else(no_port)?, context)?,
            http: match &check.kind {
                CheckKind::Tcp => None,
                CheckKind::Http(http) => Some(http.resolve(&name, environment)?),
            },
            name,
            interval: check.interval,
            timeout: check.timeout,
            initial_status: check.initial_status,
            success_before_passing: check.success_before_passing,
            failures_before_critical: check.failures_before_critical,
            failures_before_warning: check.failures_before_warning,
        })
    }
}

impl HttpCheck {
    fn resolve(&self, check: &str, environment: &Environment) -> Result<ResolvedHttp, ResolveError> {
        let bad = |field, value: &str| ResolveError::Check { check: check.to_owned(), field, value: value.to_owned() };
        let path = self.path.render_strict("check path", environment)?;
        if path.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(bad("path", &path));
        }
        let mut headers = BTreeMap::new();
        for (name, values) in &self.headers {
            let values = texts(values, "check header", environment)?;
            if let Some(value) = values.iter().find(|value| value.chars().any(|c| c.is_control() && c != '\t')) {
                return Err(bad("header", value));
            }
            headers.insert(name.clone(), values);
        }
        let body = self.body.render_strict("check body", environment)?;
        Ok(ResolvedHttp { path, method: self.method.clone(), headers, body })
    }
}

/// The port inside the network namespace.
fn inside(port: &PortRef, context: &AllocContext) -> Result<u16, ResolveError> {
    match port {
        PortRef::Number(number) => Ok(*number),
        PortRef::Label(label) => {
            let binding = context.ports.get(label);
            binding.map(|binding| binding.inside).ok_or_else(|| ResolveError::NoPort { label: label.clone() })
        }
    }
}

fn texts(templates: &[Template], field: &'static str, environment: &Environment) -> Result<Vec<String>, TemplateError> {
    templates.iter().map(|template| template.render(field, environment)).collect()
}

fn map(
    templates: &BTreeMap<String, Template>,
    field: &'static str,
    environment: &Environment,
) -> Result<BTreeMap<String, String>, TemplateError> {
    templates.iter().map(|(key, value)| Ok((key.clone(), value.render(field, environment)?))).collect()
}
