//! `service`: the program beside the Console, as an administrator sees it. Owns the roles and the HTTP side; what is
//! done is up to [`crate::service`].

use axum::{Json, extract::State, http::Method};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    ConsoleServices,
    errors::ApiError,
    extract::Search,
    route::{Access, Entry, node},
    user::{Role, User},
};
use crate::{
    admin::{Act, AdminError},
    service::{
        FolderReport, Report, Service,
        output::{KEPT, OutputLine},
    },
};

/// Lines if the client does not say.
const LINES: usize = 200;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    const ADMINISTRATORS: Access = Access::Roles(Role::ADMINISTRATORS);
    let (get, post) = (Method::GET, Method::POST);
    vec![
        node(get.clone(), "/service", Access::Any, "The service beside the Console, on this node", report)
            .answer::<Report>(),
        node(
            get.clone(),
            "/service/databases",
            Access::Any,
            "What is in the folder of the service, on this node",
            folder,
        )
        .answer::<FolderReport>(),
        node(get, "/service/logs", Access::Roles(Role::AUDITORS), "The last lines that the service has written", logs)
            .query::<Wanted>()
            .answer::<Vec<OutputLine>>(),
        node(post.clone(), "/service/start", ADMINISTRATORS, "Start the service that was stopped", start)
            .operates("start", "service")
            .answer::<Report>(),
        node(post.clone(), "/service/stop", ADMINISTRATORS, "Stop the service while this node is PRIMARY", stop)
            .operates("stop", "service")
            .answer::<Report>(),
        node(post, "/service/restart", ADMINISTRATORS, "End the service and start it again", restart)
            .operates("restart", "service")
            .answer::<Report>(),
    ]
}

fn service(services: &ConsoleServices) -> Result<&Service, ApiError> {
    let none = || ApiError::NotFound("there is no service beside the Console: see SERVICE_COMMAND".to_owned());
    services.service.as_ref().ok_or_else(none)
}

/// `GET service`.
async fn report(State(services): State<ConsoleServices>) -> Result<Json<Report>, ApiError> {
    Ok(Json(service(&services)?.report().borrow().clone()))
}

/// `GET service/databases`.
async fn folder(State(services): State<ConsoleServices>) -> Result<Json<FolderReport>, ApiError> {
    Ok(Json(service(&services)?.folder()))
}

/// Which lines are wanted.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Wanted {
    /// At most this many lines; 200 if not given.
    #[schemars(range(min = 1, max = 2000))]
    lines: Option<u32>,
    /// Only those behind the line with this number.
    behind: Option<u64>,
}

/// `GET service/logs`.
async fn logs(
    State(services): State<ConsoleServices>,
    Search(wanted): Search<Wanted>,
) -> Result<Json<Vec<OutputLine>>, ApiError> {
    let lines = wanted.lines.map_or(LINES, |lines| lines as usize);
    if !(1..=KEPT).contains(&lines) {
        return Err(ApiError::bad(format!("lines must be 1 to {KEPT}")));
    }
    Ok(Json(service(&services)?.journal().behind(wanted.behind.unwrap_or(0), lines)))
}

/// Carries out what only makes sense where the service runs.
async fn operate(
    services: &ConsoleServices,
    user: &User,
    action: &'static str,
    work: impl AsyncFnOnce(&Service),
) -> Result<Json<Report>, ApiError> {
    let service = service(services)?;
    let work = async {
        services.admin.check_primary()?;
        work(service).await;
        Ok::<_, AdminError>(service.report().borrow().clone())
    };
    Ok(Json(services.admin.audited(&user.actor(), Act::new(action, "service"), work).await?))
}

/// `POST service/start`.
async fn start(State(services): State<ConsoleServices>, user: User) -> Result<Json<Report>, ApiError> {
    operate(&services, &user, "start", async |service: &Service| service.hold(false).await).await
}

/// `POST service/stop`: it stays so until it is started, or another member takes over.
async fn stop(State(services): State<ConsoleServices>, user: User) -> Result<Json<Report>, ApiError> {
    operate(&services, &user, "stop", async |service: &Service| service.hold(true).await).await
}

/// `POST service/restart`.
async fn restart(State(services): State<ConsoleServices>, user: User) -> Result<Json<Report>, ApiError> {
    operate(&services, &user, "restart", async |service: &Service| service.restart().await).await
}
