//! The routes of the control socket, from the same table as those of the ports: whoever is at the other end may do
//! everything and needs no login. Every member, whatever its role, answers what needs only the node; for the rest it
//! asks the Console that is open here. Must never be served on a port.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use axum::{
    Router,
    extract::{ConnectInfo, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, on},
};
use tower::ServiceExt;

use super::{
    ConsoleServices,
    cluster::public,
    errors::ApiError,
    inside::Within,
    no_method, no_route,
    route::{BASE, Work, filter},
    table::table,
    user::User,
};
use crate::{
    admin::Actor,
    control::{Peer, Routes, refusal},
    node::Status,
};

/// What a member serves on its control socket.
pub fn local(services: &ConsoleServices) -> Routes {
    let mut routes = Routes::default();
    for entry in table() {
        let path = entry.full_path();
        let handler: MethodRouter<ConsoleServices> = match (entry.here, entry.work) {
            (Some(handler), _) | (None, Work::Member(handler)) => handler,
            (None, Work::Console(_)) => on(filter(&entry.method), ask_console),
        };
        let handler = handler.with_state(services.clone());
        let part = if entry.at_once { &mut routes.at_once } else { &mut routes.operations };
        *part = std::mem::take(part).route(&path, handler);
    }
    let identify = middleware::from_fn_with_state(services.clone(), identify);
    routes.operations =
        routes.operations.fallback(no_route).method_not_allowed_fallback(no_method).layer(identify.clone());
    routes.at_once = routes.at_once.method_not_allowed_fallback(no_method).layer(identify);
    routes
}

/// What a host serves that belongs to no cluster yet: its status, and why all else has to wait.
pub fn applicant(status: impl Fn() -> Arc<Status> + Clone + Send + Sync + 'static, why: &'static str) -> Routes {
    let look = get(async move || public(&status()));
    let refuse = async move || refusal(StatusCode::CONFLICT, why);
    let at_once = Router::new().route(&format!("{BASE}/high-availability"), look);
    Routes { at_once, operations: Router::new().fallback(refuse) }
}

/// Takes whomever the kernel names for the one who acts.
async fn identify(State(services): State<ConsoleServices>, mut request: Request, next: Next) -> Response {
    let Some(Peer { uid, name }) = request.extensions_mut().remove() else { return ApiError::Internal.into_response() };
    let actor = Actor::local(&name, uid, &services.admin.status().name);
    let extensions = request.extensions_mut();
    extensions.insert(User::within(actor.clone()));
    extensions.insert(Within(actor));
    extensions.insert(ConnectInfo(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
    next.run(request).await
}

/// Asks the Console of this host, if it is open.
async fn ask_console(State(services): State<ConsoleServices>, request: Request) -> Response {
    let Some(console) = services.inside.console().await else {
        return ApiError::Conflict(services.inside.elsewhere()).into_response();
    };
    let response = match console.router().oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    // As for an answer through a port: a node that does not know whether it is PRIMARY tells nobody anything.
    if !services.lease.is_valid() {
        let why = "this node lost the primary role meanwhile: look at the status before you try again";
        return ApiError::Unavailable(why.to_owned()).into_response();
    }
    response
}
