//! The one check before every handler, and the audit of those whom it refuses. Must never leave a check to a handler:
//! what a route needs stands in its entry of the table, and nowhere else.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    extract::{FromRequestParts, RawPathParams, Request, State},
    http::{StatusCode, request::Parts},
    middleware::Next,
    response::Response,
};

use super::{
    Console, audit_log, auth, drills,
    errors::{ApiError, Reason},
    inside::Within,
    programs::{self, Installer},
    route::{Access, Trace},
    user::{Source, User},
};
use crate::{
    clients::places::Visit,
    mutex::locked,
    telemetry::steps::{self, Step},
};

/// So many refusals at once are audited, and then one in each such span: whoever may do nothing must not make the
/// cluster write without end.
const REFUSALS: u32 = 50;
const REFUSAL: Duration = Duration::from_millis(200);

/// How many refusals were audited lately.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Option<(u32, Instant)>>);

impl Refusals {
    /// True if one more may be audited.
    fn take(&self, now: Instant) -> bool {
        let mut state = locked(&self.0);
        let (used, since) = state.unwrap_or((0, now));
        let spans = now.saturating_duration_since(since).as_millis() / REFUSAL.as_millis();
        let used = used.saturating_sub(u32::try_from(spans).unwrap_or(u32::MAX));
        let since = if used == 0 { now } else { since + REFUSAL * u32::try_from(spans).unwrap_or(0) };
        let free = used < REFUSALS;
        *state = Some((used + u32::from(free), since));
        free
    }
}

/// Stands before every handler of the table.
pub(super) async fn enforce(
    State((console, access, trace)): State<(Arc<Console>, Access, Trace)>,
    request: Request,
    next: Next,
) -> Response {
    let (mut parts, body) = request.into_parts();
    let begun = steps::begin();
    let admitted = admit(access, &console, &mut parts).await;
    begun.end(Step::RequestSession);
    let user = parts.extensions.get::<User>().cloned();
    let named = match trace {
        Trace::Own(_, noun) | Trace::Operation(_, noun) => named(&mut parts, noun).await,
        Trace::Reads | Trace::Handler => String::new(),
    };
    let (response, begun) = match admitted {
        Ok(()) => {
            // Whoever has logged in keeps the connection when places are short.
            if let Some(visit) = parts.extensions.get::<Visit>().filter(|_| access != Access::Open) {
                visit.vouch();
            }
            (next.run(Request::from_parts(parts, body)).await, true)
        }
        Err(error) => (programs::refused(&parts, error), false),
    };
    let action = match trace {
        Trace::Own(action, _) => action,
        Trace::Operation(action, _) if !begun => action,
        _ => return response,
    };
    if let Some(user) = user
        && let Some(Reason(why)) = response.extensions().get()
        && is_refusal(response.status())
    {
        note(&console, &user, (action, &named), why).await;
    }
    response
}

/// Finds out who sends the request and leaves it for the handler.
async fn admit(access: Access, console: &Arc<Console>, parts: &mut Parts) -> Result<(), ApiError> {
    if access == Access::Open {
        return Ok(());
    }
    if access == Access::Drill {
        let drill = drills::identify(console, &parts.headers).await?;
        parts.extensions.insert(drill);
        return Ok(());
    }
    if let Some(Within(actor)) = parts.extensions.get().cloned() {
        let user = User::within(actor);
        parts.extensions.insert(Installer::User(user.clone()));
        parts.extensions.insert(user);
        return Ok(());
    }
    let source = Source::from_request_parts(parts, console).await?;
    let by_token = matches!(access, Access::JoinToken | Access::DefenderToken | Access::EitherToken);
    if by_token && let Some(host) = programs::installer(console, access, &parts.headers, source).await? {
        parts.extensions.insert(host);
        return Ok(());
    }
    let user = auth::identify(console, &parts.method, &parts.headers, source).await?;
    if by_token {
        parts.extensions.insert(Installer::User(user.clone()));
    }
    let (roles, role) = (access.roles(), user.role);
    // Before the check: a refusal is audited with the user's name.
    parts.extensions.insert(user);
    if !roles.contains(&role) {
        let titles: Vec<_> = roles.iter().map(|role| role.title()).collect();
        return Err(ApiError::Forbidden(format!("this needs the role {}", titles.join(" or "))));
    }
    Ok(())
}

/// Too many requests are no attempt at anything, and a failed login has its own row.
fn is_refusal(status: StatusCode) -> bool {
    status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS && status != StatusCode::UNAUTHORIZED
}

/// What a request is about, as far as its path says.
async fn named(parts: &mut Parts, noun: &str) -> String {
    let params = RawPathParams::from_request_parts(parts, &()).await.ok();
    let name = params.as_ref().and_then(|params| params.iter().next().map(|(_, value)| value.to_owned()));
    name.map_or_else(|| noun.to_owned(), |name| format!("{noun} '{name}'"))
}

async fn note(console: &Console, user: &User, (action, what): (&str, &str), why: &str) {
    if !console.refusals.take(Instant::now()) {
        tracing::info!(user = user.name, action, what, why, "a request is refused: too many for the audit");
        return;
    }
    if let Err(error) = audit_log::note_refusal(&console.store, &user.actor(), action, what, why).await {
        tracing::info!(user = user.name, action, what, why, "a refusal is not in the audit: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_refusals_are_written_down_and_no_more() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        assert_eq!((0..2 * REFUSALS).filter(|_| refusals.take(now)).count(), REFUSALS as usize);
        assert!(!refusals.take(now + REFUSAL / 2));
        assert!(refusals.take(now + REFUSAL) && !refusals.take(now + REFUSAL));
        assert_eq!((0..9).filter(|_| refusals.take(now + 4 * REFUSAL)).count(), 3);
    }
}
