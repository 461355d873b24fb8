//! Changes to the members that there are: removal, another address, a pause of automatic takeovers.

use std::time::Duration;

use super::{Admin, AdminError};

impl Admin {
    /// Drops a member, by its name, its id or the beginning of its name.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` when the rest has no majority that answers, unless `force`.
    pub async fn remove(&self, _member: &str, _force: bool, _by: &str) -> Result<(), AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// No automatic takeover for so long. Returns when the pause ends, in seconds since 1970.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn pause(&self, _span: Duration, _by: &str) -> Result<u64, AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// Ends a pause.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn resume(&self, _by: &str) -> Result<(), AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// A member is called or reached otherwise from now on.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn readdress(
        &self,
        _member: &str,
        _name: Option<String>,
        _address: Option<String>,
        _port: Option<u16>,
        _by: &str,
    ) -> Result<(), AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }
}
