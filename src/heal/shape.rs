//! What may be in the place of each file: a file that is not too long, or a link to one. Anything else (a folder, a
//! pipe, a device, a link to itself) would make its reader hang, run out of memory or fail, and is moved away. Must
//! never read any of it.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{Notes, aside::set_aside};
use crate::{
    pki::{
        CA_CERTIFICATE, CA_KEY, CLUSTER_KEY, CONSOLE_CERTIFICATE, CONSOLE_KEY, NEXT_CLUSTER_KEY, NODE_CERTIFICATE,
        NODE_KEY,
    },
    storage::membership,
};

const SMALL: u64 = 1 << 20;

/// Folders of the data folder that only this program writes to.
pub(super) const FOLDERS: [&str; 4] = ["certificates", "database", "rollback", super::FOLDER];
/// Keys and certificates.
const CERTIFICATES: [&str; 8] = [
    CA_CERTIFICATE,
    CA_KEY,
    NODE_CERTIFICATE,
    NODE_KEY,
    CONSOLE_CERTIFICATE,
    CONSOLE_KEY,
    CLUSTER_KEY,
    NEXT_CLUSTER_KEY,
];
/// The other files, and how long they may be in bytes.
const FILES: [(&str, u64); 10] = [
    ("identity.json", SMALL),
    (membership::FILE, SMALL),
    (membership::COPY, SMALL),
    (super::PROMISE, SMALL),
    ("join.json", SMALL),
    ("join-request.json", SMALL),
    ("events.jsonl", 64 * SMALL),
    ("events.jsonl.1", 64 * SMALL),
    ("database/console.checkpoint", SMALL),
    ("database/console.db", u64::MAX),
];

/// Moves away whatever is not of the kind that its name stands for.
pub(super) fn mend(data: &Path, notes: &mut Notes) -> Result<()> {
    for name in FOLDERS {
        // A link to a folder elsewhere is fine.
        move_away_if(data, name, notes, |found| (!found.is_dir()).then_some("it is not a folder"))?;
    }
    let file = |limit: u64| {
        move |found: &fs::Metadata| match found.is_file() {
            false => Some("it is not a file"),
            true => (found.len() > limit).then_some("it is far too long"),
        }
    };
    for (name, limit) in FILES {
        move_away_if(data, name, notes, file(limit))?;
    }
    for name in CERTIFICATES {
        move_away_if(data, &format!("certificates/{name}"), notes, file(SMALL))?;
    }
    Ok(())
}

fn move_away_if(
    data: &Path,
    name: &str,
    notes: &mut Notes,
    odd: impl Fn(&fs::Metadata) -> Option<&'static str>,
) -> Result<()> {
    let path = data.join(name);
    let why = match fs::metadata(&path) {
        Ok(found) => odd(&found),
        Err(error) if error.raw_os_error() == Some(nix::libc::ELOOP) => Some("it is a link that leads to itself"),
        // It is missing, perhaps at the end of a link, or may not be read. Its reader handles that.
        Err(_) => None,
    };
    let Some(why) = why else { return Ok(()) };
    let moved = set_aside(data, name).with_context(|| {
        format!("{} is damaged ({why}) and cannot be moved away: move it, and start again", path.display())
    })?;
    if let Some(to) = moved {
        notes.add(format!("{} was moved to {}: {why}", path.display(), to.display()));
    }
    Ok(())
}
