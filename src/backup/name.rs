//! The names of backups: `{name}-{version}-{unix seconds}.tar.gz`, with `.sealed` behind it if it is encrypted. Owns
//! what a name may be; nothing that has not passed here ever becomes part of a path. Pure.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BackupError;

/// Longest name that an administrator may give, in characters.
const LONGEST_NAME: usize = 64;
/// Longest file name of a backup, in bytes.
const LONGEST_ID: usize = 160;
/// What every backup's file name ends with.
const PLAIN: &str = ".tar.gz";
/// What the file name of an encrypted backup ends with.
const SEALED: &str = ".tar.gz.sealed";

/// What the names of fetched backups begin with.
pub(super) const FETCHED: &str = "fetched-";

/// What a backup was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Every day.
    Daily,
    /// Kept for weeks.
    Weekly,
    /// Kept for months.
    Monthly,
    /// By an administrator, who also deletes it; or for something that only a newer program has a word for.
    #[serde(other)]
    Manual,
}

impl Kind {
    /// The kinds that are made and deleted automatically.
    pub const AUTOMATIC: [Self; 3] = [Self::Daily, Self::Weekly, Self::Monthly];

    /// The name of such backups; of a manual one it is up to the administrator.
    pub fn word(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
        }
    }
}

/// Checks a name that is to be part of a file name.
///
/// # Errors
/// [`BackupError::Name`] with what is allowed.
pub fn check_name(name: &str) -> Result<(), BackupError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let fine = (1..=LONGEST_NAME).contains(&name.chars().count())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !fine {
        return Err(BackupError::Name(format!(
            "a backup's name has 1 to {LONGEST_NAME} characters, begins with a letter or digit, and goes on with letters, \
             digits, '.', '-' and '_'"
        )));
    }
    if Kind::AUTOMATIC.iter().any(|kind| kind.word().eq_ignore_ascii_case(name)) {
        return Err(BackupError::Name(format!("'{name}' is the name of automatic backups: choose another one")));
    }
    Ok(())
}

/// A file name of a backup, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupId {
    /// As the administrator called it, or [`Kind::word`].
    pub name: String,
    /// Of the program that made it.
    pub version: String,
    /// When, in seconds since 1970.
    pub time: u64,
    /// It can only be read with the key.
    pub sealed: bool,
}

impl BackupId {
    /// Takes a file name apart; none if it is not that of a backup. The result is shown as the same file name again.
    pub fn parse(id: &str) -> Option<Self> {
        let (stem, sealed) = match id.strip_suffix(SEALED) {
            Some(stem) => (stem, true),
            None => (id.strip_suffix(PLAIN)?, false),
        };
        let (rest, seconds) = stem.rsplit_once('-')?;
        let time = seconds.parse().ok()?;
        // Both may contain a '-': the last one that a version follows counts.
        let (name, version) = rest
            .rmatch_indices('-')
            .map(|(at, _)| (&rest[..at], &rest[at + 1..]))
            .find(|(_, version)| is_version(version))?;
        let found = Self { name: name.to_owned(), version: version.to_owned(), time, sealed };
        let named = found.kind() != Kind::Manual || check_name(name).is_ok();
        (id.len() <= LONGEST_ID && named && found.to_string() == id).then_some(found)
    }

    /// [`Self::parse`] for what a client has sent.
    ///
    /// # Errors
    /// [`BackupError::NotFound`] when it cannot be the file name of a backup.
    pub fn read(id: &str) -> Result<Self, BackupError> {
        Self::parse(id).ok_or_else(|| BackupError::NotFound(format!("there is no backup {:?}", shorten(id))))
    }

    /// What it was made for.
    pub fn kind(&self) -> Kind {
        Kind::AUTOMATIC.into_iter().find(|kind| kind.word() == self.name).unwrap_or(Kind::Manual)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.sealed { SEALED } else { PLAIN };
        write!(f, "{}-{}-{}{end}", self.name, self.version, self.time)
    }
}

fn is_version(text: &str) -> bool {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<&str> = core.split('.').collect();
    let digits = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.');
    numbers.len() == 3 && numbers.iter().all(digits) && text.chars().all(plain)
}

/// The beginning of something that came from outside, for a message.
fn shorten(text: &str) -> String {
    text.chars().take(LONGEST_ID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_is_taken_apart_and_put_together() {
        for (id, name, version, kind) in [
            ("before-upgrade-0.1.0-1790000000.tar.gz", "before-upgrade", "0.1.0", Kind::Manual),
            ("a-1.2.3-0.1.0-1.tar.gz", "a-1.2.3", "0.1.0", Kind::Manual),
            ("daily-0.1.0-1790000000.tar.gz", "daily", "0.1.0", Kind::Daily),
            ("monthly-12.0.7-rc.1-1790000000.tar.gz.sealed", "monthly", "12.0.7-rc.1", Kind::Monthly),
        ] {
            let found = BackupId::parse(id).expect(id);
            assert_eq!((&*found.name, &*found.version, found.kind()), (name, version, kind), "{id}");
            assert_eq!(found.to_string(), id);
            assert_eq!(found.sealed, id.ends_with("sealed"));
        }
    }

    #[test]
    fn nothing_else_is_the_name_of_a_backup() {
        for id in [
            "",
            "..",
            ".tar.gz",
            "-0.1.0-1.tar.gz",
            "a-0.1.0-1.tar",
            "a-0.1.0-1.tar.gz/",
            "../a-0.1.0-1.tar.gz",
            "x/../a-0.1.0-1.tar.gz",
            "x\\a-0.1.0-1.tar.gz",
            ".a-0.1.0-1.tar.gz",
            "a b-0.1.0-1.tar.gz",
            "a\0-0.1.0-1.tar.gz",
            "a-0.1-1.tar.gz",
            "a-0.1.0-.tar.gz",
            "a-0.1.0-01.tar.gz",
            "a-0.1.0-+1.tar.gz",
            "a-0.1.0-/etc-1.tar.gz",
            "ä-0.1.0-1.tar.gz",
            "a-0.1.0-99999999999999999999999.tar.gz",
        ] {
            assert!(BackupId::parse(id).is_none(), "{id}");
            assert!(matches!(BackupId::read(id), Err(BackupError::NotFound(_))));
        }
        assert!(BackupId::parse(&format!("{}-0.1.0-1.tar.gz", "a".repeat(65))).is_none());
    }

    #[test]
    fn names_are_checked() {
        for name in ["a", "before-upgrade_2.0", &"x".repeat(64)] {
            check_name(name).unwrap();
        }
        let long = "x".repeat(65);
        for name in ["", ".", "..", "../a", "a/b", "-a", "a b", "a\n", "ä", "daily", "Weekly", "a\r\nX: y", &long] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
