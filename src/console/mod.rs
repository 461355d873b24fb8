//! SERVES. The built-in Console: its routes, its resources and its database. One instance per opening of the ports.
//! Must never know about roles, leases or sockets: who runs it decides when it runs.

mod auth;
mod errors;
mod extract;
mod password;
mod store;
mod system;
mod tags;
mod throttle;
mod users;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    http::{HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use sqlx::sqlite::SqliteConnectOptions;
use tokio::sync::watch;

pub use errors::ApiError;
pub use store::{COMMIT, Store, StoreError};

use crate::node::Status;

/// Largest body of a request in bytes.
const BODY: usize = 1 << 20;
/// Longest time from a request's head to its response.
const REQUEST: Duration = Duration::from_secs(30);

/// The Console of one opening.
#[derive(Debug)]
pub struct Console {
    store: Store,
    logins: auth::Logins,
    status: watch::Receiver<Arc<Status>>,
}

impl Console {
    /// Prepares a Console over a database. Nothing is opened yet: see [`Self::ready`].
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn new(
        database: SqliteConnectOptions,
        status: watch::Receiver<Arc<Status>>,
    ) -> Result<Arc<Self>, ring::error::Unspecified> {
        Ok(Arc::new(Self { store: Store::new(database), logins: auth::Logins::new()?, status }))
    }

    /// Opens the database and brings the schema up to date.
    ///
    /// # Errors
    /// When the database cannot be used or its schema is newer than this program.
    pub async fn ready(&self) -> Result<(), sqlx::migrate::MigrateError> {
        self.store.migrate().await
    }

    /// All routes.
    pub fn router(self: &Arc<Self>) -> Router {
        let api = Router::new()
            .route("/_ping", get(system::ping))
            .route("/version", get(system::version))
            .route("/settings/initialized", get(users::initialized))
            .route("/signup", post(users::signup))
            .route("/authenticate", post(auth::authenticate))
            .route("/high-availability", get(system::high_availability))
            .route("/tags", get(tags::list).post(tags::create))
            .route("/tags/{name}", put(tags::replace).delete(tags::remove));
        Router::new()
            .route("/", get(system::index))
            .nest("/api/v1", api)
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
