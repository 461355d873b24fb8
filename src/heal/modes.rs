//! Access to the data folder: only for the user that this program runs as. Corrects what is too open, and logs one line
//! about it. Must never follow a link out of the folder, even one that is made meanwhile, and never touch files that
//! are not ours: each file is opened without following links, and changed through what was opened.

use std::{
    fs::{self, File, Metadata, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use nix::{
    libc::{O_DIRECTORY, O_NOFOLLOW, O_PATH},
    unistd::{Uid, User, geteuid},
};
use tracing::warn;

use crate::pki::{CA_CERTIFICATE, CONSOLE_CERTIFICATE, CUSTOM_FOLDER, NODE_CERTIFICATE};

/// Files and folders to look at, at most.
const MAX_LOOKED_AT: usize = 10_000;
/// Names in the logged line, at most.
const MAX_NAMED: usize = 8;
/// How the names of our files in the data folder begin. Anything else belongs to somebody else, such as `lost+found`.
const OURS: [&str; 20] = [
    "identity.json",
    "membership.json",
    "promise-ms",
    "raft-log",
    "memory.json",
    "forgotten",
    "set-aside",
    "lock",
    "events.jsonl",
    "join.json",
    "join-request.json",
    "recover.json",
    "recover-new",
    "before-recover-",
    "snapshot.",
    "certificates",
    "custom-certificates",
    "database",
    "rollback",
    super::FOLDER,
];
/// How deep to look into folders of the data folder. Only what a recovery has set aside is that deep.
const DEPTH: usize = 3;

struct Walk {
    data: PathBuf,
    /// The user who should own everything.
    owner: u32,
    me: Uid,
    left: usize,
    changed: Vec<String>,
    /// The first thing that cannot be corrected, and why not.
    refused: Option<String>,
}

/// Takes away rights of other users in the data folder, and gives this program those that it needs.
///
/// # Errors
/// When something is too open, or belongs to another user, and cannot be corrected: one line with the command to type.
pub(super) fn tighten(data: &Path) -> Result<()> {
    let Ok(folder) = open(data, O_DIRECTORY) else { return Ok(()) }; // the next one to open it reports why
    let Ok(found) = folder.metadata() else { return Ok(()) };
    let me = geteuid();
    // As root, keep the owner of the folder.
    let owner = if me.is_root() { found.uid() } else { me.as_raw() };
    let mut walk = Walk { data: data.to_owned(), owner, me, left: MAX_LOOKED_AT, changed: Vec::new(), refused: None };
    // Others may list the names in it: that does no harm, and the administrator may want it.
    walk.settle(&folder, &found, Path::new("."), 0o022);
    walk.folder(&folder, Path::new(""), 0);
    if !walk.changed.is_empty() {
        let more = walk.changed.len().saturating_sub(MAX_NAMED);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        let named = &walk.changed[..walk.changed.len().min(MAX_NAMED)];
        warn!(
            "other users could access what is in {}, which was corrected: {}{rest}",
            data.display(),
            named.join(", ")
        );
    }
    match walk.refused {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

/// Opens a name only to look at it and to change its mode and owner.
fn open(path: &Path, flags: i32) -> io::Result<File> {
    File::options().read(true).custom_flags(O_PATH | flags).open(path)
}

/// A path to an open file. No link can redirect it.
fn opened(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The rights that other users must not have on a file or folder of this name, as mode bits.
fn forbidden(name: &Path, folder: bool) -> u32 {
    let file = name.file_name().and_then(|file| file.to_str()).unwrap_or_default();
    // The same name with a suffix is one that is about to replace it, or that was set aside.
    let is = |public: &str| file.strip_prefix(public).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let public = [CA_CERTIFICATE, NODE_CERTIFICATE, CONSOLE_CERTIFICATE].into_iter().any(is);
    let inside = name.parent().and_then(Path::to_str).unwrap_or_default();
    match (folder, inside) {
        // An administrator puts files there.
        (true, _) if name == Path::new(CUSTOM_FOLDER) => 0o022,
        (true, _) => 0o077,
        (false, "certificates" | CUSTOM_FOLDER) if !public => 0o077,
        (false, "") => 0o077,
        // Other users cannot open the folders of these.
        _ => 0o022,
    }
}

impl Walk {
    fn folder(&mut self, folder: &File, name: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(opened(folder)) else { return };
        for entry in entries.flatten() {
            let file = entry.file_name();
            let known = file.to_str().is_some_and(|file| OURS.iter().any(|ours| file.starts_with(ours)));
            if depth == 0 && !known {
                continue;
            }
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            let name = name.join(&file);
            let Ok(child) = open(&opened(folder).join(&file), O_NOFOLLOW) else { continue };
            let Ok(found) = child.metadata() else { continue };
            if found.is_file() || found.is_dir() {
                self.settle(&child, &found, &name, forbidden(&name, found.is_dir()));
            }
            if found.is_dir() && depth < DEPTH {
                self.folder(&child, &name, depth + 1);
            }
        }
    }

    /// Corrects mode and owner of an open file or folder.
    fn settle(&mut self, file: &File, found: &Metadata, name: &Path, forbidden: u32) {
        let theirs = name.starts_with(CUSTOM_FOLDER);
        if found.uid() != self.owner && !theirs {
            let done = if self.me.is_root() { chown(opened(file), Some(self.owner), None) } else { Err(not_ours()) };
            self.note(done, name, &format!("owner {}", user(found.uid())));
        }
        let mode = found.mode() & 0o7777;
        let needed = if found.is_dir() { 0o700 } else { 0o600 };
        let wanted = (mode & !forbidden) | if theirs { 0 } else { needed };
        if wanted == mode {
            return;
        }
        let done = fs::set_permissions(opened(file), Permissions::from_mode(wanted));
        match done {
            // Its owner has to correct it. Whether it can be used is checked elsewhere.
            Err(error) if theirs => warn!(%error, mode = format!("{mode:o}"), "{} is too open", name.display()),
            done => self.note(done, name, &format!("mode {mode:o}")),
        }
    }

    fn note(&mut self, done: io::Result<()>, name: &Path, what: &str) {
        match done {
            Ok(()) => self.changed.push(format!("{} ({what})", name.display())),
            Err(error) => {
                let path = if name == Path::new(".") { self.data.clone() } else { self.data.join(name) };
                let (me, data) = (user(self.me.as_raw()), self.data.display());
                self.refused.get_or_insert_with(|| {
                    format!(
                        "{} has the {what}, and this program, which runs as {me}, cannot change that ({error}): run `chown -R {me} \
                         {data} && chmod -R go= {data}` as root, and start again",
                        path.display()
                    )
                });
            }
        }
    }
}

fn not_ours() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EPERM)
}

fn user(id: u32) -> String {
    User::from_uid(Uid::from_raw(id)).ok().flatten().map_or_else(|| id.to_string(), |user| user.name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::heal::shape;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn put(path: &Path, bits: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
        fs::set_permissions(path, Permissions::from_mode(bits)).unwrap();
    }

    #[test]
    fn what_is_too_open_is_closed_and_nothing_else_is_touched() {
        let root = tempfile::tempdir().unwrap();
        let (outside, data) = (root.path().join("outside"), root.path().join("data"));
        put(&outside, 0o666);
        let samples = [
            ("identity.json", 0o644, 0o600),
            ("memory.json", 0o644, 0o600),
            ("forgotten.json", 0o666, 0o600),
            ("lock", 0o666, 0o600),
            ("certificates/node-key.pem", 0o666, 0o600),
            ("certificates/node.pem", 0o666, 0o644),
            ("certificates/console-cert.pem.new", 0o644, 0o644),
            ("certificates/console-key.pem.new", 0o644, 0o600),
            ("certificates/cluster.key", 0o000, 0o600),
            ("custom-certificates/console-key.pem", 0o640, 0o600),
            ("custom-certificates/console-cert.pem", 0o444, 0o444),
            ("database/console.db", 0o666, 0o644),
            ("raft-log/segment-0000000000000001", 0o600, 0o600),
            ("set-aside/1/segment-0000000000000001", 0o666, 0o644),
            ("lost+found/anything", 0o666, 0o666),
            ("theirs", 0o666, 0o666),
        ];
        for (name, before, _) in samples {
            put(&data.join(name), before);
        }
        for link in ["membership.json", "certificates/ca.pem", "rollback"] {
            symlink(&outside, data.join(link)).unwrap();
        }
        for folder in ["", "certificates", "custom-certificates", "set-aside"] {
            fs::set_permissions(data.join(folder), Permissions::from_mode(0o777)).unwrap();
        }
        // The data folder itself may be a link.
        let link = root.path().join("link");
        symlink(&data, &link).unwrap();
        tighten(&link).unwrap();
        for (name, _, after) in samples {
            assert_eq!(mode(&data.join(name)), after, "{name}");
        }
        assert_eq!(mode(&outside), 0o666, "no link is followed");
        assert_eq!((mode(&data), mode(&data.join("certificates"))), (0o755, 0o700));
        assert_eq!(mode(&data.join("set-aside")), 0o700);
        assert_eq!(mode(&data.join("custom-certificates")), 0o755);
        tighten(&data).unwrap();
        tighten(Path::new("/nowhere")).unwrap();
    }

    #[test]
    fn the_work_is_bounded() {
        let data = tempfile::tempdir().unwrap();
        let deep = data.path().join("rollback/a/b/c/d/e");
        fs::create_dir_all(&deep).unwrap();
        fs::set_permissions(&deep, Permissions::from_mode(0o777)).unwrap();
        tighten(data.path()).unwrap();
        assert_eq!(mode(&deep), 0o777);
        assert_eq!(shape::FOLDERS.iter().filter(|name| !OURS.contains(name)).count(), 0);
    }
}
