//! Passwords: what a new one must be like, and their hashes: argon2id with random salts, a bounded number at once, never on a thread that serves requests.

use std::sync::Arc;

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{auth::LONGEST, errors::ApiError};

/// Hashes at once: each takes 19 MiB and a core for some ten milliseconds.
const AT_ONCE: usize = 2;
/// Requests that may wait for their turn; more are refused.
const WAITING: usize = 128;

/// Shortest password in characters, and shortest strong one.
const SHORTEST: (usize, usize) = (8, 12);

/// Refuses a new password that is too easy to guess. The name is not searched for in weak ones: they are what they are.
pub(super) fn check(name: &str, password: &str, strong: bool) -> Result<(), ApiError> {
    let shortest = if strong { SHORTEST.1 } else { SHORTEST.0 };
    if password.chars().count() < shortest {
        return Err(ApiError::bad(format!("password must have at least {shortest} characters")));
    }
    if password.len() > LONGEST {
        return Err(ApiError::bad(format!("password must have at most {LONGEST} bytes")));
    }
    if !strong {
        return Ok(());
    }
    let kinds: [(&str, fn(char) -> bool); 4] = [
        ("an upper-case letter", char::is_uppercase),
        ("a lower-case letter", char::is_lowercase),
        ("a digit", |c| c.is_ascii_digit()),
        ("a special character", |c| !c.is_alphanumeric()),
    ];
    if let Some((missing, _)) = kinds.iter().find(|(_, is)| !password.contains(*is)) {
        return Err(ApiError::bad(format!("password must have {missing}")));
    }
    if password.to_lowercase().contains(&name.to_lowercase()) {
        return Err(ApiError::bad("password must not contain the user name"));
    }
    Ok(())
}

/// Computes and checks password hashes.
#[derive(Debug)]
pub(super) struct Hasher {
    turn: Arc<Semaphore>,
    waiting: Semaphore,
}

/// The right to compute one hash.
#[derive(Debug)]
pub(super) struct Turn(OwnedSemaphorePermit);

impl Hasher {
    pub(super) fn new() -> Self {
        Self { turn: Arc::new(Semaphore::new(AT_ONCE)), waiting: Semaphore::new(WAITING) }
    }

    /// Waits until a hash may be computed.
    pub(super) async fn turn(&self) -> Result<Turn, ApiError> {
        let busy = || ApiError::Unavailable("too many logins at once".into());
        let _place = self.waiting.try_acquire().map_err(|_| busy())?;
        Ok(Turn(Arc::clone(&self.turn).acquire_owned().await.map_err(|_| busy())?))
    }
}

impl Turn {
    /// The PHC string to store.
    pub(super) async fn hash(self, password: String) -> Result<String, ApiError> {
        self.compute(move || Argon2::default().hash_password(password.as_bytes()).map(|hash| hash.to_string())).await
    }

    /// True if the password belongs to the stored PHC string. Without one (no such user) it takes as long and is false,
    /// so that the time does not tell which users exist.
    pub(super) async fn verify(self, password: String, stored: Option<String>) -> Result<bool, ApiError> {
        self.compute(move || match stored {
            Some(stored) => {
                let stored = PasswordHash::new(&stored)?;
                match Argon2::default().verify_password(password.as_bytes(), &stored) {
                    Err(argon2::password_hash::Error::PasswordInvalid) => Ok(false),
                    other => other.map(|()| true),
                }
            }
            None => Argon2::default().hash_password(password.as_bytes()).map(|_| false),
        })
        .await
    }

    async fn compute<T: Send + 'static>(
        self,
        work: impl FnOnce() -> argon2::password_hash::Result<T> + Send + 'static,
    ) -> Result<T, ApiError> {
        // The permit moves along: a client that goes away does not let a third hash start.
        let done = tokio::task::spawn_blocking(move || {
            let _turn = self.0;
            work()
        });
        match done.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                tracing::error!("cannot compute a password hash: {error}");
                Err(ApiError::Internal)
            }
            Err(_) => Err(ApiError::Unavailable("the Console is stopping".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strong_password_has_all_kinds_and_is_unlike_the_name() {
        check("admin", "12345678", false).unwrap();
        check("admin", "1234567", false).unwrap_err();
        check("admin", &"x".repeat(LONGEST + 1), false).unwrap_err();
        check("admin", "Correct-Horse7", true).unwrap();
        for weak in
            ["Correct-Hor7", "correct-horse7", "CORRECT-HORSE7", "Correct-Horse", "CorrectHorse77", "My-Admin-is-7!"]
        {
            let weak = if weak.len() == 12 { &weak[1..] } else { weak };
            check("admin", weak, true).unwrap_err();
        }
    }
}
