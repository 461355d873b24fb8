//! The local administration socket: a Unix stream socket that speaks the HTTP API of the Console. Owns its limits, the
//! server in the daemon and the blocking client. Must never decide anything: the [`Routes`] decide what a request
//! means, and the permissions of the file who may send one (only its owner). For the audit, whoever the kernel names at
//! the other end is the one who acts.

mod client;
mod server;
#[cfg(test)]
mod tests;

use std::{io, os::unix::ffi::OsStrExt, path::Path, time::Duration};

pub use client::{Answer, Call, ControlError, ask, connect, send, status};
pub use server::{ControlSocket, Routes, refusal};

/// Name of the socket in the data folder.
pub const SOCKET_NAME: &str = "control.sock";
/// Largest body of a request, in bytes. Its head may be as long.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Largest body of an answer, in bytes: as much as one list of the API takes.
pub const MAX_REPLY: usize = 8 * 1024 * 1024;
/// Clients that are served at the same time. Further ones wait in the kernel's queue.
pub const MAX_CLIENTS: usize = 16;
/// Operations that run at the same time, including those whose clients are gone. Further ones are refused.
pub const MAX_OPERATIONS: usize = 4;
/// Longest time to read a request, or to write its answer.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time that a client waits for the outcome of an operation. The operation itself always runs to its end.
pub const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest path of a socket, in bytes: `sun_path` holds 108, of which one is the final zero (unix(7)).
const MAX_PATH: usize = 107;

/// Who is at the other end of the socket, according to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Number of the user (uid).
    pub uid: u32,
    /// The user's name on this host, or else `uid` and the number.
    pub name: String,
}

impl Peer {
    fn of(stream: &tokio::net::UnixStream) -> io::Result<Self> {
        let uid = stream.peer_cred()?.uid();
        // Not looked up for root, which has this name everywhere.
        let name = if uid == 0 { Some("root".to_owned()) } else { name_of(uid) };
        Ok(Self { uid, name: name.unwrap_or_else(|| format!("uid {uid}")) })
    }
}

fn name_of(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(uid.into()).ok().flatten().map(|user| user.name)
}

/// Why a host that waits to be admitted refuses every operation.
pub const NOT_JOINED: &str = "this host has not joined yet: run `twistcli ha apply` on the PRIMARY";

/// Why a host that waits for a pool refuses every operation.
pub const NOT_IN_A_POOL: &str = "this host waits for a pool: sign up at its Console's HTTPS port to make it the first member, \
     or run `twistcli clustered-db add` on a pool; `twistcli ha status` shows its fingerprint";

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
