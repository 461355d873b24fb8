//! The capture and replay of SQLite transactions against SQLite itself.

mod cases;
mod replaced;
mod resting;
mod served;
#[allow(unsafe_code, reason = "blob I/O and the error codes of SQLite are reached through its C interface")]
mod support;
mod two;
mod workload;
