//! The new `twistlock.cfg` of this host: put together from a given file, the installed one and the command line, in
//! memory and by the parser of [`crate::config`] alone. Must never write a file.

use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;

use super::{
    options::Options,
    place::Place,
    traces::Variables,
    voice::{EX_NOINPUT, EX_USAGE, Failure, Voice},
};
use crate::{
    config::{self, Config, Draft},
    join::Offer,
};

/// What an earlier installation says about this host alone, whatever cluster it joins.
const OWN: [&str; 8] = [
    "DATA_FOLDER",
    "DATA_RECOVERY_VOLUME",
    "BIND_ADDRESS",
    "CONSOLE_CN",
    "HIGH_AVAILABILITY_ADDRESS",
    "HIGH_AVAILABILITY_NAME",
    "METRICS_TOKEN",
    "NOTIFY_COMMAND",
];
/// The keys whose absence can mean something else than their default.
const HEALTH_ALLOW: &str = "HEALTH_ALLOW";
const HEALTH_PORT: &str = "HEALTH_PORT";
/// Keys whose folders go below the prefix of a test.
const FOLDERS: [(&str, &str); 2] =
    [("DATA_FOLDER", "/var/lib/twistlock"), ("DATA_RECOVERY_VOLUME", "/var/lib/twistlock-backup")];

/// The text of the new file, and what it says.
pub(super) struct Settings {
    pub(super) text: String,
    pub(super) config: Config,
    /// Keys that the cluster has a value for, and this host has none: they may be secrets, and are in no script.
    pub(super) unset: Vec<String>,
}

impl Settings {
    fn finish(mut draft: Draft, place: &Place, source: &str, voice: &Voice) -> Result<Self, Failure> {
        for (key, default) in FOLDERS {
            let folder = draft.get(key).unwrap_or(default).to_owned();
            if !place.is_real() && !place.has(Path::new(&folder)) {
                draft.set(key, &place.at(folder).display().to_string());
            }
        }
        let (text, loaded) = draft.finish(source)?;
        loaded.notes.iter().for_each(|note| voice.note(&note.to_string()));
        Ok(Self { text, config: loaded.config, unset: Vec::new() })
    }

    /// The settings of an installation. `daemon` is the environment of the installed node.
    ///
    /// # Errors
    /// When there is no file to begin with, one of the files has errors, or a `--set` does not fit.
    pub(super) fn of_install(
        options: &Options,
        place: &Place,
        daemon: Option<&Variables>,
        voice: &Voice,
    ) -> Result<Self, Failure> {
        let installed = place.config();
        let keep = options.keep && installed.is_file();
        let source = match source(options) {
            Some(source) => source,
            None if keep => installed.clone(),
            None => {
                let why = format!("there is no twistlock.cfg in {}", options.folder().display());
                return Err(Failure::new(EX_NOINPUT, why).hint("Name one: --config FILE"));
            }
        };
        let name = source.display().to_string();
        let mut draft = Draft::new(&config::read(&source)?, &name, &|name| std::env::var(name).ok())?;
        if keep {
            keep_installed(&mut draft, place, daemon, |_| true)?;
            voice.say(&format!("Settings: those of {} are kept; what it lacks comes from {name}", installed.display()));
        } else {
            voice.say(&format!("Settings: {name}"));
        }
        for setting in &options.set {
            let (key, value) = assignment(setting)?;
            draft.set(key, value);
        }
        Self::finish(draft, place, &name, voice)
    }

    /// The settings of a host that joins: those of the cluster, and what is this host's own.
    ///
    /// # Errors
    /// When the installed file has errors, or an option is not what its key allows.
    pub(super) fn of_join(
        offer: &Offer,
        place: &Place,
        daemon: Option<&Variables>,
        options: &[(&str, Option<&str>)],
        voice: &Voice,
    ) -> Result<Self, Failure> {
        let name = "the cluster's twistlock.cfg";
        let mut draft = Draft::new(offer.config.as_bytes(), name, &|_| None)?;
        if !place.is_real() {
            // Those of the cluster are below the prefix of another host.
            FOLDERS.iter().for_each(|(key, default)| draft.set(key, default));
        }
        if place.config().is_file() {
            keep_installed(&mut draft, place, daemon, |key| OWN.contains(&key))?;
        }
        let lacks = |key: &&String| draft.get(key).is_none_or(str::is_empty);
        let unset: Vec<String> = offer.withheld.iter().filter(lacks).cloned().collect();
        if unset.iter().any(|key| key == "METRICS_TOKEN") {
            // Without one, whoever reaches the page could read the metrics.
            draft.set("METRICS_TOKEN", &HEXLOWER.encode(&rand::random::<[u8; 24]>()));
        }
        for (key, value) in options {
            if let Some(value) = value {
                draft.set(key, value);
            }
        }
        Ok(Self { unset, ..Self::finish(draft, place, name, voice)? })
    }
}

/// Takes over what the installed file sets, as the installed daemon reads it.
fn keep_installed(
    draft: &mut Draft,
    place: &Place,
    daemon: Option<&Variables>,
    wanted: impl Fn(&str) -> bool,
) -> Result<(), Failure> {
    let installed = place.config();
    let lookup = |name: &str| match daemon {
        Some(variables) => variables.get(name).cloned(),
        None => std::env::var(name).ok(),
    };
    let (text, name) = (config::read(&installed)?, installed.display().to_string());
    draft.copy_from(&text, &name, &lookup, &wanted)?;
    let old = Draft::new(&text, &name, &lookup)?;
    let lacks = |key: &str| wanted(key) && old.get(key).is_none();
    let meant = config::parse(&text, &name, &lookup)?.config;
    if lacks(HEALTH_ALLOW) {
        // In files of earlier versions, its absence means that everybody is answered.
        draft.set(HEALTH_ALLOW, &meant.health_allow.to_string());
    }
    if lacks(HEALTH_PORT) && meant.health_address().is_none() {
        // Another service of this host has the port that would be the default.
        draft.set(HEALTH_PORT, "");
    }
    Ok(())
}

/// The file that an installation begins with.
fn source(options: &Options) -> Option<PathBuf> {
    let folder = options.folder();
    let beside = ["twistlock.cfg", "twistlock.cfg.example", "../twistlock.cfg.example"];
    options.config.clone().or_else(|| beside.map(|name| folder.join(name)).into_iter().find(|file| file.is_file()))
}

/// Key and value of a `--set`.
fn assignment(text: &str) -> Result<(&str, &str), Failure> {
    let name = |key: &str| {
        key.starts_with(|c: char| c.is_ascii_uppercase())
            && key.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    text.split_once('=')
        .filter(|(key, value)| name(key) && !value.chars().any(char::is_control))
        .ok_or_else(|| Failure::new(EX_USAGE, format!("found --set \"{text}\", allowed: KEY=VALUE")))
}
