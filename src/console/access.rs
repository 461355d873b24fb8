//! Who may use a route: the roles of users, and the one check that stands before every handler. Must never leave a check
//! to a handler: what a route needs is said in its entry of the table, and nowhere else.

use std::sync::Arc;

use axum::{
    extract::{FromRequestParts, Request, State},
    http::request::Parts,
    middleware::Next,
    response::Response,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Console,
    auth::{self, Source, User},
    errors::ApiError,
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
    /// Any user who is logged in.
    Any,
    /// Users with one of these roles.
    Roles(&'static [Role]),
}

impl Access {
    /// The roles that may; none if no user is asked for.
    pub(super) fn roles(self) -> &'static [Role] {
        match self {
            Self::Open => &[],
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
        let source = Source::from_request_parts(parts, console).await?;
        if self == Self::JoinToken
            && let Some(host) = programs::installer(console, &parts.headers, source)?
        {
            parts.extensions.insert(host);
            return Ok(());
        }
        let user = auth::identify(console, &parts.method, &parts.headers, source).await?;
        let roles = self.roles();
        if !roles.contains(&user.role) {
            let titles: Vec<_> = roles.iter().map(|role| role.title()).collect();
            return Err(ApiError::Forbidden(format!("this needs the role {}", titles.join(" or "))));
        }
        if self == Self::JoinToken {
            parts.extensions.insert(Installer::User(user.clone()));
        }
        parts.extensions.insert(user);
        Ok(())
    }
}

/// Stands before every handler of the table.
pub(super) async fn enforce(
    State((console, access)): State<(Arc<Console>, Access)>,
    request: Request,
    next: Next,
) -> Response {
    let (mut parts, body) = request.into_parts();
    match access.admit(&console, &mut parts).await {
        Ok(()) => {
            // Whoever has logged in keeps the connection when places are short.
            if let Some(visit) = parts.extensions.get::<Visit>().filter(|_| access != Access::Open) {
                visit.vouch();
            }
            next.run(Request::from_parts(parts, body)).await
        }
        Err(error) => programs::refused(&parts, error),
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
    fn roles_are_named_as_they_are_sent() {
        for role in Role::ALL {
            assert_eq!(serde_json::to_value(role).unwrap(), role.name());
            assert_eq!(Role::of(role.name()), Some(role));
        }
        assert_eq!(Role::of("Administrator"), None);
    }
}
