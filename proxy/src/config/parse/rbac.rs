//! RBAC rules.

use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule;
use envoy_types::pb::envoy::config::rbac::v3::principal::{Authenticated, Identifier};
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::envoy::config::rbac::v3::{
    Permission as PbPermission, Policy as PbPolicy, Principal as PbPrincipal, Rbac as PbRbac,
};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as RbacFilter;

use super::error::{Path, ResourceError};
use super::matcher::string_matcher;
use super::refuse;
use crate::rbac::{Cidr, Permission, Policy, Principal, Rbac, RbacAction};

/// Most policies, permissions and principals of one filter, counted together.
pub const MAX_RBAC_RULES: usize = 100_000;
/// How deep permissions and principals may be nested.
pub const MAX_RBAC_DEPTH: usize = 16;

/// Reads a network RBAC filter. `None`: it has no rules to enforce, and lets everything pass.
pub(super) fn filter(filter: RbacFilter, path: &Path<'_>) -> Result<Option<Rbac>, ResourceError> {
    let RbacFilter {
        rules,
        matcher,
        shadow_rules: _,             // counted by Envoy, never enforced
        shadow_matcher: _,           // likewise
        shadow_rules_stat_prefix: _, // statistics
        stat_prefix: _,              // statistics
        enforcement_type,
        delay_deny,
    } = filter;
    refuse!(path; matcher, enforcement_type, delay_deny);
    rules.map(|rules| rbac(rules, &path.field("rules"))).transpose()
}

fn rbac(rules: PbRbac, path: &Path<'_>) -> Result<Rbac, ResourceError> {
    let PbRbac { action, policies, audit_logging_options } = rules;
    refuse!(path; audit_logging_options);
    let action = match Action::try_from(action) {
        Ok(Action::Allow) => RbacAction::Allow,
        Ok(Action::Deny) => RbacAction::Deny,
        Ok(Action::Log) => return Err(path.field("action").unsupported()),
        Err(_) => return Err(path.field("action").invalid(format!("unknown action {action}"))),
    };
    let mut budget = Budget(MAX_RBAC_RULES);
    let mut parsed = Vec::with_capacity(policies.len().min(MAX_RBAC_RULES));
    for (name, policy) in policies {
        let field = format!("policies[{name}]");
        parsed.push(self::policy(name, policy, &path.field(&field), &mut budget)?);
    }
    parsed.sort_by(|a, b| a.name.cmp(&b.name)); // a map: Envoy looks at it in the order of names
    Ok(Rbac { action, policies: parsed })
}

fn policy(name: String, policy: PbPolicy, path: &Path<'_>, budget: &mut Budget) -> Result<Policy, ResourceError> {
    budget.spend(path)?;
    let PbPolicy { permissions, principals, condition, checked_condition, cel_config } = policy;
    refuse!(path; condition, checked_condition, cel_config);
    let permissions = all(permissions, "permissions", path, |one, path| permission(one, path, budget, 0))?;
    let principals = all(principals, "principals", path, |one, path| principal(one, path, budget, 0))?;
    Ok(Policy { name: Arc::from(name), permissions, principals })
}

fn permission(
    permission: PbPermission,
    path: &Path<'_>,
    budget: &mut Budget,
    depth: usize,
) -> Result<Permission, ResourceError> {
    budget.spend(path)?;
    let depth = deeper(depth, path)?;
    let mut nested = |name: &'static str, rules| {
        let path = path.field(name);
        all(rules, "rules", &path, |one, path| self::permission(one, path, budget, depth))
    };
    let unsupported = |name: &str| Err(path.field(name).unsupported());
    #[expect(deprecated, reason = "old kinds are looked at in order to refuse them")]
    match permission.rule {
        Some(Rule::Any(any)) => always(any, path).map(|()| Permission::Any),
        Some(Rule::AndRules(set)) => nested("and_rules", set.rules).map(Permission::And),
        Some(Rule::OrRules(set)) => nested("or_rules", set.rules).map(Permission::Or),
        Some(Rule::NotRule(other)) => {
            let other = self::permission(*other, &path.field("not_rule"), budget, depth)?;
            Ok(Permission::Not(Box::new(other)))
        }
        Some(Rule::DestinationPort(port)) => {
            let port = port_number(i64::from(port), &path.field("destination_port"))?;
            Ok(Permission::DestinationPort(port..=port))
        }
        Some(Rule::DestinationPortRange(range)) => {
            let path = path.field("destination_port_range");
            let start = port_number(i64::from(range.start), &path.field("start"))?;
            let last = port_number(i64::from(range.end) - 1, &path.field("end"))?; // `end` is exclusive
            if start > last {
                return Err(path.invalid("empty range"));
            }
            Ok(Permission::DestinationPort(start..=last))
        }
        Some(Rule::DestinationIp(range)) => cidr(&range, &path.field("destination_ip")).map(Permission::DestinationIp),
        Some(Rule::Header(_)) => unsupported("header"),
        Some(Rule::UrlPath(_)) => unsupported("url_path"),
        Some(Rule::Metadata(_)) => unsupported("metadata"),
        Some(Rule::RequestedServerName(_)) => unsupported("requested_server_name"),
        Some(Rule::Matcher(_)) => unsupported("matcher"),
        Some(Rule::UriTemplate(_)) => unsupported("uri_template"),
        Some(Rule::SourcedMetadata(_)) => unsupported("sourced_metadata"),
        None => Err(path.missing()),
    }
}

