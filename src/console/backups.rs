//! `backups` and `settings/backup`: the list has those of all members, all else is for those of the PRIMARY's host. Every check of a name and every step belongs to
//! [`crate::backup`]. A restore replaces the Console's own database: whoever asked learns of its end after the next login.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body as Bytes,
    extract::State,
    http::{HeaderMap, HeaderValue, Method, header},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    Console,
    errors::ApiError,
    extract::{Body, Name, Page, Paged, Search},
    programs,
    route::{Access, Entry, route},
    user::{Role, User},
};
use crate::backup::{Agreed, Backup, BackupError, BackupState, RemoteBackup, RestoreFrom, Started};

/// How long a client waits for the end of what it has begun; then it looks at `settings/backup`.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether an answer waits for the end.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
struct Patience {
    /// False: the answer comes at once, and `settings/backup` tells the end.
    #[serde(default)]
    wait: Option<bool>,
}

/// The body of [`restore`].
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Confirmed {
    /// The id of the backup once more.
    confirm: String,
    /// It may be one that is not encrypted although the PRIMARY has a key: whoever can write to its folder may have made it.
    #[serde(default)]
    unencrypted: bool,
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let make = "Back up the database; answers when that is done, or after 20 s while it goes on";
    let bring_back =
        "Put a backup in the place of the whole database: closes the Console for a while, and ends all sessions";
    let check = "Open a backup and check all of it; answers as the creation does";
    vec![
        route(
            Method::GET,
            "/backups",
            ADMINISTRATORS,
            "The backups of all members that answer, newest first; `settings/backup` says who did not",
            list,
        )
        .query::<Page>()
        .paged()
        .answer::<Vec<Backup>>(),
        route(Method::POST, "/backups", ADMINISTRATORS, make, create)
            .operates("create", "backup")
            .body::<String>()
            .query::<Patience>()
            .answer::<Started>(),
        route(Method::GET, "/backups/{id}", ADMINISTRATORS, "Download a backup", download)
            .operates("download", "backup")
            .file("application/gzip"),
        route(Method::PATCH, "/backups/{id}", ADMINISTRATORS, "Give a manual backup another name", rename)
            .operates("rename", "backup")
            .body::<String>()
            .answer::<Backup>(),
        route(Method::DELETE, "/backups/{id}", ADMINISTRATORS, "Delete a backup", remove).operates("delete", "backup"),
        route(Method::POST, "/backups/{id}/verify", ADMINISTRATORS, check, verify)
            .operates("verify", "backup")
            .query::<Patience>()
            .answer::<Started>(),
        route(Method::POST, "/backups/{id}/restore", ADMINISTRATORS, bring_back, restore)
            .operates("restore", "backup")
            .body::<Confirmed>()
            .answer::<Started>(),
        route(Method::GET, "/settings/backup", ADMINISTRATORS, "How backups are set up, and what is under way", state)
            .answer::<BackupState>(),
        route(Method::GET, "/settings/backup/copies", ADMINISTRATORS, "The copies at BACKUP_URL, newest first", copies)
            .query::<Page>()
            .paged()
            .answer::<Vec<RemoteBackup>>(),
    ]
}

impl From<BackupError> for ApiError {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Refused(_) | BackupError::Damaged(_) | BackupError::NoSpace { .. } => {
                Self::Conflict(error.to_string())
            }
            BackupError::Name(why) => Self::bad(why),
            BackupError::NotFound(why) => Self::NotFound(why),
            BackupError::Unknown(why) => Self::Unknown(why),
            BackupError::Remote(_) | BackupError::Hangs(_) => Self::Unavailable(error.to_string()),
            BackupError::Io { .. } => {
                tracing::error!("{error}");
                Self::Unavailable(error.to_string())
            }
        }
    }
}

/// `GET backups`.
async fn list(State(console): State<Arc<Console>>, Search(page): Search<Page>) -> Result<Paged<Backup>, ApiError> {
    let (limit, offset) = page.bounds()?;
    let all = console.services()?.backups.all().await?;
    let total = all.len() as i64;
    Ok(Paged { rows: all.into_iter().skip(offset as usize).take(limit as usize).collect(), total })
}

