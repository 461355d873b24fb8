//! `users`, and `settings/initialized` and `signup`: who may log in. Must never let the last Administrator go.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{Method, StatusCode},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{
    Console, audit_log, auth,
    clock::unix_time,
    errors::ApiError,
    extract::{Body, Name, Search},
    paging::{Page, Paged},
    password,
    route::{Access, Entry, route},
    settings::Logon,
    store::{StoreError, Writing},
    tokens,
    user::{From, Login, Role, Source, User},
};

/// Longest name in characters.
const LONGEST_NAME: usize = 64;
/// Most users.
const MOST: i64 = 1000;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let initial = "Whether the first administrator exists";
    vec![
        route(Method::GET, "/settings/initialized", Access::Open, initial, initialized).answer::<Initialized>(),
        route(Method::POST, "/signup", Access::Open, "Create the first administrator, once", signup)
            .traced()
            .body::<Login>(),
        route(Method::GET, "/users", ADMINISTRATORS, "All users, by name", list)
            .query::<Page>()
            .paged()
            .answer::<Vec<Account>>(),
        route(Method::POST, "/users", ADMINISTRATORS, "Create a user", create).changes("create", "user").body::<New>(),
        route(Method::PUT, "/users", ADMINISTRATORS, "Change a user's role or password, or both", change)
            .changes("change", "user")
            .body::<Change>(),
        route(Method::DELETE, "/users/{name}", ADMINISTRATORS, "Delete a user", remove).changes("delete", "user"),
        route(Method::PUT, "/users/password", Access::Any, "Change one's own password", change_password)
            .changes("change", "user")
            .body::<Passwords>(),
    ]
}

/// The answer of [`initialized`].
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Initialized {
    initialized: bool,
}

/// `GET settings/initialized`: whether the first administrator exists. Open to everybody.
async fn initialized(State(console): State<Arc<Console>>) -> Result<Json<Initialized>, ApiError> {
    let mut reading = console.store.read().await?;
    let query = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users)");
    let exists: bool = query.fetch_one(&mut *reading).await.map_err(StoreError::from)?;
    Ok(Json(Initialized { initialized: exists }))
}

/// `POST signup`: creates the first administrator, once.
async fn signup(
    State(console): State<Arc<Console>>,
    Source(from): Source,
    Body(login): Body<Login>,
) -> Result<StatusCode, ApiError> {
    let done = || ApiError::bad("system already initialized");
    check_name(&login.username)?;
    password::check(&login.username, &login.password, Logon::read(&console).await?.strong_password())?;
    // Asked first, so that a password hash is not spent on every attempt; asked again in the transaction.
    let Json(state) = initialized(State(Arc::clone(&console))).await?;
    if state.initialized {
        return Err(done());
    }
    let hash = console.logins.hasher.turn(true).await?.hash(login.password).await?;
    let mut writing = console.store.begin().await?;
    if writing.number("SELECT count(*) FROM users").await? > 0 {
        return Err(done());
    }
    let from = From::Network(from);
    let user = User { name: login.username, role: Role::Administrator, from, session: None };
    insert(&mut writing, &user.name, hash, user.role).await?;
    audit_log::record(&mut writing, &user, "signup", &format!("user '{}'", user.name), Value::Null).await?;
    writing.commit().await?;
    tracing::info!("signed up the first administrator '{}'", user.name);
    Ok(StatusCode::OK)
}

/// A user as others see them.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Account {
    username: String,
    /// As stored: a newer version may know more of them.
    #[schemars(with = "Role")]
    role: String,
    /// Seconds since 1970.
    created: i64,
}

impl FromRow<'_, SqliteRow> for Account {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self { username: row.try_get("username")?, role: row.try_get("role")?, created: row.try_get("created")? })
    }
}

/// `GET users`.
async fn list(State(console): State<Arc<Console>>, Search(page): Search<Page>) -> Result<Paged<Account>, ApiError> {
    let (limit, offset) = page.bounds()?;
    let page = "SELECT name AS username, role, created FROM users ORDER BY name LIMIT +? OFFSET ?; \
                SELECT count(*) FROM users";
    let (rows, total) = console.store.counted(sqlx::query(page).bind(limit).bind(offset)).await?;
    Ok(Paged { rows, total })
}