fn principal(
    principal: PbPrincipal,
    path: &Path<'_>,
    budget: &mut Budget,
    depth: usize,
) -> Result<Principal, ResourceError> {
    budget.spend(path)?;
    let depth = deeper(depth, path)?;
    let mut nested = |name: &'static str, ids| {
        let path = path.field(name);
        all(ids, "ids", &path, |one, path| self::principal(one, path, budget, depth))
    };
    let unsupported = |name: &str| Err(path.field(name).unsupported());
    let source = |name: &str, range: &CidrRange| cidr(range, &path.field(name)).map(Principal::SourceIp);
    #[expect(deprecated, reason = "source_ip is what older control planes send")]
    match principal.identifier {
        Some(Identifier::Any(any)) => always(any, path).map(|()| Principal::Any),
        Some(Identifier::AndIds(set)) => nested("and_ids", set.ids).map(Principal::And),
        Some(Identifier::OrIds(set)) => nested("or_ids", set.ids).map(Principal::Or),
        Some(Identifier::NotId(other)) => {
            let other = self::principal(*other, &path.field("not_id"), budget, depth)?;
            Ok(Principal::Not(Box::new(other)))
        }
        Some(Identifier::Authenticated(Authenticated { principal_name })) => {
            let path = path.field("authenticated");
            let path = path.field("principal_name");
            principal_name.map(|name| string_matcher(name, &path)).transpose().map(Principal::Authenticated)
        }
        Some(Identifier::SourceIp(range)) => source("source_ip", &range),
        Some(Identifier::DirectRemoteIp(range)) => source("direct_remote_ip", &range),
        Some(Identifier::RemoteIp(range)) => source("remote_ip", &range),
        Some(Identifier::Header(_)) => unsupported("header"),
        Some(Identifier::UrlPath(_)) => unsupported("url_path"),
        Some(Identifier::Metadata(_)) => unsupported("metadata"),
        Some(Identifier::FilterState(_)) => unsupported("filter_state"),
        Some(Identifier::SourcedMetadata(_)) => unsupported("sourced_metadata"),
        Some(Identifier::Custom(_)) => unsupported("custom"),
        None => Err(path.missing()),
    }
}

/// How many rules may still come.
struct Budget(usize);

impl Budget {
    fn spend(&mut self, path: &Path<'_>) -> Result<(), ResourceError> {
        self.0 = self.0.checked_sub(1).ok_or_else(|| path.too_many("rules", MAX_RBAC_RULES))?;
        Ok(())
    }
}

/// Reads a list that must not be empty: an empty one is a mistake (and invalid for Envoy), not "nobody".
fn all<P, T>(
    list: Vec<P>,
    name: &'static str,
    path: &Path<'_>,
    mut read: impl FnMut(P, &Path<'_>) -> Result<T, ResourceError>,
) -> Result<Vec<T>, ResourceError> {
    if list.is_empty() {
        return Err(path.field(name).missing());
    }
    list.into_iter().enumerate().map(|(index, one)| read(one, &path.item(name, index))).collect()
}

fn deeper(depth: usize, path: &Path<'_>) -> Result<usize, ResourceError> {
    if depth == MAX_RBAC_DEPTH { Err(path.too_many("levels", MAX_RBAC_DEPTH)) } else { Ok(depth + 1) }
}

/// `any` may only be true: so says the API.
fn always(any: bool, path: &Path<'_>) -> Result<(), ResourceError> {
    if any { Ok(()) } else { Err(path.field("any").invalid("must be true")) }
}

fn port_number(port: i64, path: &Path<'_>) -> Result<u16, ResourceError> {
    u16::try_from(port).map_err(|_| path.invalid(format!("{port} is not a port")))
}

fn cidr(range: &CidrRange, path: &Path<'_>) -> Result<Cidr, ResourceError> {
    let address: IpAddr =
        range.address_prefix.parse().map_err(|_| path.field("address_prefix").invalid("not an IP address"))?;
    let length = range.prefix_len.map_or(0, |length| length.value); // absent is zero: so says the API
    Cidr::new(address, length).ok_or_else(|| path.field("prefix_len").invalid(format!("{length} bits are too many")))
}