/// `POST backups` with the name as a JSON string.
async fn create(
    State(console): State<Arc<Console>>,
    user: User,
    Search(patience): Search<Patience>,
    Body(name): Body<String>,
) -> Result<Json<Started>, ApiError> {
    let backups = &console.services()?.backups;
    let started = backups.create(&name, &user.actor()).await?;
    ended(&console, started, patience).await
}

/// `POST backups/{id}/verify`.
async fn verify(
    State(console): State<Arc<Console>>,
    user: User,
    Search(patience): Search<Patience>,
    Name(id): Name,
) -> Result<Json<Started>, ApiError> {
    let started = console.services()?.backups.verify(&id, &user.actor()).await?;
    ended(&console, started, patience).await
}

/// `POST backups/{id}/restore`: answers at once, since the Console closes as soon as the backup is found sound.
async fn restore(
    State(console): State<Arc<Console>>,
    user: User,
    Name(id): Name,
    Body(wish): Body<Confirmed>,
) -> Result<Json<Started>, ApiError> {
    if wish.confirm != id {
        return Err(ApiError::bad("confirm: the id of the backup is needed: everything written since is lost"));
    }
    let agreed = Agreed { stop_console: true, unencrypted: wish.unencrypted };
    let backups = &console.services()?.backups;
    Ok(Json(backups.restore(RestoreFrom::Folder(&id), agreed, &user.actor()).await?))
}

/// Waits for a moment, if that is wanted: most databases are small.
async fn ended(console: &Console, started: Started, patience: Patience) -> Result<Json<Started>, ApiError> {
    if patience.wait == Some(false) {
        return Ok(Json(started));
    }
    match console.services()?.backups.wait(started.number, PATIENCE).await {
        Some(outcome) if !outcome.ok => Err(ApiError::Conflict(outcome.text)),
        _ => Ok(Json(started)),
    }
}

/// `GET backups/{id}`.
async fn download(State(console): State<Arc<Console>>, user: User, Name(id): Name) -> Result<Response, ApiError> {
    let slot = programs::slot(&console)?;
    let (file, length) = console.services()?.backups.download(&id, &user.actor()).await?;
    // Such a name has no character that means something in a header.
    let name = HeaderValue::from_str(&format!("attachment; filename=\"{id}\"")).map_err(|_| ApiError::Internal)?;
    let headers = HeaderMap::from_iter([
        (header::CONTENT_TYPE, HeaderValue::from_static("application/gzip")),
        (header::CONTENT_LENGTH, HeaderValue::from(length)),
        (header::CONTENT_DISPOSITION, name),
    ]);
    let body: Bytes = programs::body(file, length, slot);
    Ok((headers, body).into_response())
}

/// `PATCH backups/{id}` with the new name as a JSON string.
async fn rename(
    State(console): State<Arc<Console>>,
    user: User,
    Name(id): Name,
    Body(name): Body<String>,
) -> Result<Json<Backup>, ApiError> {
    let backups = &console.services()?.backups;
    Ok(Json(backups.rename(&id, &name, &user.actor()).await?))
}

/// `DELETE backups/{id}`.
async fn remove(State(console): State<Arc<Console>>, user: User, Name(id): Name) -> Result<(), ApiError> {
    let backups = &console.services()?.backups;
    Ok(backups.delete(&id, &user.actor()).await?)
}

/// `GET settings/backup`.
async fn state(State(console): State<Arc<Console>>) -> Result<Json<BackupState>, ApiError> {
    Ok(Json(console.services()?.backups.state().await))
}

/// `GET settings/backup/copies`.
async fn copies(
    State(console): State<Arc<Console>>,
    Search(page): Search<Page>,
) -> Result<Paged<RemoteBackup>, ApiError> {
    let (limit, offset) = page.bounds()?;
    let all = console.services()?.backups.copies().await?;
    let total = all.len() as i64;
    Ok(Paged { rows: all.into_iter().skip(offset as usize).take(limit as usize).collect(), total })
}
