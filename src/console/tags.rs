//! `tags`: named, coloured labels.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use sqlx::Row;

use super::{
    Console,
    auth::User,
    errors::ApiError,
    extract::{Body, Name, Search},
    store::StoreError,
};

const LONGEST_NAME: usize = 128;
const LONGEST_DESCRIPTION: usize = 1024;
/// Tags in one answer if the client does not say, and at most.
const PAGE: (u32, u32) = (50, 1000);

/// A tag as it is sent and stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tag {
    name: String,
    #[serde(default)]
    color: String,
    #[serde(default)]
    description: String,
}

impl Tag {
    fn check(&self) -> Result<(), ApiError> {
        let length = self.name.chars().count();
        if length == 0 || length > LONGEST_NAME || self.name.contains(char::is_control) {
            return Err(ApiError::bad(format!(
                "name must have 1 to {LONGEST_NAME} characters and no control characters"
            )));
        }
        let digits = self.color.strip_prefix('#').filter(|digits| digits.len() == 6);
        if !self.color.is_empty() && !digits.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Err(ApiError::bad("color must be empty or like #1a2b3c"));
        }
        if self.description.chars().count() > LONGEST_DESCRIPTION {
            return Err(ApiError::bad(format!("description must have at most {LONGEST_DESCRIPTION} characters")));
        }
        Ok(())
    }
}

/// Which part of the list is wanted.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    limit: Option<u32>,
    offset: Option<u32>,
}

/// `GET tags`: a JSON array in the order of the names, paged by `limit` (1 to 1000, 50 if not given) and `offset`.
pub(super) async fn list(
    State(console): State<Arc<Console>>,
    _: User,
    Search(page): Search<Page>,
) -> Result<Json<Vec<Tag>>, ApiError> {
    let limit = page.limit.unwrap_or(PAGE.0);
    if !(1..=PAGE.1).contains(&limit) {
        return Err(ApiError::bad(format!("limit must be 1 to {}", PAGE.1)));
    }
    let mut reading = console.store.read().await?;
    let query = sqlx::query("SELECT name, color, description FROM tags ORDER BY name LIMIT ? OFFSET ?");
    let query = query.bind(limit).bind(page.offset.unwrap_or(0));
    let rows = query.fetch_all(&mut *reading).await.map_err(StoreError::from)?;
    let tags =
        rows.iter().map(|row| Ok(Tag { name: row.try_get(0)?, color: row.try_get(1)?, description: row.try_get(2)? }));
    Ok(Json(tags.collect::<Result<_, sqlx::Error>>().map_err(StoreError::from)?))
}

/// `POST tags`: creates one and answers 200 with it, as the original does (not 201); 409 if the name exists.
pub(super) async fn create(
    State(console): State<Arc<Console>>,
    user: User,
    Body(tag): Body<Tag>,
) -> Result<Json<Tag>, ApiError> {
    tag.check()?;
    let insert = sqlx::query("INSERT INTO tags (name, color, description) VALUES (?, ?, ?)");
    let insert = insert.bind(tag.name.clone()).bind(tag.color.clone()).bind(tag.description.clone());
    console.store.write(insert).await.map_err(|error| exists(&tag.name, error))?;
    tracing::debug!("user '{}' created tag '{}'", user.name, tag.name);
    Ok(Json(tag))
}

/// `PUT tags/{name}`: replaces one, the name too; 404 if there is none, 409 if the new name belongs to another.
pub(super) async fn replace(
    State(console): State<Arc<Console>>,
    user: User,
    Name(name): Name,
    Body(tag): Body<Tag>,
) -> Result<Json<Tag>, ApiError> {
    tag.check()?;
    let update = sqlx::query("UPDATE tags SET name = ?, color = ?, description = ? WHERE name = ?");
    let update = update.bind(tag.name.clone()).bind(tag.color.clone()).bind(tag.description.clone()).bind(name.clone());
    match console.store.write(update).await.map_err(|error| exists(&tag.name, error))? {
        0 => Err(missing(&name)),
        _ => {
            tracing::debug!("user '{}' replaced tag '{name}'", user.name);
            Ok(Json(tag))
        }
    }
}

/// `DELETE tags/{name}`; 404 if there is none.
pub(super) async fn remove(
    State(console): State<Arc<Console>>,
    user: User,
    Name(name): Name,
) -> Result<StatusCode, ApiError> {
    let delete = sqlx::query("DELETE FROM tags WHERE name = ?").bind(name.clone());
    match console.store.write(delete).await? {
        0 => Err(missing(&name)),
        _ => {
            tracing::debug!("user '{}' removed tag '{name}'", user.name);
            Ok(StatusCode::OK)
        }
    }
}

fn missing(name: &str) -> ApiError {
    ApiError::NotFound(format!("there is no tag '{name}'"))
}

fn exists(name: &str, error: StoreError) -> ApiError {
    match error {
        StoreError::Duplicate => ApiError::Conflict(format!("tag '{name}' exists already")),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked_on_both_sides() {
        let tag = |name: &str, color: &str, description: &str| {
            Tag { name: name.into(), color: color.into(), description: description.into() }.check().is_ok()
        };
        assert!(tag("a", "", "") && tag(&"ä".repeat(128), "#09afAF", &"x".repeat(1024)));
        for (name, color, description) in [
            ("", "", String::new()),
            (&*"a".repeat(129), "", String::new()),
            ("a\nb", "", String::new()),
            ("a", "red", String::new()),
            ("a", "#12345g", String::new()),
            ("a", "#1234567", String::new()),
            ("a", "#ä1234", String::new()),
            ("a", "", "x".repeat(1025)),
        ] {
            assert!(!tag(name, color, &description), "{name} {color}");
        }
    }
}