/// The body of [`create`].
#[derive(Deserialize, JsonSchema)]
pub(super) struct New {
    #[schemars(length(min = 1, max = 64))]
    username: String,
    #[schemars(length(min = 12, max = 1024))]
    password: String,
    role: Role,
}

/// `POST users`.
async fn create(State(console): State<Arc<Console>>, by: User, Body(new): Body<New>) -> Result<StatusCode, ApiError> {
    check_name(&new.username)?;
    password::check(&new.username, &new.password, Logon::read(&console).await?.strong_password())?;
    let hash = console.logins.hasher.turn(true).await?.hash(new.password).await?;
    let mut writing = console.store.begin().await?;
    if writing.number("SELECT count(*) FROM users").await? >= MOST {
        return Err(ApiError::Conflict(format!("there are {MOST} users already: delete some first")));
    }
    insert(&mut writing, &new.username, hash, new.role).await.map_err(|error| match error {
        StoreError::Duplicate => ApiError::Conflict(format!("user '{}' exists already", new.username)),
        other => other.into(),
    })?;
    let difference = audit_log::difference(&Value::Null, &json!({ "role": new.role }));
    audit_log::record(&mut writing, &by, "create", &format!("user '{}'", new.username), difference).await?;
    writing.commit().await?;
    Ok(StatusCode::OK)
}

/// The body of [`change`]; what is missing stays the same.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Change {
    username: String,
    #[schemars(length(min = 12, max = 1024))]
    password: Option<String>,
    role: Option<Role>,
}

/// `PUT users`: ends the sessions of that user.
async fn change(
    State(console): State<Arc<Console>>,
    by: User,
    Body(change): Body<Change>,
) -> Result<StatusCode, ApiError> {
    let Change { username, password, role } = change;
    let mut hash = None;
    if let Some(password) = password {
        password::check(&username, &password, Logon::read(&console).await?.strong_password())?;
        hash = Some(console.logins.hasher.turn(true).await?.hash(password).await?);
    }
    let mut writing = console.store.begin().await?;
    let old = role_in(&mut writing, &username).await?;
    let new = role.map_or_else(|| old.clone(), |role| role.name().to_owned());
    if new != Role::Administrator.name() {
        keep_an_administrator(&mut writing, &username).await?;
    }
    let mut difference = audit_log::difference(&json!({ "role": old }), &json!({ "role": new }));
    if hash.is_some() {
        // Only that it changed.
        difference["password"] = json!("changed");
    }
    let update = sqlx::query("UPDATE users SET role = ?, password = coalesce(?, password) WHERE name = ?");
    writing.execute(update.bind(new).bind(hash).bind(username.clone())).await?;
    if difference != json!({}) {
        tokens::end_all(&mut writing, &username).await?;
    }
    audit_log::record(&mut writing, &by, "change", &format!("user '{username}'"), difference).await?;
    writing.commit().await?;
    Ok(StatusCode::OK)
}

/// `DELETE users/{name}`: ends the sessions of that user.
async fn remove(State(console): State<Arc<Console>>, by: User, Name(name): Name) -> Result<StatusCode, ApiError> {
    if name == by.name {
        return Err(ApiError::Conflict("nobody can delete themselves: another Administrator can".to_owned()));
    }
    let mut writing = console.store.begin().await?;
    let role = role_in(&mut writing, &name).await?;
    keep_an_administrator(&mut writing, &name).await?;
    // Their tokens go with them.
    writing.execute(sqlx::query("DELETE FROM users WHERE name = ?").bind(name.clone())).await?;
    let difference = audit_log::difference(&json!({ "role": role }), &Value::Null);
    audit_log::record(&mut writing, &by, "delete", &format!("user '{name}'"), difference).await?;
    writing.commit().await?;
    Ok(StatusCode::OK)
}

/// The body of [`change_password`].
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Passwords {
    old_password: String,
    #[schemars(length(min = 12, max = 1024))]
    new_password: String,
}

