//! What an installation puts on the disk of a host: user, folders, programs, settings, unit. Each target is the old
//! file or the new one at every instant, and each step may be done again. Must never take over a folder of others.

use std::{
    fs, io,
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown},
    path::{Path, PathBuf},
};

use nix::unistd::{Gid, Group, Uid, User};

use super::{
    aside,
    place::{Place, RUN_USER, UNIT, low_port, own_user},
    voice::{EX_CANTCREAT, EX_NOINPUT, EX_NOPERM, Failure, Voice},
};
use crate::config::Config;

/// The id that the original gave to the user of its Console.
const RUN_ID: u32 = 2674;
/// The programs of an installation.
pub(super) const PROGRAMS: [&str; 3] = [FOR_OTHERS, "twistcli", "twistlockd"];
/// The one of them that this host gives out and does not need itself.
pub(super) const FOR_OTHERS: &str = "defender";
/// The unit, as it is installed.
const UNIT_TEXT: &str = include_str!("../../packaging/twistlockd.service");
/// The folders that the unit lets the node write to in any case.
const UNIT_FOLDERS: [&str; 2] = ["/var/lib/twistlock", "/var/lib/twistlock-backup"];

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Failure::write(path)(error)),
        _ => Ok(()),
    }
}

/// Makes the folder of a file, open to others as far as `mode` says.
pub(super) fn folder(file: &Path, mode: u32) -> Result<(), Failure> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new().recursive(true).mode(mode).create(folder).map_err(Failure::write(folder))
}

fn beside(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Writes a file and gives it to a group that may read it.
pub(super) fn place(target: &Path, mode: u32, text: &[u8], owner: Option<(u32, u32)>) -> Result<(), Failure> {
    let new = beside(target);
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        io::Write::write_all(&mut file, text)?;
        if let Some((user, group)) = owner {
            chown(&new, Some(user), Some(group))?;
        }
        file.sync_all()?;
        fs::rename(&new, target)
    };
    folder(target, 0o755)?;
    write().map_err(Failure::write(target))
}

/// Copies a program; with `take`, it is moved, for which both must be on one file system.
pub(super) fn program(source: &Path, target: &Path, take: bool) -> Result<(), Failure> {
    let new = beside(target);
    let write = || {
        let _ = fs::remove_file(&new); // what an earlier attempt has left
        if take {
            fs::rename(source, &new)?;
            chown(&new, Some(Uid::effective().as_raw()), Some(Gid::effective().as_raw()))?;
        } else {
            fs::copy(source, &new)?;
        }
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, target)?;
        // Renaming one of two names of the same file onto the other does nothing.
        fs::remove_file(&new).or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
    };
    folder(target, 0o755)?;
    write().map_err(Failure::write(target))
}

/// Installs the programs; one that an earlier run has moved already may be missing, and so may the one that other hosts
/// fetch to become Defenders.
pub(super) fn programs(from: &Path, place: &Place, take: bool) -> Result<(), Failure> {
    let bin = place.bin();
    if fs::canonicalize(from).ok() == fs::canonicalize(&bin).ok() {
        return Ok(());
    }
    // The daemon last: it is what a second attempt looks for.
    for name in PROGRAMS {
        let (source, target) = (from.join(name), bin.join(name));
        if source.is_file() {
            program(&source, &target, take)?;
        } else if !take && name != FOR_OTHERS {
            return Err(Failure::new(EX_NOINPUT, format!("{} is gone", source.display())));
        }
    }
    Ok(())
}

/// Makes the system user of the node.
pub(super) fn user(place: &Place, voice: &Voice) -> Result<(), Failure> {
    if !place.is_real() || matches!(User::from_name(RUN_USER), Ok(Some(_))) {
        return Ok(());
    }
    voice.say(&format!("Making the system user {RUN_USER}"));
    let free = matches!(User::from_uid(RUN_ID.into()), Ok(None)) && matches!(Group::from_gid(RUN_ID.into()), Ok(None));
    let id = RUN_ID.to_string();
    let mut command =
        vec!["useradd", "--system", "--user-group", "--home-dir", "/var/lib/twistlock", "--no-create-home"];
    command.extend(["--shell", "/usr/sbin/nologin", "--comment", "Twistlock HA"]);
    if free {
        command.extend(["--uid", &id]);
    }
    command.push(RUN_USER);
    let why = format!("the user {RUN_USER} cannot be made (see the log, and: useradd {RUN_USER})");
    if voice.does(&command) { Ok(()) } else { Err(Failure::new(EX_CANTCREAT, why)) }
}

