//! The node agent: runs jobs, owns this node's workloads and kernel programs, feeds the worker, serves the control plane.

#![deny(unsafe_code)]

pub mod datapath;
pub mod events;
pub mod lock;
pub mod sys;
pub mod task;
pub mod workload;
pub mod config;
mod report;
pub mod worker;
