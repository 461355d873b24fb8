//! SERVES. The built-in Console: its routes, its resources and its database. One instance per opening of the ports.
//! Must never know about roles, leases or sockets: who runs it decides when it runs.

mod access;
mod audits;
mod auth;
mod cluster;
mod errors;
mod events;
mod extract;
mod notifications;
mod openapi;
mod password;
mod programs;
mod routes;
mod store;
mod system;
mod tags;
mod throttle;
mod users;

use std::{fmt, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    http::{HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use sqlx::sqlite::SqliteConnectOptions;
use tokio::sync::{Semaphore, watch};

pub use errors::ApiError;
pub use store::{COMMIT, Store, StoreError};

use crate::{admin::Admin, events::Recorder, join::Kit, node::Status};

/// Largest body of a request in bytes.
const BODY: usize = 1 << 20;
/// Longest time from a request's head to its response.
const REQUEST: Duration = Duration::from_secs(30);

/// What the Console does for the cluster that it runs in.
#[derive(Clone)]
pub struct Services {
    pub admin: Arc<Admin>,
    /// What new hosts download.
    pub kit: Arc<Kit>,
    /// What has happened.
    pub events: Recorder,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

/// The Console of one opening.
#[derive(Debug)]
pub struct Console {
    store: Store,
    logins: auth::Logins,
    status: watch::Receiver<Arc<Status>>,
    /// None where there is no cluster to administer.
    services: Option<Services>,
    downloads: Arc<Semaphore>,
}

impl Console {
    /// Prepares a Console over a database. Nothing is opened yet: see [`Self::ready`].
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn new(
        database: SqliteConnectOptions,
        status: watch::Receiver<Arc<Status>>,
        services: Option<Services>,
    ) -> Result<Arc<Self>, ring::error::Unspecified> {
        let (store, logins) = (Store::new(database), auth::Logins::new()?);
        let downloads = Arc::new(Semaphore::new(programs::DOWNLOADS));
        Ok(Arc::new(Self { store, logins, status, services, downloads }))
    }

    /// Opens the database and brings the schema up to date.
    ///
    /// # Errors
    /// When the database cannot be used or its schema is newer than this program.
    pub async fn ready(&self) -> Result<(), sqlx::migrate::MigrateError> {
        self.store.migrate().await?;
        if let Some(services) = &self.services {
            tokio::spawn(events::keep(self.store.clone(), services.events.clone()));
        }
        Ok(())
    }

    /// All routes.
    pub fn router(self: &Arc<Self>) -> Router {
        routes::router(self)
            .fallback(no_route)
            .method_not_allowed_fallback(no_method)
            .layer(DefaultBodyLimit::max(BODY))
            .layer(middleware::from_fn(around))
            .with_state(Arc::clone(self))
    }

    /// Closes the database; waits for the statements that run.
    pub async fn stop(&self) {
        self.store.close().await;
    }
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::NotFound(format!("there is nothing at {}", uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::Request(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not possible at {}", uri.path()))
}

/// What is the same for all requests: the time limit and a few headers.
async fn around(request: Request, next: Next) -> Response {
    let mut response = match tokio::time::timeout(REQUEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::Unknown(format!("no answer within {} s", REQUEST.as_secs())).into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
