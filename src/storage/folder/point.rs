//! The mount point of a service's folder on this host: an empty file system that takes no writes lies on it, and the
//! folder on top of that while it is served. So a service that somebody starts by hand where this node is not PRIMARY
//! gets an error, and founds no second database. Removes what killed processes have left there. Must never hide files
//! that somebody has put there, nor look below what is mounted.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::NAME;
use crate::storage::folder_of;

/// What the empty file system is called in `/proc/mounts`.
const COVER: &str = "twistlock-cover";
/// How often something is taken away from a mount point, at most.
const MOST_MOUNTS: usize = 64;

/// A mount point that is covered, until this is dropped.
#[derive(Debug)]
pub struct MountPoint {
    path: PathBuf,
}

impl MountPoint {
    /// Takes away what an earlier process has left there, makes the folder if it is missing, and covers it.
    ///
    /// # Errors
    /// When it cannot be made, has files of its own, is served by another process, or nothing can be mounted.
    pub fn take(path: &Path) -> io::Result<Self> {
        clear(path)?;
        fs::create_dir_all(path)?;
        if let Some(found) = fs::read_dir(path)?.next().transpose()? {
            let name = found.file_name();
            return Err(io::Error::other(format!(
                "{} has files of its own ({}), which a mount would hide: move them elsewhere, and copy them back into it once \
                 the service's folder is served there",
                path.display(),
                name.display()
            )));
        }
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount(COVER, path, "tmpfs", flags, c"mode=0555,size=4k,nr_inodes=1").map_err(|error| {
            io::Error::other(format!(
                "cannot mount on {}: {}; it needs CAP_SYS_ADMIN",
                path.display(),
                io::Error::from(error)
            ))
        })?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        if let Err(error) = clear(&self.path) {
            tracing::warn!("cannot uncover {}: {error}", self.path.display());
        }
    }
}

/// Takes away what is ours on a mount point.
fn clear(path: &Path) -> io::Result<()> {
    for _ in 0..MOST_MOUNTS {
        match on(path, &fs::read("/proc/self/mountinfo")?)? {
            None => return Ok(()),
            Some(source) if source == COVER => {}
            // A folder that nobody serves any more says so; the call would wait for one whose server hangs.
            Some(source) if source == NAME => match fs::symlink_metadata(path) {
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOTCONN) => {}
                _ => return Err(io::Error::other(format!("another process serves {}", path.display()))),
            },
            Some(source) => {
                let why = format!("{} is a mount point of something else ({source})", path.display());
                return Err(io::Error::other(why));
            }
        }
        unmount(path, UnmountFlags::DETACH)?;
    }
    Err(io::Error::other(format!("{} has too many mounts", path.display())))
}

/// What was mounted last on a path, by its source.
fn on(path: &Path, mounts: &[u8]) -> io::Result<Option<String>> {
    let Some(name) = path.file_name() else { return Ok(Some("/".to_owned())) };
    // Nothing asks the file system that is mounted there, which may be dead.
    let around = match fs::canonicalize(folder_of(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        around => around?,
    };
    let wanted = around.join(name);
    let mut found = None;
    for line in mounts.split(|byte| *byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let end = fields.iter().position(|field| *field == b"-");
        let (Some(point), Some(source)) = (fields.get(4), end.and_then(|end| fields.get(end + 2))) else { continue };
        if plain(point) == wanted.as_os_str() {
            found = Some(plain(source).to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// A field of `/proc/self/mountinfo`, where blanks and the like are three octal digits.
fn plain(field: &[u8]) -> OsString {
    let (mut out, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit));
        let value = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(value.unwrap_or(*first));
        rest = if value.is_some() { &behind[3..] } else { behind };
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn the_last_mount_of_a_path_is_found_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let around = fs::canonicalize(folder.path()).unwrap();
        let path = around.join("a b");
        let line = |point: &Path, source: &str| {
            let point = String::from_utf8(point.as_os_str().as_bytes().to_vec()).unwrap().replace(' ', "\\040");
            format!("29 1 0:26 / {point} rw,nosuid shared:7 master:1 - tmpfs {source} rw\n")
        };
        let two = [line(&path, COVER), line(&around, "other"), line(&path, NAME)].concat();
        assert_eq!(on(&path, two.as_bytes()).unwrap().as_deref(), Some(NAME));
        assert_eq!(on(&path, line(&around, COVER).as_bytes()).unwrap(), None);
        assert_eq!(on(&path.join("below").join("x"), two.as_bytes()).unwrap(), None);
        assert_eq!(plain(b"a\\040b\\134\\9"), OsString::from("a b\\\\9"));
    }
}
