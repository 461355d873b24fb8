//! Invitations: who may ask to join. Keeps only hashes of secrets; must never say which part of a token was wrong.

use std::{net::IpAddr, time::Duration};

use super::{Admin, AdminError, Invited};

impl Admin {
    /// Makes a join token that is good for `valid`.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn invite(&self, _valid: Duration, _by: &str) -> Result<Invited, AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// Closes all invitations: no token is good any more.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn uninvite(&self, _by: &str) -> Result<(), AdminError> {
        self.primary()?;
        Err(AdminError::Refused(String::new()))
    }

    /// Refuses a join token that is not good (any more), and addresses that have tried too many of them.
    ///
    /// # Errors
    /// [`AdminError::Denied`] or [`AdminError::NotPrimary`].
    pub fn check_token(&self, _token: &str, _from: IpAddr) -> Result<(), AdminError> {
        self.primary()?;
        Err(AdminError::Denied(String::new()))
    }
}
