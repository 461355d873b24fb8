//! What a Defender and the Console say to each other: messages, events, the policy, and their bounds. Must never change
//! the meaning of a message that an older program sends or understands.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The one number that both sides must agree on.
pub const PROTOCOL: u32 = 1;
/// Where the WebSocket is.
pub const PATH: &str = "/defender";
/// Longest message of a Defender in bytes.
pub const MESSAGE: usize = 256 << 10;
/// Longest message of the Console: a policy may be long.
pub const ANSWER: usize = 1 << 20;
/// The most events of one message.
pub const EVENTS: usize = 256;
/// Longest event in bytes of JSON.
pub const EVENT: usize = 8 << 10;
/// Messages with events that may wait for their acknowledgement.
pub const WINDOW: usize = 4;
/// From one ping of a Defender to the next, and how long silence lasts until a connection counts as dead, in
/// milliseconds.
pub const PING_MS: u64 = 1_000;
pub const SILENCE_MS: u64 = 3_000;
/// Paths of a policy, at most, and the longest of them in bytes.
pub const PATHS: usize = 256;
pub const LONGEST_PATH: usize = 1024;

/// An event with its number. What it says is up to the Defender: the Console keeps it as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Numbered {
    pub sequence: u64,
    /// When it happened by the clock of its host, in milliseconds since 1970.
    pub time: u64,
    pub kind: String,
    /// All that there is to know.
    pub event: Value,
}

/// What a Defender says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum FromDefender {
    Hello {
        protocol: u32,
        version: String,
        /// The number of the next event that it makes.
        next: u64,
        facts: Facts,
    },
    Events {
        events: Vec<Numbered>,
    },
    Renew {
        csr: String,
    },
    /// What a newer program says.
    #[serde(other)]
    Unknown,
}

/// What the Console says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum FromConsole {
    Welcome {
        protocol: u32,
        /// All events up to this number are stored.
        stored: u64,
        /// When the last of them happened, in milliseconds since 1970; 0 if there is none. What the Defender has under
        /// that number must be of that time.
        #[serde(default)]
        stored_time: u64,
        policy: Policy,
        /// Certificates of the authorities to trust, PEM.
        authorities: String,
        /// The Defender should ask for another certificate.
        renew: bool,
    },
    Ack {
        stored: u64,
    },
    Policy {
        policy: Policy,
    },
    Certificate {
        certificate: String,
    },
    /// Other authorities are to be trusted from now on.
    Trust {
        /// Their certificates, PEM.
        authorities: String,
        /// The Defender should ask for another certificate, at a random moment within so many milliseconds; not at all
        /// if there is none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        renew_within_ms: Option<u64>,
    },
    Refused {
        reason: String,
    },
    #[serde(other)]
    Unknown,
}

/// What a host is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Facts {
    pub hostname: String,
    pub kernel: String,
    /// `PRETTY_NAME` of its os-release.
    pub system: String,
    pub architecture: String,
    pub uptime_sec: u64,
}

/// What a Defender watches. What is left out gets its default; what is unknown is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Policy {
    /// Raised with each change.
    pub version: u64,
    /// Files and folders whose changes are reported, by absolute path.
    #[schemars(length(max = 256))]
    pub paths: Vec<Watched>,
    /// Events of one path within a minute; what is more is held back, counted and reported as one.
    #[schemars(range(min = 1, max = 1000))]
    pub per_minute: u32,
    /// Files of more bytes have no hash: their size and times tell.
    #[schemars(range(max = 1_073_741_824))]
    pub hash_bytes: u64,
}

/// One path of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Watched {
    pub path: String,
    /// All that is below a folder, too, and not only what is in it.
    #[serde(default)]
    pub recursive: bool,
}

impl Default for Policy {
    /// Nothing is watched before somebody says what.
    fn default() -> Self {
        Self { version: 0, paths: Vec::new(), per_minute: 10, hash_bytes: 64 << 20 }
    }
}

impl Policy {
    /// What is wrong with it, for whoever wants to set it.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.paths.len() > PATHS {
            return Err(format!("paths must be at most {PATHS}"));
        }
        for Watched { path, .. } in &self.paths {
            let parts = path.strip_prefix('/').map(|rest| rest.split('/'));
            let plain = parts.is_some_and(|mut parts| parts.all(|part| !["", ".", ".."].contains(&part)));
            if !(plain || path == "/") || path.len() > LONGEST_PATH || path.contains(char::is_control) {
                return Err(format!(
                    "a path must be absolute, without . and .., and have at most {LONGEST_PATH} bytes: {path:?}"
                ));
            }
        }
        if !(1..=1000).contains(&self.per_minute) {
            return Err("perMinute must be 1 to 1000".to_owned());
        }
        if self.hash_bytes > 1 << 30 {
            return Err("hashBytes must be at most 1073741824".to_owned());
        }
        Ok(())
    }
}

/// How a host asks to be registered: the body of a POST to [`REGISTER`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Registration {
    /// Secret of an invitation.
    pub token: String,
    /// How people call the host.
    pub name: String,
    /// A signing request, PEM; only its key counts.
    pub csr: String,
}

/// What a host gets that was registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Registered {
    pub id: String,
    /// PEM.
    pub certificate: String,
    /// Certificates of the authorities to trust, PEM.
    pub authorities: String,
}

/// Where a host is registered, on the Console's HTTPS port.
pub const REGISTER: &str = "/api/v1/defenders/register";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_unknown_is_no_error() {
        let of = |value: Value| serde_json::from_value::<FromConsole>(value).unwrap();
        assert_eq!(of(json!({ "type": "later", "a": 1 })), FromConsole::Unknown);
        assert_eq!(of(json!({ "type": "ack", "stored": 7, "a": 1 })), FromConsole::Ack { stored: 7 });
        let policy = json!({ "type": "policy", "policy": { "version": 3, "later": [] } });
        let expected = Policy { version: 3, ..Policy::default() };
        assert_eq!(of(policy), FromConsole::Policy { policy: expected });
        let trust = FromConsole::Trust { authorities: String::new(), renew_within_ms: None };
        assert_eq!(of(json!({ "type": "trust", "authorities": "" })), trust);
        let later = serde_json::from_value::<FromDefender>(json!({ "type": "later" })).unwrap();
        assert_eq!(later, FromDefender::Unknown);
    }

    #[test]
    fn a_policy_has_bounds() {
        let watched = |path: &str| Watched { path: path.to_owned(), recursive: false };
        let with = |paths| Policy { paths, ..Policy::default() }.check();
        assert_eq!(with(vec![watched("/etc"), watched("/"), watched("/a b/ä")]), Ok(()));
        for bad in ["", "etc", "/etc/", "/a//b", "/a/../b", "/./a", "/a\nb", &format!("/{}", "a".repeat(1024))] {
            assert!(with(vec![watched(bad)]).is_err(), "{bad}");
        }
        assert!(with(vec![watched("/a"); PATHS + 1]).is_err());
        assert!(Policy { per_minute: 0, ..Policy::default() }.check().is_err());
    }
}
