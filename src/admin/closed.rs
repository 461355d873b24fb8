//! Work for which the Console must be closed while the role stays. Must never leave the ports closed behind it.

use tracing::info;

use super::{AdminError, Operations};

/// Opens the Console again however the work ends.
struct Resume<'a>(&'a Operations);

impl Drop for Resume<'_> {
    fn drop(&mut self) {
        self.0.ports.resume();
    }
}

impl Operations {
    /// Refuses on a node that is not PRIMARY, and names the one that is.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`] with the name of the one that is.
    pub(super) fn check_primary(&self) -> Result<(), AdminError> {
        self.primary().map(|_| ())
    }

    /// Closes the Console, does the work, and opens it again: it returns when the Console is open, or after a few
    /// seconds if that cannot be. No switchover and no change of the membership comes between. The caller must see to
    /// it that the future is not dropped half-way.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`], or `Refused` while a switchover or a change of the membership is under way; nothing
    /// was done then.
    pub(super) async fn with_console_closed<T>(
        &self,
        by: &str,
        what: &'static str,
        work: impl Future<Output = T>,
    ) -> Result<T, AdminError> {
        let Ok(_one) = self.changing.try_lock() else {
            return Err(AdminError::Refused("another change is under way: try again".to_owned()));
        };
        self.check_primary()?;
        info!(by, what, "the Console is closed");
        let resume = Resume(self);
        self.ports.drain(what).await;
        let done = work.await;
        info!(by, what, "the Console may open again");
        drop(resume);
        // Whoever hears that the work is over goes on with the Console.
        self.ports.reopened().await;
        Ok(done)
    }
}
