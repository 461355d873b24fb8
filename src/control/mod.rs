//! The local administration socket: a Unix stream socket that speaks the HTTP API of the Console. Owns its limits, the
//! server side in the daemon and the blocking client. Must never decide anything: what a request means is up to the
//! [`Routes`], and who may ask is up to the file permissions (owner only). Whom the kernel names at the other end is
//! who acts, for the audit.

mod client;
mod server;
#[cfg(test)]
mod tests;

use std::{io, os::unix::ffi::OsStrExt, path::Path, time::Duration};

pub use client::{Answer, Call, ControlError, ask, connect, send, status};
pub use server::{ControlSocket, Routes, refusal};

/// Name of the socket in the data folder.
pub const SOCKET_NAME: &str = "control.sock";
/// Largest body of a request in bytes; its head may be as long.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Largest body of an answer in bytes: as much as the API gives in one list.
pub const MAX_REPLY: usize = 8 * 1024 * 1024;
/// Clients served at the same time; further ones wait in the kernel's queue.
pub const MAX_CLIENTS: usize = 16;
/// Operations carried out at the same time, those included whose clients have gone; further ones are refused.
pub const MAX_OPERATIONS: usize = 4;
/// Longest time for one step of a conversation: reading a request or writing its answer.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time that a client waits for the outcome of an operation. The operation itself is never cut off half-way.
pub const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// `sun_path` of Linux holds 108 bytes, one of them the closing zero (unix(7)).
const MAX_PATH: usize = 107;

/// Who is at the other end of the socket, as the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Number of the user.
    pub uid: u32,
    /// Its name on this host, or its number.
    pub name: String,
}

impl Peer {
    fn of(stream: &tokio::net::UnixStream) -> io::Result<Self> {
        let uid = stream.peer_cred()?.uid();
        // Looked up only for who is not root, which is named so everywhere.
        let name = if uid == 0 { Some("root".to_owned()) } else { name_of(uid) };
        Ok(Self { uid, name: name.unwrap_or_else(|| format!("uid {uid}")) })
    }
}

fn name_of(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| user.name)
}

/// Why a host that waits for its admission refuses every operation.
pub const NOT_JOINED: &str = "this host has not joined yet: run `twistcli ha apply` on the PRIMARY";

fn check_path(path: &Path) -> io::Result<()> {
    let length = path.as_os_str().as_bytes().len();
    if length <= MAX_PATH {
        return Ok(());
    }
    let text = format!(
        "control socket path {} has {length} bytes, the kernel allows {MAX_PATH}: choose a shorter folder",
        path.display()
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}
