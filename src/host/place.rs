//! Where everything is on a host: real paths, or the same below a prefix for tests. Must never change anything.

use std::path::{Path, PathBuf};

use nix::unistd::{Group, Uid, User};

use super::voice::{EX_USAGE, Failure, Voice};
use crate::config::Config;

/// Environment variable for the prefix.
const PREFIX: &str = "TWISTLOCK_PREFIX";
/// The unit's name.
pub(super) const UNIT: &str = "twistlockd.service";
/// The user that runs the node.
pub(super) const RUN_USER: &str = "twistlock";
/// Ports from here on need no capability.
const FIRST_FREE_PORT: u16 = 1024;

/// The paths of a host.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Empty on a real host.
    prefix: PathBuf,
    /// The programs are those of a Debian package.
    pub(super) packaged: bool,
}

impl Place {
    /// Finds out whether this is a real host or the folder of a test, and how the programs were installed.
    ///
    /// # Errors
    /// When the prefix is not an absolute path.
    pub(super) fn find(voice: &Voice) -> Result<Self, Failure> {
        let prefix = PathBuf::from(std::env::var_os(PREFIX).unwrap_or_default());
        if !prefix.as_os_str().is_empty() && !prefix.is_absolute() {
            return Err(Failure::new(EX_USAGE, format!("{PREFIX} must be an absolute path")));
        }
        let real = prefix.as_os_str().is_empty();
        let packaged =
            real && Path::new("/usr/bin/twistlockd").exists() && voice.does(&["dpkg", "-S", "/usr/bin/twistlockd"]);
        Ok(Self { prefix, packaged })
    }

    /// The host below a folder.
    #[cfg(test)]
    pub(super) fn below(prefix: &Path) -> Self {
        Self { prefix: prefix.to_owned(), packaged: false }
    }

    /// True for this host itself, false for a folder of a test.
    pub(super) fn is_real(&self) -> bool {
        self.prefix.as_os_str().is_empty()
    }

    /// An absolute path of a host.
    pub(super) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        if self.is_real() || path.starts_with(&self.prefix) {
            return path.to_owned();
        }
        self.prefix.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// True if the path is of this host: with a prefix, others share the machine.
    pub(super) fn has(&self, path: &Path) -> bool {
        path.starts_with(&self.prefix)
    }

    pub(super) fn bin(&self) -> PathBuf {
        self.at(if self.packaged { "/usr/bin" } else { "/usr/local/bin" })
    }

    pub(super) fn config(&self) -> PathBuf {
        self.at("/etc/twistlock/twistlock.cfg")
    }

    pub(super) fn unit(&self) -> PathBuf {
        self.at("/etc/systemd/system").join(UNIT)
    }

    pub(super) fn drop_in(&self) -> PathBuf {
        self.at("/etc/systemd/system").join(format!("{UNIT}.d/10-install.conf"))
    }

    pub(super) fn pid_file(&self) -> PathBuf {
        self.at("/run/twistlock/twistlockd.pid")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.at("/var/log/twistlock/twistlockd.log")
    }

    pub(super) fn manual(&self) -> PathBuf {
        self.at("/usr/local/share/man/man1/twistcli.1")
    }

    pub(super) fn completion(&self) -> PathBuf {
        self.at("/usr/share/bash-completion/completions/twistcli")
    }

    pub(super) fn rotation(&self) -> PathBuf {
        self.at("/etc/logrotate.d/twistlock")
    }

    /// True if systemd runs here.
    pub(super) fn has_systemd(&self) -> bool {
        self.is_real() && Path::new("/run/systemd/system").is_dir()
    }

    /// True if systemd runs here and is to start the node.
    pub(super) fn uses_systemd(&self, config: &Config) -> bool {
        self.has_systemd() && config.systemd_enabled
    }

    /// True if systemd has a unit of the node.
    pub(super) fn has_unit(&self, voice: &Voice) -> bool {
        self.has_systemd() && voice.does(&["systemctl", "cat", UNIT])
    }

    /// The user that is to run the node.
    pub(super) fn run_user(&self, config: &Config) -> String {
        if !self.is_real() {
            return own_user();
        }
        if config.run_console_as_root { "root".to_owned() } else { RUN_USER.to_owned() }
    }

    /// Ids of a user and of its group; none with a prefix, where everything belongs to whoever runs this.
    pub(super) fn owner(&self, user: &str) -> Option<(u32, u32)> {
        let found = if self.is_real() { User::from_name(user).ok()? } else { None };
        found.map(|user| (user.uid.as_raw(), user.gid.as_raw()))
    }

    /// The group that may read the settings.
    pub(super) fn readers(&self) -> Option<u32> {
        let found = if self.is_real() { Group::from_name(RUN_USER).ok()? } else { None };
        found.map(|group| group.gid.as_raw())
    }
}

/// The name of the user who runs this.
pub(super) fn own_user() -> String {
    let uid = Uid::effective();
    User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

/// The ports that a node with these settings opens.
pub(super) fn ports(config: &Config) -> impl Iterator<Item = u16> {
    let Config { management_port_http, management_port_https, communication_port, high_availability_port, .. } =
        *config;
    [management_port_http, management_port_https, communication_port, high_availability_port].into_iter().flatten()
}

/// True if one of the ports needs a capability.
pub(super) fn low_port(config: &Config) -> bool {
    ports(config).any(|port| port < FIRST_FREE_PORT)
}
