//! LOOKS AFTER the certificates of this node, each by a task that lives as long as the node: its own is renewed in
//! time, the Console's follows names, uploads and the folder of the host, what ends is told, and what all members share
//! is replaced step by step. Must never change anything because an administrator asks: [`crate::admin`] checks that,
//! and the membership says it.

pub mod console_tls;
mod custom_folder;
mod expiry;
pub(crate) mod given;
pub mod renewal;
pub mod rotation;