/// `PUT users/password`: ends all sessions of this user, the one that asks too.
async fn change_password(
    State(console): State<Arc<Console>>,
    user: User,
    Body(passwords): Body<Passwords>,
) -> Result<StatusCode, ApiError> {
    let Passwords { old_password, new_password } = passwords;
    let From::Network(from) = user.from else {
        return Err(ApiError::bad("a request from within the host has no password: name a user"));
    };
    password::check(&user.name, &new_password, Logon::read(&console).await?.strong_password())?;
    let login = Login { username: user.name.clone(), password: old_password };
    let verified = auth::verify(&console, login, from).await.map_err(|error| match error {
        // 401 would say that the session is over.
        ApiError::Unauthorized(_) => ApiError::Forbidden("the old password is wrong".to_owned()),
        other => other,
    })?;
    let hash = console.logins.hasher.turn(true).await?.hash(new_password).await?;
    let mut writing = console.store.begin().await?;
    verified.recheck(&mut writing, &user.name).await?;
    let update = sqlx::query("UPDATE users SET password = ? WHERE name = ?").bind(hash).bind(user.name.clone());
    writing.execute(update).await?;
    tokens::end_all(&mut writing, &user.name).await?;
    let difference = json!({ "password": "changed" });
    audit_log::record(&mut writing, &user, "change", &format!("user '{}'", user.name), difference).await?;
    writing.commit().await?;
    Ok(StatusCode::OK)
}

/// Adds a user, whose password is a PHC string.
///
/// # Errors
/// As those of [`Writing::execute`].
pub(super) async fn insert(writing: &mut Writing, name: &str, hash: String, role: Role) -> Result<(), StoreError> {
    let insert = sqlx::query("INSERT INTO users (name, password, role, created) VALUES (?, ?, ?, ?)");
    let insert = insert.bind(name.to_owned()).bind(hash).bind(role.name()).bind(unix_time());
    writing.execute(insert).await.map(|_| ())
}

/// The role of a user, as stored.
async fn role_in(writing: &mut Writing, name: &str) -> Result<String, ApiError> {
    let query = sqlx::query_scalar("SELECT role FROM users WHERE name = ?").bind(name.to_owned());
    let role: Option<String> = writing.value(query).await?;
    role.ok_or_else(|| ApiError::NotFound(format!("there is no user '{name}'")))
}

/// Refuses what would leave nobody who could undo it.
async fn keep_an_administrator(writing: &mut Writing, without: &str) -> Result<(), ApiError> {
    let query = sqlx::query_scalar("SELECT count(*) FROM users WHERE role = ? AND name <> ?");
    let query = query.bind(Role::Administrator.name()).bind(without.to_owned());
    let others: Option<i64> = writing.value(query).await?;
    if others.unwrap_or_default() == 0 {
        return Err(ApiError::Conflict("this is the last Administrator: make another one first".to_owned()));
    }
    Ok(())
}

/// Refuses a name that Basic cannot carry, that does not fit into a path, or that people cannot tell from another.
pub(super) fn check_name(name: &str) -> Result<(), ApiError> {
    let length = name.chars().count();
    let odd = |c: char| {
        c.is_control()
            || c == ':'
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    if length == 0 || length > LONGEST_NAME || name.contains(odd) || name.trim() != name {
        return Err(ApiError::bad(format!(
            "username must have 1 to {LONGEST_NAME} characters, no ':', no blanks around it and no invisible characters"
        )));
    }
    if matches!(name, "." | ".." | "password") {
        // Clients take dots out of a path, and `users/password` is another resource.
        return Err(ApiError::bad("username must not be \".\", \"..\" or \"password\""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_people_can_tell_apart() {
        for good in ["a", "Jörg Müller", "x@example.org", "a/b", "%2e", &"ä".repeat(64)] {
            check_name(good).unwrap();
        }
        for bad in
            ["", " a", "a ", "a:b", "a\nb", "a\u{202e}b", "a\u{200b}", ".", "..", "password", "\0", &"a".repeat(65)]
        {
            check_name(bad).unwrap_err();
        }
    }
}
