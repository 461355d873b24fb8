//! SERVES. The built-in Console: its routes, its resources and its database. One instance per opening of the ports.
//! Must never know about roles, leases or sockets: who runs it decides when it runs.

mod arriving;
mod audit_log;
mod audits;
mod auth;
pub mod backups;
pub mod certs;
mod clock;
pub mod cluster;
pub mod clustered_db;
mod cookie;
mod defender_script;
mod defenders;
mod drills;
mod enforce;
mod errors;
mod events;
mod extract;
#[cfg(test)]
mod growth;
mod inside;
mod local;
mod logins;
mod logs;
mod notifications;
mod objects;
mod openapi;
mod paging;
mod password;
mod programs;
mod recent;
mod retention;
mod route;
mod seed;
mod service;
mod sessions;
mod settings;
mod store;
mod stream;
mod system;
mod table;
mod tags;
#[cfg(test)]
mod test_console;
mod tokens;
mod ui;
mod user;
mod users;
mod waiting;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header, uri::Scheme},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use sqlx::sqlite::SqliteConnectOptions;
use tokio::sync::{Semaphore, watch};

use arriving::Arriving;
pub use errors::{ApiError, UNKNOWN};
pub use inside::Inside;
pub use local::{applicant, local};
pub use seed::Seed;
pub use store::{Store, StoreError, connect_options};
pub use waiting::{SignUp, waiting};

use crate::{
    admin::Admin,
    backup::Backups,
    events::{Notifier, Recorder},
    health::MetricsPage,
    http,
    join::JoinAssets,
    node::{Lease, Status},
    service::Service,
    telemetry::steps::{self, Step},
};

/// Largest body of a request in bytes.
const BODY: usize = 1 << 20;
/// Requests under way at once; more are refused, so that a client learns it at once and may try again.
const AT_ONCE: usize = 256;
/// As many of them may change something: the others wait for no COMMIT, and find a place also while all these do.
const CHANGES: usize = 192;
/// The answer to `OPTIONS *`.
const METHODS: &str = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT";
/// Health checks are answered however busy the Console is: a load balancer must not take a busy primary for a dead one.
const PING: &str = "/api/v1/_ping";
/// Longest time from a request's head to its response.
const REQUEST: Duration = Duration::from_secs(30);

/// The headers of every answer that does not set others. An answer of the API is no page: nothing may run in it, and no
/// frame may show it.
const DEFAULT_HEADERS: [(HeaderName, &str); 6] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// What the Console does for the cluster that it runs in.
#[derive(Clone)]
pub struct ConsoleServices {
    pub admin: Arc<Admin>,
    /// How the rest of the process reaches this Console.
    pub inside: Inside,
    pub backups: Arc<Backups>,
    /// What new hosts download.
    pub join_assets: Arc<JoinAssets>,
    /// What has happened.
    pub events: Recorder,
    /// Whom to tell of it.
    pub notifier: Notifier,
    /// What Prometheus reads.
    pub metrics: MetricsPage,
    /// `HIGH_AVAILABILITY_ENABLED` or `CLUSTERED_DB_ENABLED`.
    pub high_availability: bool,
    /// The port of the members' status pages, if they have them.
    pub status_port: Option<u16>,
    /// Whether this node may say that it is PRIMARY.
    pub lease: Lease,
    /// The data folder.
    pub data: PathBuf,
    /// The program beside the Console, if there is one.
    pub service: Option<Service>,
}

impl fmt::Debug for ConsoleServices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleServices").finish_non_exhaustive()
    }
}

