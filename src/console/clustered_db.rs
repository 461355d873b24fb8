//! `clustered-db`: the status and the settings of a pool, and the removal of a member. Owns the roles and the HTTP side;
//! what is done is up to [`crate::admin`].

use axum::{Json, extract::State, http::Method};

use super::{
    ConsoleServices,
    errors::ApiError,
    extract::{Body, Name},
    route::{Access, Entry, node},
    user::{Role, User},
};
use crate::{
    admin::{PoolRemoval, PoolSettings, PoolStatus, PoolWish},
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

/// `DELETE clustered-db/members/{address}`, with or without the port.
async fn remove(
    State(services): State<ConsoleServices>,
    user: User,
    Name(address): Name,
) -> Result<Json<PoolRemoval>, ApiError> {
    Ok(Json(services.admin.remove_from_pool(&address, &user.actor()).await?))
}
