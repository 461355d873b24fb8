//! DECIDES. The consensus core: pure, no tokio, no sockets, no files, no clock.
pub mod command;
pub mod membership;
pub mod role;

pub use membership::{ClusterId, Member, Membership, NodeId};
pub use role::Role;