/// The Console of one opening.
#[derive(Debug)]
pub struct Console {
    store: Store,
    /// What sessions count by.
    clock: clock::Clock,
    logins: logins::Logins,
    /// Sessions that need not be read.
    recent: recent::Recent,
    status: watch::Receiver<Arc<Status>>,
    /// None where there is no cluster to administer.
    services: Option<ConsoleServices>,
    downloads: Arc<Semaphore>,
    /// A place for each request under way.
    places: Semaphore,
    /// Another one for each that may change something.
    changes: Semaphore,
    streams: Arc<Semaphore>,
    refusals: enforce::Refusals,
    /// Who is connected to the port of the Defenders.
    defenders: Arc<defenders::Hub>,
    /// True when the ports are about to close: nothing may go on for long then.
    closing: watch::Sender<bool>,
}

impl Console {
    /// Prepares a Console over a database. Nothing is opened yet: see [`Self::ready`].
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn new(
        database: SqliteConnectOptions,
        status: watch::Receiver<Arc<Status>>,
        services: Option<ConsoleServices>,
    ) -> Result<Arc<Self>, ring::error::Unspecified> {
        let (store, logins) = (Store::new(database), logins::Logins::new()?);
        let downloads = Arc::new(Semaphore::new(programs::DOWNLOADS));
        let (streams, closing) = (Arc::new(Semaphore::new(stream::STREAMS)), watch::Sender::new(false));
        let (places, changes) = (Semaphore::new(AT_ONCE), Semaphore::new(CHANGES));
        let (clock, refusals) = (clock::Clock::new(), enforce::Refusals::default());
        let (recent, defenders) = (recent::Recent::default(), Arc::default());
        Ok(Arc::new(Self {
            store,
            clock,
            logins,
            recent,
            status,
            services,
            downloads,
            places,
            changes,
            streams,
            refusals,
            defenders,
            closing,
        }))
    }

    /// Opens the database and brings the schema up to date. The one who has made this host the seed of its pool is a
    /// user then, before anybody else can sign up.
    ///
    /// # Errors
    /// When the database cannot be used or its schema is newer than this program.
    pub async fn ready(self: &Arc<Self>) -> anyhow::Result<()> {
        self.store.migrate().await?;
        self.store.supplement().await.unwrap_or_else(|error| {
            tracing::warn!("what the schema lacks could not be made yet: {error}; trying again");
        });
        if let Some(services) = &self.services {
            seed::plant(&self.store, &services.data).await?;
        }
        audit_log::recall_logins(&self.store, &self.logins).await;
        let console = Arc::clone(self);
        tokio::spawn(async move { console.clock.run(console.store.clone()).await });
        tokio::spawn(retention::run(self.store.clone()));
        let events = self.services.as_ref().map(|services| services.events.clone());
        let hub = &self.defenders;
        tokio::spawn(defenders::absence::run(self.store.clone(), Arc::clone(hub), events));
        tokio::spawn(defenders::trust::follow(self.store.clone(), self.status.clone(), Arc::clone(hub)));
        if let Some(services) = &self.services {
            services.inside.opened(self);
            tokio::spawn(events::write_history(self.store.clone(), services.events.clone()));
        }
        Ok(())
    }

    /// All routes.
    pub fn router(self: &Arc<Self>) -> Router {
        table::router(self)
            .fallback(no_route)
            .method_not_allowed_fallback(no_method)
            .layer(DefaultBodyLimit::max(BODY))
            .layer(middleware::from_fn_with_state(Arc::clone(self), around))
            .with_state(Arc::clone(self))
    }

    /// What is on the port of the Defenders.
    pub fn defender_router(self: &Arc<Self>) -> Router {
        defenders::router(self)
    }

    /// Ends what would go on for as long as the client likes, as the ports are about to close.
    pub fn wind_down(&self) {
        self.closing.send_replace(true);
    }

    /// Closes the database; waits for the statements that run.
    pub async fn stop(&self) {
        if let Some(services) = &self.services {
            services.inside.closed();
        }
        self.store.close().await;
    }
}

fn no_cluster() -> ApiError {
    ApiError::NotFound("this Console does not run in a cluster".to_owned())
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::NotFound(format!("there is nothing at {}", uri.path()))
}

