//! DRIVES. The one loop: inputs -> cluster -> persist -> send -> apply -> status.
pub mod lease;
pub mod status;
pub use lease::Lease;
pub use status::{MemberStatus, Status};
