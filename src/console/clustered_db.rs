//! `clustered-db`: the status and the settings of a pool, and the removal of a member. Owns the roles and the HTTP
//! side; what is done is up to [`crate::admin`].

use axum::{Json, extract::State, http::Method};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ConsoleServices,
    errors::ApiError,
    extract::{Body, Name},
    route::{Access, Entry, node},
    user::{Role, User},
};
use crate::{
    admin::{NewMember, PoolAddition, PoolCandidate, PoolRemoval, PoolSettings, PoolStatus, PoolWish},
    clock::unix_time,
};

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let get = Method::GET;
    vec![
        node(get.clone(), "/clustered-db/status", Access::Any, "The state of the pool", status)
            .answer::<PoolStatus>()
            .at_once(),
        node(get, "/clustered-db/settings", Access::Any, "Where the pool is reached", settings)
            .answer::<PoolSettings>(),
        node(Method::POST, "/clustered-db/settings", ADMINISTRATORS, "Change where the pool is reached", configure)
            .operates("configure", "clustered-db/settings")
            .body::<PoolWish>()
            .answer::<PoolSettings>(),
        node(
            Method::POST,
            "/clustered-db/candidates",
            ADMINISTRATORS,
            "Meet hosts that wait, and change nothing",
            look,
        )
        .operates("look at", "member")
        .body::<AddMembers>()
        .answer::<Vec<PoolCandidate>>(),
        node(Method::POST, "/clustered-db/members", ADMINISTRATORS, "Add hosts that wait to the pool", add)
            .operates("add", "member")
            .body::<AddMembers>()
            .answer::<PoolAddition>(),
        node(Method::DELETE, "/clustered-db/members/{address}", ADMINISTRATORS, "Remove a member of the pool", remove)
            .operates("remove", "member")
            .answer::<PoolRemoval>(),
    ]
}

/// `GET clustered-db/status`: the pool as this node sees it.
async fn status(State(services): State<ConsoleServices>) -> Result<Json<PoolStatus>, ApiError> {
    Ok(Json(services.admin.pool_status(unix_time())?))
}

/// `GET clustered-db/settings`.
async fn settings(State(services): State<ConsoleServices>) -> Result<Json<PoolSettings>, ApiError> {
    Ok(Json(services.admin.pool_settings()?))
}

/// `POST clustered-db/settings`: what is missing stays as it is.
async fn configure(
    State(services): State<ConsoleServices>,
    user: User,
    Body(wish): Body<PoolWish>,
) -> Result<Json<PoolSettings>, ApiError> {
    Ok(Json(services.admin.configure_pool(wish, &user.actor()).await?))
}

/// The body of [`add`] and [`look`]: one address, or several hosts.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "AddMemberRequest")]
#[serde(deny_unknown_fields)]
pub struct AddMembers {
    /// Host name or IP address of a host that waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Hosts that wait, with the fingerprints that somebody has compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<Vec<NewMember>>,
}

impl AddMembers {
    fn hosts(self) -> Vec<NewMember> {
        let alone = self.address.map(|address| NewMember { address, fingerprint: None });
        alone.into_iter().chain(self.members.unwrap_or_default()).collect()
    }
}

/// `POST clustered-db/candidates`: who waits at these addresses.
async fn look(
    State(services): State<ConsoleServices>,
    user: User,
    Body(hosts): Body<AddMembers>,
) -> Result<Json<Vec<PoolCandidate>>, ApiError> {
    Ok(Json(services.admin.look_at_hosts(&hosts.hosts(), &user.actor()).await?))
}

/// `POST clustered-db/members`: all of them, or none.
async fn add(
    State(services): State<ConsoleServices>,
    user: User,
    Body(hosts): Body<AddMembers>,
) -> Result<Json<PoolAddition>, ApiError> {
    Ok(Json(services.admin.add_to_pool(hosts.hosts(), &user.actor()).await?))
}

/// `DELETE clustered-db/members/{address}`, with or without the port.
async fn remove(
    State(services): State<ConsoleServices>,
    user: User,
    Name(address): Name,
) -> Result<Json<PoolRemoval>, ApiError> {
    Ok(Json(services.admin.remove_from_pool(&address, &user.actor()).await?))
}