/// Makes the folders of data and backups for the node alone. A folder that was there may be of use to others, too, and
/// stays as it is. Only a data folder that is a node's, or empty, is given to the node.
pub(super) fn folders(place: &Place, config: &Config, voice: &Voice) -> Result<(), Failure> {
    let user = place.run_user(config);
    let owner = place.owner(&user);
    let (data, backups) = (&config.data_folder, &config.data_recovery_volume);
    for folder in [data, backups] {
        if !folder.is_dir() {
            self::folder(folder, 0o755)?;
            fs::DirBuilder::new().mode(0o700).create(folder).map_err(Failure::write(folder))?;
            give(folder, owner).map_err(Failure::write(folder))?;
        }
    }
    if is_nodes(data).map_err(Failure::write(data))? {
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(data, private).map_err(Failure::write(data))?;
        give(data, owner).map_err(Failure::write(data))?;
        for path in aside::contents(data).map_err(Failure::write(data))? {
            give_all(&path, owner).map_err(Failure::write(&path))?;
        }
    }
    if !can_write(data, &user, voice) {
        let why = format!("the user {user} cannot write to {}, which has files that are not a node's", data.display());
        return Err(
            Failure::new(EX_NOPERM, why).hint("Set DATA_FOLDER to a folder of the node alone, and do this again.")
        );
    }
    if !can_write(backups, &user, voice) {
        voice.warn(&format!(
            "the user {user} cannot write to {}, which was there before: give it the right, or no backup is made",
            backups.display()
        ));
    }
    Ok(())
}

/// True if the data folder is a node's alone, or nobody's.
fn is_nodes(data: &Path) -> io::Result<bool> {
    Ok(data.join("lock").exists() || aside::contents(data)?.is_empty())
}

/// Gives the pool's secret to the user of the node, if there is such a file: nobody else needs to read it.
///
/// # Errors
/// When it cannot be given.
pub(super) fn pool_secret(place: &Place, config: &Config) -> Result<(), Failure> {
    let Some(path) = config.clustered_db_secret_file.as_deref().filter(|path| path.is_file()) else { return Ok(()) };
    let private = fs::Permissions::from_mode(0o400);
    let done = give(path, place.owner(&place.run_user(config))).and_then(|()| fs::set_permissions(path, private));
    done.map_err(Failure::write(path))
}

fn give(path: &Path, owner: Option<(u32, u32)>) -> io::Result<()> {
    owner.map_or(Ok(()), |(user, group)| chown(path, Some(user), Some(group)))
}

/// Gives away a file or a folder with all that is in it; no symbolic link is followed.
fn give_all(path: &Path, owner: Option<(u32, u32)>) -> io::Result<()> {
    let Some((user, group)) = owner else { return Ok(()) };
    let found = fs::symlink_metadata(path)?;
    if (found.uid(), found.gid()) != (user, group) {
        lchown(path, Some(user), Some(group))?;
    }
    if found.is_dir() {
        for entry in fs::read_dir(path)? {
            give_all(&entry?.path(), owner)?;
        }
    }
    Ok(())
}

fn can_write(folder: &Path, user: &str, voice: &Voice) -> bool {
    let folder = folder.display().to_string();
    let test = ["test", "-w", &folder, "-a", "-x", &folder];
    let other = ["setpriv", "--reuid", user, "--regid", user, "--init-groups"];
    let command = if user == own_user() { test.to_vec() } else { [&other[..], &test].concat() };
    // Where this cannot be tested, the node itself will report it.
    voice.run(&command).map_or(true, |output| output.status.success())
}

