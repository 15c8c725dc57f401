//! From HCL blocks to the model: one file per kind of block, each with its schema.

mod closest;
mod connect;
mod job;
mod reader;
mod service;
mod task;
mod variables;

pub(crate) use closest::closest;
pub(crate) use job::decode_job;
pub use job::{MAX_COUNT, MAX_NAME};
pub(crate) use reader::header;
pub use task::MAX_KILL_TIMEOUT;
pub(crate) use variables::{evaluate_locals, evaluate_variables};
