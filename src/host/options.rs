//! What `twistlockd host install`, `upgrade` and `uninstall` are told on the command line.

use std::path::{Path, PathBuf};

use clap::Args;

/// What an installation is told.
#[derive(Debug, Args)]
#[command(after_help = super::EXIT_CODES)]
pub struct Options {
    /// Accept the terms, and answer every question with yes
    #[arg(short = 's')]
    pub(super) accept: bool,
    /// Pass over the checks of this host that would block the installation
    #[arg(short = 'y')]
    pub(super) pass_over: bool,
    /// Keep the settings of the installed twistlock.cfg; keys that it lacks come from the new one
    #[arg(short = 'j')]
    pub(super) keep: bool,
    /// Drop the existing database: the data folder is set aside, never deleted
    #[arg(short = 'f', conflicts_with = "uninstall")]
    pub(super) drop: bool,
    /// Uninstall; data, backups and twistlock.cfg stay
    #[arg(short = 'u')]
    pub(super) uninstall: bool,
    /// Show every command
    #[arg(short = 'z')]
    pub(super) debug: bool,
    /// Folder of twistlockd, twistcli and defender [default: that of this program]
    #[arg(long, value_name = "DIR")]
    pub(super) program: Option<PathBuf>,
    /// The new twistlock.cfg [default: twistlock.cfg, else twistlock.cfg.example, in the folder of install.sh]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Set a key of twistlock.cfg
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// List the steps, and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// What is installed: console
    #[arg(value_name = "COMPONENT")]
    pub(super) component: Option<String>,
    /// The folder of install.sh, where it looks for twistlock.cfg
    #[arg(long, value_name = "DIR", hide = true)]
    pub(super) beside: Option<PathBuf>,
    /// For tests: end after this step, as if the process had been killed there
    #[arg(long, value_name = "STEP", hide = true)]
    pub(super) stop_after: Option<String>,
}

impl Options {
    /// Where twistlock.cfg is looked for.
    pub(super) fn folder(&self) -> PathBuf {
        self.beside.clone().unwrap_or_else(|| self.programs())
    }

    /// Where the programs are.
    pub(super) fn programs(&self) -> PathBuf {
        let own =
            || std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or_default();
        self.program.clone().unwrap_or_else(own)
    }
}
