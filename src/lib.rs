//! The map of Twistlock HA.
//! (to be completed with the bird's-eye view, the glossary and the Architecture Invariants)
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cluster;
pub mod config;
pub mod console;
pub mod control;
pub mod node;
pub mod peer;
pub mod pki;
pub mod storage;
pub mod supervisor;
pub mod telemetry;
pub mod workload;

pub mod cli;
