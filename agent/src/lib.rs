//! The node agent: runs jobs, owns this node's workloads and kernel programs, feeds the worker, serves the control plane.

#![deny(unsafe_code)]

pub mod cli;
pub mod config;
pub mod datapath;
pub mod events;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod lock;
mod metrics;
pub mod node;
pub mod policy;
mod report;
mod routes;
pub mod runner;
mod sys;
pub mod task;
pub mod worker;
pub mod workload;
