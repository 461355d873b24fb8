//! Entry of the administration tool.
fn main() {}
