//! Nomad's job language: text in, a checked [`Job`] out.
//!
//! This crate owns the language (HCL2, `variable`, `locals`, functions), the shape of a job, its validation with
//! positions, the environment of a task, and the difference that `plan` shows. It is pure: no file, clock, socket or
//! environment variable is read here; what depends on the node arrives in an [`AllocContext`].
//!
//! Flow: [`parse`] → [`check_runnable`] → per allocation [`Environment::of_task`] and [`Environment::of_group`] →
//! [`Template::render`]. A word that Nomad knows and culvert does not honour is refused by name, never ignored.
#![forbid(unsafe_code)]

mod decode;
mod diagnostics;
mod diff;
mod duration;
mod environment;
mod hcl;
mod model;
mod parse;
mod references;
mod sidecar;
mod template;
mod validate;

pub use decode::{MAX_COUNT, MAX_KILL_TIMEOUT, MAX_NAME};
pub use diagnostics::{Diagnostic, Diagnostics, Location, MAX_DIAGNOSTICS, MAX_SNIPPET};
pub use diff::{Change, DiffKind, FieldDiff, GroupDiff, JobDiff, ObjectDiff, TaskDiff, Updates, diff, group_change};
pub use duration::{format_go_duration, parse_go_duration};
pub use environment::{
    AllocContext, Environment, EnvironmentError, MAX_VALUE, NodeContext, PortBinding, TaskDirs, clean_name,
};
pub use model::*;
pub use parse::{MAX_SOURCE, check_runnable, parse};
pub use sidecar::{SIDECAR_DRIVER, Sidecar};
pub use template::{Part, Template, TemplateError};