/// Installs the settings; what was there is kept beside them.
pub(super) fn config(place: &Place, text: &str) -> Result<(), Failure> {
    let target = place.config();
    match fs::read(&target) {
        Ok(old) if old == text.as_bytes() => {}
        Ok(_) => {
            let mut kept = target.clone().into_os_string();
            kept.push(format!(".before-{}", aside::stamp()));
            let kept = PathBuf::from(kept);
            fs::copy(&target, &kept).map_err(Failure::write(&kept))?;
            give(&kept, place.readers().map(|group| (0, group))).map_err(Failure::write(&kept))?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(Failure::write(&target)(error)),
    }
    self::place(&target, 0o640, text.as_bytes(), place.is_real().then(|| (0, place.readers().unwrap_or(0))))
}

/// Installs the manual and the completion of the shell, as the installed `twistcli` writes them.
pub(super) fn manual(place: &Place, voice: &Voice) -> Result<(), Failure> {
    let cli = place.bin().join("twistcli").display().to_string();
    for (target, words) in [(place.manual(), &["man"][..]), (place.completion(), &["completions", "bash"])] {
        if let Some(text) = voice.ask(&[&[cli.as_str()], words].concat()) {
            self::place(&target, 0o644, format!("{text}\n").as_bytes(), None)?;
        }
    }
    Ok(())
}

/// Installs the unit and what differs from it on this host; without systemd, the rotation of the log.
pub(super) fn unit(place: &Place, config: &Config) -> Result<(), Failure> {
    if !place.uses_systemd(config) {
        return rotation(place);
    }
    if !place.packaged {
        self::place(&place.unit(), 0o644, UNIT_TEXT.as_bytes(), None)?;
    }
    let text = drop_in(place, config);
    if text.is_empty() { remove(&place.drop_in()) } else { self::place(&place.drop_in(), 0o644, text.as_bytes(), None) }
}

fn drop_in(place: &Place, config: &Config) -> String {
    let mut text = String::new();
    if config.run_console_as_root {
        text.push_str("User=root\nGroup=root\n");
    }
    if low_port(config) {
        text.push_str("CapabilityBoundingSet=CAP_NET_BIND_SERVICE\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n");
    }
    for (folder, known) in [&config.data_folder, &config.data_recovery_volume].into_iter().zip(UNIT_FOLDERS) {
        if folder != Path::new(known) {
            let path = folder.display().to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
            text.push_str(&format!("ReadWritePaths=\"{path}\"\n"));
        }
    }
    if text.is_empty() {
        return text;
    }
    format!("# Written by \"twistlockd host\" from {}.\n[Service]\n{text}", place.config().display())
}

/// Installs the rotation of the log. The node keeps its log open, and a rotation is not worth a restart: the file is
/// copied, then emptied.
fn rotation(place: &Place) -> Result<(), Failure> {
    let target = place.rotation();
    if !target.parent().is_some_and(Path::is_dir) {
        return Ok(());
    }
    let log = place.log();
    let rules = "    weekly\n    rotate 8\n    compress\n    missingok\n    notifempty\n    copytruncate\n";
    self::place(&target, 0o644, format!("{} {{\n{rules}}}\n", log.display()).as_bytes(), None)
}

/// Removes what an installation has put here, this program itself last.
pub(super) fn uninstall(place: &Place, voice: &Voice) -> Result<(), Failure> {
    if place.has_systemd() && place.unit().exists() {
        voice.does(&["systemctl", "disable", "--quiet", UNIT]);
    }
    for path in [place.unit(), place.drop_in(), place.manual(), place.completion(), place.rotation()] {
        remove(&path)?;
    }
    for folder in [place.drop_in(), place.pid_file()].iter().filter_map(|file| file.parent()) {
        let _ = fs::remove_dir(folder); // stays if something else is in it
    }
    if place.has_systemd() {
        voice.does(&["systemctl", "daemon-reload"]);
    }
    // A host may be a Defender, too.
    let used = place.at("/etc/systemd/system/defender.service").exists();
    let names = PROGRAMS.iter().filter(|name| !used || **name != FOR_OTHERS);
    names.map(|name| place.bin().join(name)).try_for_each(|path| remove(&path))
}
