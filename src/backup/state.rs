//! What is told about backups: the answers of the Console's API and of the control socket. No logic.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::name::Kind;

/// A backup in the folder of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Backup {
    /// Its file name.
    pub id: String,
    /// Name of the member in whose folder it lies.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    pub name: String,
    /// Of the program that made it: only the same version restores it.
    pub version: String,
    /// When it was made, in seconds since 1970.
    pub time: u64,
    /// Length of the file.
    pub bytes: u64,
    pub kind: Kind,
    /// It can only be read with the key of `BACKUP_KEY_FILE`.
    pub encrypted: bool,
}

/// What can be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    Create,
    Verify,
    Restore,
    /// A copy is brought from the place of `BACKUP_URL` into the folder.
    Fetch,
    /// What only a newer program has a word for.
    #[serde(other)]
    Other,
}

/// Something was begun: its end is told by [`BackupState::last`] under the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Started {
    pub number: u64,
    /// The backup that is made, verified or restored.
    pub id: String,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Running {
    pub number: u64,
    pub work: Work,
    pub id: String,
    /// What is being done now, in words.
    pub step: String,
    /// Bytes of this step, done and in all.
    pub done: u64,
    pub total: u64,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outcome {
    pub number: u64,
    pub work: Work,
    pub id: String,
    pub ok: bool,
    /// What was reached, or why not, as a sentence.
    pub text: String,
    /// When, in seconds since 1970.
    pub time: u64,
    /// How long it took.
    pub ms: u64,
}

/// How many automatic backups are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Keep {
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
}

/// The backups of this host: how they are set up, what is under way, and how the last one went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupState {
    /// `DATA_RECOVERY_ENABLED`: automatic backups are made.
    pub enabled: bool,
    /// `DATA_RECOVERY_VOLUME`.
    pub folder: String,
    /// Free space there, in bytes; none if it cannot be told.
    pub free: Option<u64>,
    /// `BACKUP_KEY_FILE` is set: new backups are encrypted.
    pub encrypted: bool,
    pub keep: Keep,
    /// When the next automatic one is due, in seconds since 1970.
    pub next: Option<u64>,
    /// When the newest good one in the folder was made.
    pub newest: Option<u64>,
    pub running: Option<Running>,
    pub last: Option<Outcome>,
    /// The copies elsewhere; none without `BACKUP_URL`.
    #[serde(default)]
    pub copies: Option<CopyState>,
    /// How the members answered when the backups were listed last, this one first; empty before that.
    #[serde(default)]
    pub members: Vec<MemberBackups>,
}

/// What a member answered when it was asked for its backups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemberBackups {
    /// Its name.
    pub node: String,
    /// Its `DATA_RECOVERY_VOLUME`; none, like all that follows, if it does not answer.
    pub folder: Option<String>,
    /// Its `DATA_RECOVERY_ENABLED`.
    pub enabled: Option<bool>,
    /// How many it has.
    pub backups: Option<u32>,
    /// When the newest was made, in seconds since 1970.
    pub newest: Option<u64>,
    /// Why its backups are unknown, as a sentence.
    pub problem: Option<String>,
    /// When it was asked, in seconds since 1970.
    pub time: u64,
}

/// The copies at `BACKUP_URL`, as this host makes them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CopyState {
    /// `BACKUP_URL`.
    pub url: String,
    /// What is being copied now.
    pub running: Option<CopyRunning>,
    /// How many backups of this host were not there yet at the last look.
    pub missing: u32,
    /// When everything in the folder was last there, in seconds since 1970.
    pub complete: Option<u64>,
    /// Why the last attempt failed; none after one that succeeded.
    pub problem: Option<String>,
}

/// How far one copy is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CopyRunning {
    /// The backup.
    pub id: String,
    /// Bytes, sent and in all.
    pub done: u64,
    pub total: u64,
}