/// Refuses a method. The router says in `Allow` which ones are possible.
async fn no_method(method: Method, uri: Uri) -> Response {
    if method == Method::OPTIONS {
        return StatusCode::NO_CONTENT.into_response();
    }
    let text = format!("{method} is not possible at {}", uri.path());
    ApiError::Request(StatusCode::METHOD_NOT_ALLOWED, text).into_response()
}

/// Does what is the same for all requests: limits their number and their time, and sets a few headers.
async fn around(State(console): State<Arc<Console>>, request: Request, next: Next) -> Response {
    let begun = steps::begin();
    let change = (!request.method().is_safe()).then(|| console.changes.try_acquire()).transpose();
    let place = change.and_then(|change| Ok((change, console.places.try_acquire()?)));
    let secure = request.extensions().get() == Some(&Scheme::HTTPS);
    let browser = cookie::is_browser(request.headers());
    let (request, arriving) = Arriving::of(request, arriving::LIMITS);
    let refused = http::refusal(&request, BODY as u64).map(|(status, text)| ApiError::Request(status, text));
    // It may be impossible to tell where its body ends, and nobody wants to wait for that.
    let arriving = arriving.filter(|_| refused.is_none());
    let mut response = if let Some(refused) = refused {
        ([(header::CONNECTION, "close")], refused).into_response()
    } else if http::asks_about_server(&request) {
        (StatusCode::NO_CONTENT, [(header::ALLOW, METHODS)]).into_response()
    } else if place.is_err() && request.uri().path() != PING {
        let text = format!("{AT_ONCE} requests, or {CHANGES} that change something, are under way: try again");
        ApiError::Busy(text).into_response()
    } else {
        match tokio::time::timeout(REQUEST, store::settled(next.run(request))).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => ApiError::from(error).into_response(),
            Err(_) => ApiError::Unknown(format!("no answer within {} s", REQUEST.as_secs())).into_response(),
        }
    };
    begun.end(Step::RequestWhole);
    // What is left to do keeps only the client's connection.
    drop(place);
    if let Some(arriving) = arriving {
        response = arriving.answer(response).await;
    }
    let headers = response.headers_mut();
    if browser && headers.contains_key(header::WWW_AUTHENTICATE) {
        // A browser that hears of Basic asks for a password itself, above the page.
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if secure {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    // The page has its own policies for some of them.
    for (name, value) in DEFAULT_HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::{test_console::TestConsole, *};

    #[tokio::test]
    async fn a_busy_console_refuses_at_once_and_answers_health_checks() {
        let test = TestConsole::start().await;
        let get = |path: &str| Request::builder().uri(path).body(Body::empty()).unwrap();
        let all = test.console.places.acquire_many(AT_ONCE as u32).await.unwrap();
        let (status, headers, text) = test.send(get("/api/v1/settings/initialized")).await;
        assert!(status == 503 && headers.contains_key(header::RETRY_AFTER) && text.contains("try again"), "{text}");
        assert_eq!(test.send(get(PING)).await.0, StatusCode::OK);
        drop(all);
        assert_eq!(test.send(get("/api/v1/settings/initialized")).await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn those_that_read_find_a_place_while_all_others_wait_for_a_commit() {
        let test = TestConsole::start().await;
        let auth = test.login().await;
        let all = test.console.changes.acquire_many(CHANGES as u32).await.unwrap();
        let tag = serde_json::json!({ "name": "a" });
        let post = async || test.call(Method::POST, "/api/v1/tags", &auth, tag.clone()).await.0;
        assert_eq!(post().await, StatusCode::SERVICE_UNAVAILABLE);
        let tags = test.call(Method::GET, "/api/v1/tags", &auth, serde_json::Value::Null).await;
        assert_eq!(tags, (StatusCode::OK, serde_json::json!([])));
        drop(all);
        assert_eq!(post().await, StatusCode::OK);
    }
}
