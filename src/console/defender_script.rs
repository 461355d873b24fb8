//! The script that makes a host a Defender, for those who log in and for hosts with a token; [`super::programs`] gives
//! the program out. Must never make an invitation that is good for nothing.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, Method},
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console,
    defenders::tokens,
    errors::ApiError,
    extract::Body,
    programs::{self, DEFENDER_SCRIPT, Installer, SHELL},
    route::{Access, Entry, route},
    user::{Role, User},
};

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    vec![
        route(Method::GET, DEFENDER_SCRIPT, Access::DefenderToken, "The script that makes a host a Defender", script)
            .changes("invite", "Defenders")
            .file("text/x-shellscript"),
        route(
            Method::POST,
            "/defenders/install-script",
            Access::Roles(Role::INSTALLERS),
            "A new invitation: the line to run on hosts that are to become Defenders",
            line,
        )
        .changes("invite", "Defenders")
        .body::<Wish>()
        .answer::<Line>(),
    ]
}

/// `GET scripts/defender.sh`: for a token, or with a new invitation for a user who logs in.
async fn script(
    State(console): State<Arc<Console>>,
    headers: HeaderMap,
    installer: Installer,
) -> Result<Response, ApiError> {
    let user = match installer {
        Installer::Host { token } => {
            let until = tokens::check(&console, &token).await?.until;
            return Ok(match text(&console, token, until).await {
                Ok(script) => ([SHELL], script).into_response(),
                Err(error) => programs::refusal(DEFENDER_SCRIPT, &error),
            });
        }
        Installer::User(user) => user,
    };
    programs::check_page(&user, &headers)?;
    let (token, until) = tokens::new(&console, None)?;
    let script = text(&console, token.to_string(), until).await?;
    tokens::put_into_force(&console, &user, &token, until).await?;
    Ok(([SHELL], script).into_response())
}

async fn text(console: &Console, token: String, until: i64) -> Result<String, ApiError> {
    let made = programs::with_join_assets(console.services()?, move |assets, membership, me| {
        assets.defender_script(membership, me, &token, until.unsigned_abs())
    });
    made.await
}

/// Which line is wanted.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
struct Wish {
    /// How long the invitation is good: up to 30 days; one day if not given.
    #[schemars(range(min = 1, max = 2_592_000))]
    valid_sec: Option<u32>,
    /// Whether the script itself is wanted, too.
    script: bool,
}

/// A line that makes hosts Defenders. It carries a token.
#[derive(Debug, Serialize, JsonSchema)]
struct Line {
    line: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    script: Option<String>,
    /// In seconds since 1970.
    until: i64,
}

/// `POST defenders/install-script`.
async fn line(
    State(console): State<Arc<Console>>,
    user: User,
    Body(Wish { valid_sec, script }): Body<Wish>,
) -> Result<Json<Line>, ApiError> {
    let services = console.services()?;
    let (token, until) = tokens::new(&console, valid_sec)?;
    let wanted = token.to_string();
    // In any case: if it cannot be made, the line is good for nothing.
    let text = text(&console, wanted.clone(), until).await?;
    let line = programs::with_join_assets(services, move |assets, membership, me| {
        assets.defender_line(membership, me, &wanted)
    });
    let line = line.await?;
    tokens::put_into_force(&console, &user, &token, until).await?;
    Ok(Json(Line { line, script: script.then_some(text), until }))
}
