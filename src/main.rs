//! Daemon entry.
fn main() {}
