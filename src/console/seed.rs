//! The first user of a pool: whoever has signed up at the host that waited. The sign-up is acknowledged when this file
//! is on the disk; the user is in the database before any port of the Console opens. Must never replace a user.

use std::{fs, io, net::IpAddr, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    audit_log,
    store::Store,
    user::{From, Role, User},
    users,
};
use crate::storage::{durable_write, fsync_dir};

/// The name of the file in the data folder.
const SEED_FILE: &str = "seed.json";

/// Who has signed up.
#[derive(Clone, Serialize, Deserialize)]
pub struct Seed {
    pub(super) username: String,
    /// The PHC string of the password's hash.
    pub(super) password: String,
    /// Where the sign-up came from.
    pub(super) from: IpAddr,
}

impl Seed {
    /// Keeps it, durably.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, data: &Path) -> Result<()> {
        let path = data.join(SEED_FILE);
        let write = || durable_write(&path, &serde_json::to_vec(self)?);
        write().with_context(|| format!("write {}", path.display()))
    }

    /// Removes the file of a sign-up that was never acknowledged, or that is done.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn forget(data: &Path) -> Result<()> {
        let path = data.join(SEED_FILE);
        match fs::remove_file(&path) {
            Ok(()) => fsync_dir(data).with_context(|| format!("remove {}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
        }
    }

    fn read(data: &Path) -> Result<Option<Self>> {
        let path = data.join(SEED_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let seed = serde_json::from_slice(&text).with_context(|| {
            format!("{} is damaged: remove it, start again, and sign up at the Console at once", path.display())
        })?;
        Ok(Some(seed))
    }
}

/// Makes whoever has signed up the first Administrator, unless there is a user already.
pub(super) async fn plant(store: &Store, data: &Path) -> Result<()> {
    let Some(Seed { username, password, from }) = Seed::read(data)? else { return Ok(()) };
    let mut writing = store.begin().await?;
    if writing.number("SELECT count(*) FROM users").await? == 0 {
        let user = User { name: username, role: Role::Administrator, from: From::Network(from), session: None };
        users::insert(&mut writing, &user.name, password, user.role).await?;
        audit_log::record(&mut writing, &user, "signup", &format!("user '{}'", user.name), Value::Null).await?;
        writing.commit().await?;
        tracing::info!("'{}', who has signed up at this host, is the first administrator", user.name);
    }
    Seed::forget(data)
}

#[cfg(test)]
mod tests {
    use super::{super::test_console::TestConsole, *};

    fn seed(name: &str) -> Seed {
        Seed { username: name.to_owned(), password: "$argon2id$x".to_owned(), from: [192, 0, 2, 1].into() }
    }

    #[tokio::test]
    async fn nobody_becomes_a_second_first_administrator() {
        let (test, folder) = (TestConsole::start().await, tempfile::tempdir().unwrap());
        seed("mallory").save(folder.path()).unwrap();
        plant(&test.console.store, folder.path()).await.unwrap();
        assert!(!folder.path().join(SEED_FILE).exists());
        let mut reading = test.console.store.read().await.unwrap();
        let names: Vec<String> = sqlx::query_scalar("SELECT name FROM users").fetch_all(&mut *reading).await.unwrap();
        assert_eq!(names, ["admin"]);
        plant(&test.console.store, folder.path()).await.unwrap();
    }

    #[tokio::test]
    async fn a_damaged_file_is_told_and_opens_nothing() {
        let (test, folder) = (TestConsole::start().await, tempfile::tempdir().unwrap());
        fs::write(folder.path().join(SEED_FILE), "{").unwrap();
        let why = format!("{:#}", plant(&test.console.store, folder.path()).await.unwrap_err());
        assert!(why.contains("seed.json is damaged"), "{why}");
        assert!(folder.path().join(SEED_FILE).exists());
    }
}
