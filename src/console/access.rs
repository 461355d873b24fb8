//! Who may use a route: the roles of users, the one check that stands before every handler, and what is written down of those
//! who were refused. Must never leave a check to a handler: what a route needs is said in its entry of the table, and nowhere
//! else.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::{FromRequestParts, RawPathParams, Request, State},
    http::{StatusCode, request::Parts},
    middleware::Next,
    response::Response,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console, audits,
    auth::{self, From, Source, User},
    drills::{self, Drill},
    errors::{ApiError, Reason},
    inside::Within,
    programs,
};
use crate::clients::places::Visit;

/// What a user may do. The names are those of the API and of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Role {
    #[serde(rename = "admin")]
    Administrator,
    Operator,
    Auditor,
    DefenderManager,
}

impl Role {
    pub(super) const ALL: [Self; 4] = [Self::Administrator, Self::Operator, Self::Auditor, Self::DefenderManager];
    /// Who may change the cluster, users and settings.
    pub(super) const ADMINISTRATORS: &'static [Self] = &[Self::Administrator];
    /// Who may change what the Console manages.
    pub(super) const OPERATORS: &'static [Self] = &[Self::Administrator, Self::Operator];
    /// Who may see who did what, and the log.
    pub(super) const AUDITORS: &'static [Self] = &[Self::Administrator, Self::Auditor];
    /// Who may see how the system is set up.
    pub(super) const READERS: &'static [Self] = &[Self::Administrator, Self::Operator, Self::Auditor];
    /// Who may let a host ask to join: Defender Manager or higher.
    pub(super) const INSTALLERS: &'static [Self] = &[Self::Administrator, Self::Operator, Self::DefenderManager];

    /// As the API and the database have it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Administrator => "admin",
            Self::Operator => "operator",
            Self::Auditor => "auditor",
            Self::DefenderManager => "defenderManager",
        }
    }

    /// The role of that name.
    pub(super) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// As people call it.
    fn title(self) -> &'static str {
        match self {
            Self::Administrator => "Administrator",
            Self::Operator => "Operator",
            Self::Auditor => "Auditor",
            Self::DefenderManager => "Defender Manager",
        }
    }
}

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody; the handler gets no [`User`].
    Open,
    /// A host with a join token, or a user who may make one: the handler takes an [`Installer`].
    JoinToken,
    /// A drill that is under way, by its token: the handler takes a [`Drill`].
    Drill,
    /// Any user who is logged in.
    Any,
    /// Users with one of these roles.
    Roles(&'static [Role]),
}

impl Access {
    /// The roles that may; none if no user is asked for.
    pub(super) fn roles(self) -> &'static [Role] {
        match self {
            Self::Open | Self::Drill => &[],
            Self::Any => &Role::ALL,
            Self::JoinToken => Role::INSTALLERS,
            Self::Roles(roles) => roles,
        }
    }

    /// Finds out who sends the request and leaves it for the handler.
    async fn admit(self, console: &Arc<Console>, parts: &mut Parts) -> Result<(), ApiError> {
        if self == Self::Open {
            return Ok(());
        }
        if self == Self::Drill {
            let drill = drills::identify(console, &parts.headers).await?;
            parts.extensions.insert(drill);
            return Ok(());
        }
        if let Some(Within(actor)) = parts.extensions.get().cloned() {
            let (name, role) = (actor.name.clone(), Role::Administrator);
            let user = User { name, role, from: From::Within(actor), session: None };
            parts.extensions.insert(Installer::User(user.clone()));
            parts.extensions.insert(user);
            return Ok(());
        }
        let source = Source::from_request_parts(parts, console).await?;
        if self == Self::JoinToken
            && let Some(host) = programs::installer(console, &parts.headers, source)?
        {
            parts.extensions.insert(host);
            return Ok(());
        }
        let user = auth::identify(console, &parts.method, &parts.headers, source).await?;
        if self == Self::JoinToken {
            parts.extensions.insert(Installer::User(user.clone()));
        }
        let (roles, role) = (self.roles(), user.role);
        // Before the check: whoever may not do it is written down, too.
        parts.extensions.insert(user);
        if !roles.contains(&role) {
            let titles: Vec<_> = roles.iter().map(|role| role.title()).collect();
            return Err(ApiError::Forbidden(format!("this needs the role {}", titles.join(" or "))));
        }
        Ok(())
    }
}

/// How the requests of a route get into the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trace {
    /// They change nothing.
    Reads,
    /// The handler writes a row in the transaction of its change; of what was refused the check writes one: what was to be
    /// done, and to what.
    Own(&'static str, &'static str),
    /// The operation behind it writes what becomes of it; of those who may not begin it the check writes a row.
    Operation(&'static str, &'static str),
    /// Logins and sessions, and what is part of something that has its row: the handler says what of it is written down.
    Handler,
}

/// So many refusals at once are written down, and then one in each such span: whoever may do nothing must not have the
/// cluster write without end.
const REFUSALS: u32 = 50;
const REFUSAL: Duration = Duration::from_millis(200);

/// How many refusals were written down lately.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Option<(u32, Instant)>>);

impl Refusals {
    /// Whether one more may be written down.
    fn take(&self, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
    let admitted = access.admit(&console, &mut parts).await;
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

/// Too many requests are no attempt at anything, and a failed login has its own row.
fn is_refusal(status: StatusCode) -> bool {
    status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS && status != StatusCode::UNAUTHORIZED
}

/// The thing that a request is about, as far as its path says it.
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
    if let Err(error) = audits::note_refusal(&console.store, &user.actor(), action, what, why).await {
        tracing::info!(user = user.name, action, what, why, "a refusal is not in the audit: {error}");
    }
}

/// Who may have the join script and the programs.
#[derive(Clone)]
pub(super) enum Installer {
    User(User),
    /// A host that is no member yet, by its join token.
    Host {
        token: String,
    },
}

/// What [`enforce`] left; its absence is a wrong entry in the table.
fn admitted<T: Clone + Send + Sync + 'static>(parts: &Parts) -> Result<T, ApiError> {
    parts.extensions.get().cloned().ok_or_else(|| {
        tracing::error!("the route {} {} does not ask who sends a request", parts.method, parts.uri.path());
        ApiError::Internal
    })
}

impl FromRequestParts<Arc<Console>> for User {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Console>) -> Result<Self, ApiError> {
        admitted(parts)
    }
}

impl FromRequestParts<Arc<Console>> for Drill {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Console>) -> Result<Self, ApiError> {
        admitted(parts)
    }
}

impl FromRequestParts<Arc<Console>> for Installer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Console>) -> Result<Self, ApiError> {
        admitted(parts)
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

    #[test]
    fn roles_are_named_as_they_are_sent() {
        for role in Role::ALL {
            assert_eq!(serde_json::to_value(role).unwrap(), role.name());
            assert_eq!(Role::of(role.name()), Some(role));
        }
        assert_eq!(Role::of("Administrator"), None);
    }
}
