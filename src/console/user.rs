//! Who sends a request: the user, their role and session, and where they are. Must never find that out itself: see
//! [`super::auth`].

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::request::Parts,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::errors::ApiError;
use crate::admin::Actor;

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
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Administrator => "Administrator",
            Self::Operator => "Operator",
            Self::Auditor => "Auditor",
            Self::DefenderManager => "Defender Manager",
        }
    }
}

/// The role of a user, as it is stored. One that only a newer program knows permits nothing here.
pub(super) fn role_of(name: &str, role: &str) -> Result<Role, ApiError> {
    Role::of(role).ok_or_else(|| {
        tracing::error!("user '{name}' has the role '{role}', which this version does not know");
        ApiError::Forbidden("this version does not know your role".to_owned())
    })
}

/// The verified sender of a request. The handler of a route that asks for a login may take it as an argument.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) from: From,
    /// None for a login by Basic, and for whoever comes from within the host.
    pub(super) session: Option<Session>,
}

/// Where a user is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum From {
    Network(IpAddr),
    /// On the host itself, by the control socket: see [`Actor::local`].
    Within(Actor),
}

impl User {
    /// Whoever comes from within the host may do everything.
    pub(super) fn within(actor: Actor) -> Self {
        let (name, role) = (actor.name.clone(), Role::Administrator);
        Self { name, role, from: From::Within(actor), session: None }
    }

    /// The user's name and place for the audit.
    pub(super) fn actor(&self) -> Actor {
        match &self.from {
            From::Network(address) => Actor::user(&self.name, *address),
            From::Within(actor) => actor.clone(),
        }
    }
}

/// The session that a request belongs to.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) digest: Vec<u8>,
    pub(super) began: i64,
    pub(super) expires: i64,
    /// The token came as the page's cookie, and the next one must go the same way.
    pub(super) page: bool,
}

/// A name and a password: the body of `signup` and `authenticate`, or what Basic carries.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

/// The address that a request comes from: what guesses of secrets are counted against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source(pub(super) IpAddr);

impl<S: Send + Sync> FromRequestParts<S> for Source {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        // Whoever serves the connection puts it there.
        let info = parts.extensions.get::<ConnectInfo<SocketAddr>>().ok_or(ApiError::Internal)?;
        Ok(Self(info.0.ip()))
    }
}

/// What the check before the handlers has left for them. If it is missing, the entry in the table is wrong.
pub(super) fn admitted<T: Clone + Send + Sync + 'static>(parts: &Parts) -> Result<T, ApiError> {
    parts.extensions.get().cloned().ok_or_else(|| {
        tracing::error!("the route {} {} does not ask who sends a request", parts.method, parts.uri.path());
        ApiError::Internal
    })
}

impl<S: Send + Sync> FromRequestParts<S> for User {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
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
