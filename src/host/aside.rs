//! Sets a data folder aside. Must never delete anything, and must never leave an identity beside the rest of its data.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use super::voice::{EX_CANTCREAT, Failure, Voice};

/// Why a folder is set aside. Its new name says so.
#[derive(Clone, Copy)]
pub(super) enum Why {
    /// By the flag `-f`.
    Dropped,
    /// The node was removed from its cluster, or is of another.
    Removed,
}

impl Why {
    fn mark(self) -> &'static str {
        match self {
            Self::Dropped => ".dropped-",
            Self::Removed => ".removed-",
        }
    }
}

/// The present time, as it stands in names.
pub(super) fn stamp() -> String {
    jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// What is in a folder, except what every new file system has, and what was set aside.
pub(super) fn contents(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let aside = |name: &str| [Why::Dropped, Why::Removed].iter().any(|why| name.contains(why.mark()));
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name != "lost+found" && !aside(&name) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Sets the folder aside, if it is there and not empty, and says its new name.
pub(super) fn set(data: &Path, why: Why, voice: &Voice) -> Result<(), Failure> {
    if !data.is_dir() || contents(data).map_err(Failure::write(data))?.is_empty() {
        return Ok(());
    }
    let mut name = data.file_name().map(OsString::from).unwrap_or_default();
    name.push(format!("{}{}", why.mark(), stamp()));
    let inside = cannot_be_renamed(data);
    // No node looks into a folder that it does not know by name.
    let mut aside = if inside { data.join(&name) } else { data.with_file_name(&name) };
    if aside.exists() {
        name.push(format!("-{}", std::process::id()));
        aside.set_file_name(&name);
    }
    let moved = if inside { move_contents(data, &aside) } else { fs::rename(data, &aside) };
    moved.map_err(|error| {
        Failure::new(
            EX_CANTCREAT,
            format!("what is in {} cannot be moved to {}: {error}", data.display(), aside.display()),
        )
    })?;
    let (what, shown) = match why {
        Why::Dropped => ("The existing database is out of use. It", aside.display()),
        Why::Removed => ("The old data of this host", aside.display()),
    };
    voice.say(&format!("{what} was set aside, not deleted: {shown}"));
    Ok(())
}

/// True if a file system begins at the folder, or it is a link to one elsewhere.
fn cannot_be_renamed(folder: &Path) -> bool {
    let link = fs::symlink_metadata(folder).is_ok_and(|found| found.is_symlink());
    let Ok(real) = fs::canonicalize(folder) else { return link };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    link || mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| unescaped(point) == real)
}

/// A path of the kernel's table, in which blanks and backslashes are octal numbers.
fn unescaped(text: &str) -> PathBuf {
    let mut out = text.to_owned();
    for (code, letter) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        out = out.replace(code, letter);
    }
    out.into()
}

/// Moves what is in a data folder. The identity goes first: without it, nothing starts from the rest.
fn move_contents(data: &Path, aside: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(aside)?;
    let mut all = contents(data)?;
    all.sort_by_key(|path| path.file_name().is_none_or(|name| name != "identity.json"));
    all.iter().try_for_each(|path| fs::rename(path, aside.join(path.file_name().unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_renamed_and_a_link_is_emptied() {
        let root = tempfile::tempdir().unwrap();
        let (data, link) = (root.path().join("tw"), root.path().join("link"));
        let fill = || {
            fs::create_dir_all(data.join("lost+found")).unwrap();
            fs::write(data.join("identity.json"), "{}").unwrap();
            fs::write(data.join(".hidden"), "").unwrap();
        };
        let voice = Voice::silent();
        fill();
        set(&data, Why::Dropped, &voice).unwrap();
        assert!(!data.exists());
        set(&data, Why::Dropped, &voice).unwrap();

        fill();
        std::os::unix::fs::symlink(&data, &link).unwrap();
        set(&link, Why::Removed, &voice).unwrap();
        set(&link, Why::Removed, &voice).unwrap();
        let kept: Vec<_> = fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(kept.len(), 2, "{kept:?}");
        let aside = kept.iter().find(|path| path.to_string_lossy().contains("link.removed-")).unwrap();
        assert!(aside.join("identity.json").exists() && aside.join(".hidden").exists());
        assert!(contents(&data).unwrap().is_empty());
    }
}
