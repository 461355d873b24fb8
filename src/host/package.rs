//! What the scripts of the Debian package ask for. Must never start a node that was not running, and never touch data.

use super::{
    files,
    place::Place,
    service::Service,
    voice::{Failure, Voice},
};
use crate::config::{self, Config};

/// A moment in the life of the package.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Moment {
    /// The files are unpacked.
    Configure,
    /// Another version comes, or the package goes, and everything still runs.
    Leave,
}

/// Does what belongs to the moment.
///
/// # Errors
/// When the user or the folders cannot be made, or the installed settings have errors.
pub(super) fn run(moment: Moment, voice: &Voice) -> Result<(), Failure> {
    let place = Place::find(voice)?;
    let installed = place.config();
    match moment {
        Moment::Configure => {
            files::user(&place, voice)?;
            // If another folder is set, systemd must be told as well: that is up to the administrator.
            let run_console_as_root = config::load(&installed).is_ok_and(|loaded| loaded.config.run_console_as_root);
            files::folders(&place, &Config { run_console_as_root, ..Config::default() }, voice)?;
            if !installed.exists() {
                files::config(&place, &config::render(&Config::default()))?;
            }
        }
        Moment::Leave if installed.exists() => {
            let config = config::load(&installed)?.config;
            Service { place: &place, config: &config, voice }.leave_role();
        }
        Moment::Leave => {}
    }
    Ok(())
}
