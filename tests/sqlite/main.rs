//! The capture and replay of SQLite transactions against SQLite itself.

mod cases;
mod support;
mod workload;
