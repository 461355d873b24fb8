//! What goes over the control socket: requests, operations and their answers. Must never carry a private key of the node or
//! of the certificate authority; a join script's token, on its way out, and the key of a certificate that an administrator
//! brings, on its way in, are the only secrets that pass.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a local client may ask for. On the wire: `{"command":"status"}`,
/// `{"command":"administer","operation":{"name":"pause","seconds":600}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The node's [`Status`](crate::node::Status).
    Status {},
    /// The metrics in Prometheus text format, as one JSON string.
    Metrics {},
    /// A request of the Console's API, which this host's daemon carries out if it is PRIMARY, as an Administrator who is logged
    /// in on the host. Answer: an [`ApiReply`].
    Api {
        /// As HTTP has it.
        method: String,
        /// Below `/api/v1/`.
        path: String,
        /// JSON, for methods that have one.
        #[serde(default)]
        body: Option<serde_json::Value>,
    },
    /// Where the Consoles of the cluster are. Answer: a [`Place`].
    Place {},
    /// Something that changes the cluster.
    Administer {
        /// What.
        operation: Operation,
    },
}

/// What an administrator may have done. Only the PRIMARY does it; another node refuses and names the PRIMARY, unless said
/// otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Operation {
    /// Lets hosts ask for admission. Answer: a [`JoinScript`].
    Invite {
        /// How long the invitation is good.
        valid_s: u64,
        /// Whether the script itself is wanted, beside the line that fetches it.
        script: bool,
    },
    /// Closes all invitations. Answer: null.
    Uninvite {},
    /// Admits the hosts that ask. Answer: their node ids.
    Apply {
        /// The fingerprints that the administrator has compared: refused if they are not those of the hosts that ask.
        /// None: whoever asks.
        fingerprints: Option<Vec<String>>,
    },
    /// Turns a host down that asks. Answer: null.
    Reject {
        /// Its name, or the id of its request.
        host: String,
    },
    /// Drops a member. Answer: null, or what remains to be done about what it knows.
    Remove {
        /// Its name or id.
        node: String,
        /// Even if the rest has no majority that answers.
        force: bool,
    },
    /// Hands the role of PRIMARY over. Answer: a [`SwitchoverReport`](crate::admin::SwitchoverReport).
    Switchover {
        /// To this member; none: to the one that is best prepared.
        to: Option<String>,
        /// Only check whether it could be done.
        dry_run: bool,
    },
    /// No automatic takeover for so long. Answer: when it ends, in seconds since 1970.
    Pause {
        /// From now on.
        seconds: u64,
    },
    /// Automatic takeover again. Answer: null.
    Resume {},
    /// Replaces the cluster key. Answer: null, when that has begun.
    RotateKey {},
    /// Replaces the certificate authority. Answer: null, when that has begun.
    RotateCa {
        /// How long the old one is still trusted when the new one signs.
        overlap_s: u64,
    },
    /// Sends a test event to everybody whom this node would notify. Answer: a list of
    /// [`Delivery`](crate::events::notify::Delivery)s.
    TestNotifications {},
    /// What happened to this node, newest first; any node answers it. Answer: a list of [`Event`](crate::events::Event)s.
    Events {
        /// Which.
        wanted: crate::events::Wanted,
    },
    /// A member is reached elsewhere from now on; none keeps what there is. Answer: null.
    Readdress {
        /// Its name or id.
        node: String,
        /// Its new name.
        new_name: Option<String>,
        /// Its new host name or IP address.
        address: Option<String>,
        /// Its new `HIGH_AVAILABILITY_PORT`.
        port: Option<u16>,
    },
    /// Any node answers. Answer: [`Certificates`](crate::admin::Certificates).
    Certificates {},
    /// The names that every Console's certificate is good for, beside those of its own host; all others go. Answer: the
    /// list as it is kept.
    SetConsoleNames {
        /// Host names and IP addresses.
        names: Vec<String>,
    },
    /// All Consoles serve this certificate. Answer: [`Custom`](crate::admin::Custom).
    SetCertificate {
        /// The chain, its own certificate first, and the private key; PEM.
        pem: SecretText,
    },
    /// All Consoles serve certificates of the cluster's own authority again. Answer: null.
    RemoveCertificate {},
    /// The backups of all members that answer, newest first, on every node. Answer: a list of
    /// [`Backup`](crate::backup::Backup); [`Operation::BackupState`] says who did not answer.
    Backups {},
    /// What is set up and under way on this host, on every node, as the next four. Answer: a [`BackupState`](crate::backup::BackupState).
    BackupState {},
    /// Makes a backup of this host's copy of the database. Answer: [`Started`](crate::backup::Started), at once.
    Backup {
        /// What the administrator calls it.
        called: String,
    },
    /// Opens a backup and checks all of it. Answer: [`Started`](crate::backup::Started), at once.
    VerifyBackup {
        /// Its file name.
        id: String,
    },
    /// Gives a manual backup another name. Answer: the [`Backup`](crate::backup::Backup).
    RenameBackup {
        /// Its file name.
        id: String,
        /// What it is called from now on.
        called: String,
    },
    /// Deletes a backup. Answer: null.
    DeleteBackup {
        /// Its file name.
        id: String,
    },
    /// The copies at `BACKUP_URL`, of all members and clusters, newest first. Answer: a list of
    /// [`RemoteBackup`](crate::backup::RemoteBackup).
    BackupCopies {},
    /// Fetches a copy into this host's folder. Answer: [`Started`](crate::backup::Started), at once, with the name that it gets.
    FetchBackup {
        /// `CLUSTER/NODE/FILE`, as the list has it.
        place: String,
    },
    /// Puts the content of a backup in the place of the whole cluster's database. The Console is closed meanwhile. Only on the
    /// PRIMARY. Answer: [`Started`](crate::backup::Started), at once.
    Restore {
        /// The absolute path of the backup on this host.
        file: std::path::PathBuf,
        /// The administrator knows that the Console is closed for it; refused otherwise.
        stop_console: bool,
        /// The backup may be one that is not encrypted although there is a key; refused otherwise.
        #[serde(default)]
        unencrypted: bool,
    },
}

/// What the Console's API answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiReply {
    /// The status of HTTP.
    pub status: u16,
    /// JSON, or the text of an answer that is none.
    pub body: serde_json::Value,
    /// How long the list is of which the body is a part.
    pub total: Option<u64>,
}

/// How the Consoles of the cluster are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// `MANAGEMENT_PORT_HTTPS`, the same on all members.
    pub https_port: Option<u16>,
}

/// A text that is never logged or shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(pub String);

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// How a host joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinScript {
    /// The one line to run there, with the token in it.
    pub line: String,
    /// The script that the line fetches, if it was asked for.
    pub script: Option<String>,
    /// When the token expires, in seconds since 1970.
    pub until: u64,
}

/// The answer to one request: `{"ok": ...}` or `{"err": "..."}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// It was done; the value is what was asked for, `null` when there is nothing to tell.
    Ok(serde_json::Value),
    /// It was not done, and why, as one sentence.
    Err(String),
}
