//! `backups` and `settings/backup`: the list has the backups of all members; all else is about those of the PRIMARY.
//! Every check of a name and every step belongs to [`crate::backup`]. A restore replaces the Console's own database:
//! whoever asked learns of its end after the next login.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body as Bytes,
    extract::State,
    http::{HeaderMap, HeaderValue, Method, header},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console, ConsoleServices,
    errors::ApiError,
    extract::{Body, Name, Search},
    paging::{Page, Paged},
    programs,
    route::{Access, Entry, node, route},
    user::{Role, User},
};
use crate::backup::{Agreed, Backup, BackupError, BackupState, RemoteBackup, RestoreFrom, Started};

/// How long an answer waits for the end of what was begun. After that, the client asks `settings/backup`.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether an answer waits for the end.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
struct Patience {
    /// False: the answer comes at once, and `settings/backup` tells how it ended.
    #[serde(default)]
    wait: Option<bool>,
}

/// The body of [`restore`].
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Confirmed {
    /// The id of the backup once more.
    confirm: String,
    /// Accept a backup that is not encrypted although the PRIMARY has a key: whoever can write to its folder may have
    /// made it.
    #[serde(default)]
    unencrypted: bool,
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let make = "Back up the database; answers when that is done, or after 20 s while it goes on";
    let bring_back = "Replace the whole database by a backup: closes the Console for a while, and ends all sessions";
    let check = "Open a backup and check all of it; answers as the creation does";
    vec![
        node(
            Method::GET,
            "/backups",
            ADMINISTRATORS,
            "The backups of all members that answer, newest first; `settings/backup` says who did not",
            list,
        )
        .query::<Page>()
        .paged()
        .answer::<Vec<Backup>>(),
        node(Method::POST, "/backups", ADMINISTRATORS, make, create)
            .operates("create", "backup")
            .body::<String>()
            .query::<Patience>()
            .answer::<Started>(),
        route(Method::GET, "/backups/{id}", ADMINISTRATORS, "Download a backup", download)
            .operates("download", "backup")
            .file("application/gzip"),
        node(Method::PATCH, "/backups/{id}", ADMINISTRATORS, "Rename a manual backup", rename)
            .operates("rename", "backup")
            .body::<String>()
            .answer::<Backup>(),
        node(Method::DELETE, "/backups/{id}", ADMINISTRATORS, "Delete a backup", remove).operates("delete", "backup"),
        node(Method::POST, "/backups/{id}/verify", ADMINISTRATORS, check, verify)
            .operates("verify", "backup")
            .query::<Patience>()
            .answer::<Started>(),
        node(Method::POST, "/backups/{id}/restore", ADMINISTRATORS, bring_back, restore)
            .operates("restore", "backup")
            .body::<Confirmed>()
            .answer::<Started>(),
        node(Method::GET, "/settings/backup", ADMINISTRATORS, "How backups are set up, and what is under way", state)
            .answer::<BackupState>(),
        node(Method::GET, "/settings/backup/copies", ADMINISTRATORS, "The copies at BACKUP_URL, newest first", copies)
            .query::<Page>()
            .paged()
            .answer::<Vec<RemoteBackup>>(),
        node(
            Method::POST,
            "/settings/backup/copies/fetch",
            ADMINISTRATORS,
            "Fetch a copy from BACKUP_URL into the folder of this host",
            fetch,
        )
        .operates("fetch", "backup")
        .body::<String>()
        .answer::<Started>()
        .on_socket_alone(),
        node(
            Method::POST,
            "/restore",
            ADMINISTRATORS,
            "Replace the whole database by a backup on this host",
            restore_file,
        )
        .operates("restore", "backup")
        .body::<File>()
        .answer::<Started>()
        .on_socket_alone(),
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
async fn list(State(services): State<ConsoleServices>, Search(page): Search<Page>) -> Result<Paged<Backup>, ApiError> {
    let (limit, offset) = page.bounds()?;
    let all = services.backups.all().await?;
    let total = all.len() as i64;
    Ok(Paged { rows: all.into_iter().skip(offset as usize).take(limit as usize).collect(), total })
}

/// `POST backups` with the name as a JSON string.
async fn create(
    State(services): State<ConsoleServices>,
    user: User,
    Search(patience): Search<Patience>,
    Body(name): Body<String>,
) -> Result<Json<Started>, ApiError> {
    let backups = &services.backups;
    let started = backups.create(&name, &user.actor()).await?;
    ended(&services, started, patience).await
}

/// `POST backups/{id}/verify`.
async fn verify(
    State(services): State<ConsoleServices>,
    user: User,
    Search(patience): Search<Patience>,
    Name(id): Name,
) -> Result<Json<Started>, ApiError> {
    let started = services.backups.verify(&id, &user.actor()).await?;
    ended(&services, started, patience).await
}

/// `POST backups/{id}/restore`: answers at once, since the Console closes as soon as the backup is found sound.
async fn restore(
    State(services): State<ConsoleServices>,
    user: User,
    Name(id): Name,
    Body(wish): Body<Confirmed>,
) -> Result<Json<Started>, ApiError> {
    if wish.confirm != id {
        return Err(ApiError::bad("confirm: the id of the backup is needed: everything written since is lost"));
    }
    let agreed = Agreed { stop_console: true, unencrypted: wish.unencrypted };
    let backups = &services.backups;
    Ok(Json(backups.restore(RestoreFrom::Folder(&id), agreed, &user.actor()).await?))
}

/// `POST settings/backup/copies/fetch` with the place as a JSON string: `CLUSTER/NODE/FILE`, as in the list.
async fn fetch(
    State(services): State<ConsoleServices>,
    user: User,
    Body(place): Body<String>,
) -> Result<Json<Started>, ApiError> {
    Ok(Json(services.backups.fetch(&place, &user.actor()).await?))
}

/// The body of [`restore_file`].
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct File {
    /// The absolute path of the backup on this host.
    pub file: PathBuf,
    /// The administrator agrees that the Console is closed for it; refused otherwise.
    pub stop_console: bool,
    /// Accept a backup that is not encrypted although this host has a key; refused otherwise.
    #[serde(default)]
    pub unencrypted: bool,
}

/// `POST restore`: whoever may do this is on the host, and so is the file.
async fn restore_file(
    State(services): State<ConsoleServices>,
    user: User,
    Body(File { file, stop_console, unencrypted }): Body<File>,
) -> Result<Json<Started>, ApiError> {
    let (from, agreed) = (RestoreFrom::File(&file), Agreed { stop_console, unencrypted });
    Ok(Json(services.backups.restore(from, agreed, &user.actor()).await?))
}

/// Waits a while for the end, if that is wanted: most databases are small.
async fn ended(services: &ConsoleServices, started: Started, patience: Patience) -> Result<Json<Started>, ApiError> {
    if patience.wait == Some(false) {
        return Ok(Json(started));
    }
    match services.backups.wait(started.number, PATIENCE).await {
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
    State(services): State<ConsoleServices>,
    user: User,
    Name(id): Name,
    Body(name): Body<String>,
) -> Result<Json<Backup>, ApiError> {
    let backups = &services.backups;
    Ok(Json(backups.rename(&id, &name, &user.actor()).await?))
}

/// `DELETE backups/{id}`.
async fn remove(State(services): State<ConsoleServices>, user: User, Name(id): Name) -> Result<(), ApiError> {
    let backups = &services.backups;
    Ok(backups.delete(&id, &user.actor()).await?)
}

/// `GET settings/backup`.
async fn state(State(services): State<ConsoleServices>) -> Result<Json<BackupState>, ApiError> {
    Ok(Json(services.backups.state().await))
}

/// `GET settings/backup/copies`.
async fn copies(
    State(services): State<ConsoleServices>,
    Search(page): Search<Page>,
) -> Result<Paged<RemoteBackup>, ApiError> {
    let (limit, offset) = page.bounds()?;
    let all = services.backups.copies().await?;
    let total = all.len() as i64;
    Ok(Paged { rows: all.into_iter().skip(offset as usize).take(limit as usize).collect(), total })
}
