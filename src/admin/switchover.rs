//! The planned switchover: checks, one by one, then the handover. Must never leave the ports closed when the role stays.

use serde::{Deserialize, Serialize};

use super::{Admin, AdminError};

/// One precondition of a switchover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    /// What was found, and what to do if it is not ok.
    pub detail: String,
}

/// What was found before a switchover, and how it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchoverReport {
    pub checks: Vec<Check>,
    /// Name of the new primary, or of the one that it would be.
    pub to: Option<String>,
    /// Milliseconds from the closing of the ports here to those of the new primary being open; none for a dry run.
    pub gap_ms: Option<f64>,
}

impl Admin {
    /// Hands the primary role over, to the member named or the one that is furthest. With `dry_run` only the checks.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` also when a check failed or the role has stayed here.
    pub async fn switchover(
        &self,
        _to: Option<&str>,
        _dry_run: bool,
        _by: &str,
    ) -> Result<SwitchoverReport, AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }
}
