//! `settings/logon` and `settings/system`. Other settings belong to their resource's file.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{Method, StatusCode},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console, audit_log,
    errors::ApiError,
    extract::Body,
    route::{Access, Entry, route},
    store::{StoreError, Writing},
    user::{Role, User},
};
use crate::cluster::program_version;

const LOGON: &str = "logon";

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let set = |method| {
        let access = Access::Roles(Role::ADMINISTRATORS);
        route(method, "/settings/logon", access, "Set the rules for logins", set_logon)
            .changes("set", "settings/logon")
            .body::<Logon>()
    };
    vec![
        route(Method::GET, "/settings/logon", Access::Roles(Role::READERS), "The rules for logins", logon)
            .answer::<Logon>(),
        set(Method::POST),
        set(Method::PUT),
        route(Method::GET, "/settings/system", Access::Any, "What this Console is", system).answer::<System>(),
    ]
}

/// The rules for logins and sessions. What a body leaves out gets its default; what is unknown is ignored, because a
/// newer version may have stored it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Logon {
    /// How many seconds a token is valid unless it is renewed.
    #[schemars(range(min = 60, max = 86_400))]
    session_timeout_sec: u32,
    /// How many seconds a session may last in all, however often it is renewed.
    #[schemars(range(min = 60, max = 2_592_000))]
    session_maximum_sec: u32,
    /// Sessions of one user at once; the oldest end for new ones.
    #[schemars(range(min = 1, max = 1000))]
    sessions_per_user: u32,
    /// New passwords: 12 characters, upper and lower case, digit, special character, unlike the name.
    strong_password: bool,
}

impl Default for Logon {
    fn default() -> Self {
        Self {
            session_timeout_sec: 30 * 60,
            session_maximum_sec: 12 * 60 * 60,
            sessions_per_user: 50,
            strong_password: false,
        }
    }
}

impl Logon {
    /// Reads the settings in a transaction.
    pub(super) async fn of(writing: &mut Writing) -> Result<Self, StoreError> {
        Ok(writing.setting(LOGON).await?.unwrap_or_default())
    }

    /// Reads the settings outside a transaction.
    pub(super) async fn read(console: &Console) -> Result<Self, StoreError> {
        Ok(console.store.setting(LOGON).await?.unwrap_or_default())
    }

    pub(super) fn timeout(&self) -> i64 {
        self.session_timeout_sec.into()
    }

    pub(super) fn maximum(&self) -> i64 {
        self.session_maximum_sec.into()
    }

    pub(super) fn sessions(&self) -> i64 {
        self.sessions_per_user.into()
    }

    pub(super) fn strong_password(&self) -> bool {
        self.strong_password
    }

    fn check(&self) -> Result<(), ApiError> {
        for (name, value, range) in [
            ("sessionTimeoutSec", self.session_timeout_sec, 60..=86_400),
            ("sessionMaximumSec", self.session_maximum_sec, 60..=2_592_000),
            ("sessionsPerUser", self.sessions_per_user, 1..=1000),
        ] {
            if !range.contains(&value) {
                return Err(ApiError::bad(format!("{name} must be {} to {}", range.start(), range.end())));
            }
        }
        Ok(())
    }
}

/// `GET settings/logon`.
async fn logon(State(console): State<Arc<Console>>) -> Result<Json<Logon>, ApiError> {
    Ok(Json(Logon::read(&console).await?))
}

/// `POST` and `PUT settings/logon`: they apply to new sessions and passwords; existing ones stay as they are.
async fn set_logon(
    State(console): State<Arc<Console>>,
    user: User,
    Body(logon): Body<Logon>,
) -> Result<StatusCode, ApiError> {
    logon.check()?;
    let mut writing = console.store.begin().await?;
    let difference = audit_log::difference(&Logon::of(&mut writing).await?, &logon);
    writing.set_setting(LOGON, &logon).await?;
    audit_log::record(&mut writing, &user, "set", "settings/logon", difference).await?;
    writing.commit().await?;
    Ok(StatusCode::OK)
}

/// What this Console is.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct System {
    version: &'static str,
    /// True where the page has a High Availability page.
    ha_enabled: bool,
    /// Name of the node that answers.
    node: String,
    /// The port of the members' status pages, if they have them.
    status_port: Option<u16>,
    /// True where a service runs beside the Console: see `GET service`.
    service: bool,
}

/// `GET settings/system`.
async fn system(State(console): State<Arc<Console>>) -> Json<System> {
    let services = console.services.as_ref();
    let ha_enabled = services.is_some_and(|services| services.high_availability);
    let status_port = services.and_then(|services| services.status_port);
    let service = services.is_some_and(|services| services.service.is_some());
    let node = console.status.borrow().name.clone();
    Json(System { version: program_version(), ha_enabled, node, status_port, service })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_has_its_default_and_limits_hold_on_both_sides() {
        let read = |text: &str| serde_json::from_str::<Logon>(text).unwrap();
        assert_eq!(read("{}"), Logon::default());
        assert!(read(r#"{"strongPassword": true, "ofANewerVersion": 1}"#).strong_password);
        read("{}").check().unwrap();
        read(r#"{"sessionTimeoutSec": 60, "sessionsPerUser": 1000}"#).check().unwrap();
        for bad in [r#"{"sessionTimeoutSec": 59}"#, r#"{"sessionsPerUser": 0}"#, r#"{"sessionMaximumSec": 2592001}"#] {
            read(bad).check().unwrap_err();
        }
    }
}
