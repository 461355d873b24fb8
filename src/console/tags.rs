//! `tags`: named, coloured labels.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{Method, StatusCode},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{
    Console,
    audit_log::{self, audited},
    errors::ApiError,
    extract::{Body, Name, Search},
    paging::{Page, Written},
    route::{Access, Entry, route},
    store::{StoreError, Writing},
    user::{Role, User},
};

const LONGEST_NAME: usize = 128;
const LONGEST_DESCRIPTION: usize = 1024;

/// A tag as it is sent and stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(super) struct Tag {
    name: String,
    #[serde(default)]
    color: String,
    #[serde(default)]
    description: String,
}

impl FromRow<'_, SqliteRow> for Tag {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self { name: row.try_get("name")?, color: row.try_get("color")?, description: row.try_get("description")? })
    }
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const OPERATORS: Access = Access::Roles(Role::OPERATORS);
    vec![
        route(Method::GET, "/tags", Access::Any, "All tags, by name", list)
            .query::<Page>()
            .paged()
            .answer::<Vec<Tag>>(),
        route(Method::POST, "/tags", OPERATORS, "Create a tag", create)
            .changes("create", "tag")
            .body::<Tag>()
            .answer::<Tag>(),
        route(Method::PUT, "/tags/{name}", OPERATORS, "Replace a tag", replace)
            .changes("replace", "tag")
            .body::<Tag>()
            .answer::<Tag>(),
        route(Method::DELETE, "/tags/{name}", OPERATORS, "Delete a tag", remove).changes("delete", "tag"),
    ]
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

/// `GET tags`: a JSON array in the order of the names.
pub(super) async fn list(State(console): State<Arc<Console>>, Search(page): Search<Page>) -> Result<Written, ApiError> {
    let (limit, offset) = page.bounds()?;
    // The names are those of `Tag`. The rows keep their order: the inner query has a limit, so it is not taken apart.
    let page = "SELECT json_group_array(json_object('name', name, 'color', color, 'description', description)), \
                (SELECT count(*) FROM tags) \
                FROM (SELECT name, color, description FROM tags ORDER BY name LIMIT +? OFFSET ?)";
    let (rows, total) = console.store.written(sqlx::query_as(page).bind(limit).bind(offset)).await?;
    Ok(Written { rows, total })
}

/// `POST tags`: creates one and answers 200 with it, as the original does (not 201); 409 if the name exists.
pub(super) async fn create(
    State(console): State<Arc<Console>>,
    user: User,
    Body(tag): Body<Tag>,
) -> Result<Json<Tag>, ApiError> {
    tag.check()?;
    let insert = sqlx::query(audited!("INSERT INTO tags (name, color, description) VALUES (?, ?, ?)"));
    let insert = insert.bind(tag.name.clone()).bind(tag.color.clone()).bind(tag.description.clone());
    let (what, difference) = (format!("tag '{}'", tag.name), audit_log::difference(&Value::Null, &tag));
    let insert = audit_log::recorded(insert, &user, "create", &what, difference);
    let mut writing = console.store.begin().await?;
    writing.execute(insert).await.map_err(|error| exists(&tag.name, error))?;
    writing.commit().await?;
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
    let mut writing = console.store.begin().await?;
    let old = stored(&mut writing, &name).await?;
    let update = sqlx::query(audited!("UPDATE tags SET name = ?, color = ?, description = ? WHERE name = ?"));
    let update = update.bind(tag.name.clone()).bind(tag.color.clone()).bind(tag.description.clone()).bind(name.clone());
    let (what, difference) = (format!("tag '{name}'"), audit_log::difference(&old, &tag));
    let update = audit_log::recorded(update, &user, "replace", &what, difference);
    writing.execute(update).await.map_err(|error| exists(&tag.name, error))?;
    writing.commit().await?;
    Ok(Json(tag))
}

/// `DELETE tags/{name}`; 404 if there is none.
pub(super) async fn remove(
    State(console): State<Arc<Console>>,
    user: User,
    Name(name): Name,
) -> Result<StatusCode, ApiError> {
    let mut writing = console.store.begin().await?;
    let old = stored(&mut writing, &name).await?;
    let delete = sqlx::query(audited!("DELETE FROM tags WHERE name = ?")).bind(name.clone());
    let (what, difference) = (format!("tag '{name}'"), audit_log::difference(&old, &Value::Null));
    writing.execute(audit_log::recorded(delete, &user, "delete", &what, difference)).await?;
    writing.commit().await?;
    Ok(StatusCode::OK)
}

/// The tag as it is before a change.
async fn stored(writing: &mut Writing, name: &str) -> Result<Tag, ApiError> {
    let query = sqlx::query_as("SELECT name, color, description FROM tags WHERE name = ?").bind(name.to_owned());
    writing.row(query).await?.ok_or_else(|| ApiError::NotFound(format!("there is no tag '{name}'")))
}

fn exists(name: &str, error: StoreError) -> ApiError {
    match error {
        StoreError::Duplicate => ApiError::Conflict(format!("tag '{name}' exists already")),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::test_console::TestConsole, *};

    #[tokio::test]
    async fn a_list_is_in_the_order_of_the_names_and_has_every_text_as_it_is() {
        let test = TestConsole::start().await;
        let auth = test.login().await;
        let tag = |name: &str, description: &str| json!({ "name": name, "color": "", "description": description });
        let tags = [
            tag("a", "\"quoted\" \\ and / \u{1}\t\r\n\u{8}\u{c}\u{7f}"),
            tag("b\"\\", "</script> \u{2028} \u{fffd} \u{1f600} \u{10ffff}"),
            tag("c", ""),
            tag("ä", "[1] {} null"),
        ];
        for tag in tags.iter().rev() {
            assert_eq!(
                test.call(Method::POST, "/api/v1/tags", &auth, tag.clone()).await,
                (StatusCode::OK, tag.clone())
            );
        }
        let list =
            async |query: &str| test.call(Method::GET, &format!("/api/v1/tags{query}"), &auth, Value::Null).await;
        assert_eq!(list("").await, (StatusCode::OK, json!(tags)));
        assert_eq!(list("?limit=2&offset=1").await, (StatusCode::OK, json!(tags[1..3])));
        assert_eq!(list("?offset=9").await, (StatusCode::OK, json!([])));
    }

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
