//! The table of all routes. The router, the check of roles and the OpenAPI document are made from it, so that none of
//! them can forget a route. Handlers belong to their resource's file.

use std::sync::Arc;

use axum::{Router, middleware, routing::on};

use super::{
    Console, audits, backups, certs, cluster, clustered_db, defenders, drills, enforce,
    errors::ApiError,
    events, logs, notifications, openapi, programs, retention,
    route::{Entry, Reach, Work, filter},
    service, sessions, settings, stream, system, tags, ui, users,
};

/// The routes of all resources.
pub(super) fn table() -> Vec<Entry> {
    [
        system::routes(),
        sessions::routes(),
        users::routes(),
        settings::routes(),
        retention::routes(),
        certs::routes(),
        audits::routes(),
        logs::routes(),
        backups::routes(),
        cluster::routes(),
        clustered_db::routes(),
        drills::routes(),
        defenders::routes(),
        super::defender_script::routes(),
        events::routes(),
        notifications::routes(),
        programs::routes(),
        tags::routes(),
        service::routes(),
        stream::routes(),
        ui::routes(),
        openapi::routes(|| of_ports().collect()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The routes of the ports, which the document describes.
pub(super) fn of_ports() -> impl Iterator<Item = Entry> {
    table().into_iter().filter(|entry| entry.reach == Reach::Everywhere)
}

/// All routes of the ports, each behind the check of its entry.
pub(super) fn router(console: &Arc<Console>) -> Router<Arc<Console>> {
    of_ports().fold(Router::new(), |router, entry| {
        let path = entry.full_path();
        let state = (Arc::clone(console), entry.access, entry.trace);
        let handler = match (entry.work, &console.services) {
            (Work::Console(handler), _) => handler,
            (Work::Member(handler), Some(services)) => handler.with_state(services.clone()),
            (Work::Member(_), None) => on(filter(&entry.method), no_cluster),
        };
        // Only on this method: that another one is not possible here is no secret.
        router.route(&path, handler.route_layer(middleware::from_fn_with_state(state, enforce::enforce)))
    })
}

async fn no_cluster() -> ApiError {
    super::no_cluster()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use axum::http::{Method, StatusCode};
    use serde_json::{Value, json};

    use super::{
        super::{
            route::{Access, Trace},
            test_console::TestConsole,
        },
        *,
    };

    #[test]
    fn the_table_has_no_route_twice_and_says_what_each_is_for() {
        let mut seen = HashSet::new();
        for entry in table() {
            assert!(seen.insert((entry.method.clone(), entry.full_path())), "{} {}", entry.method, entry.path);
            assert!(entry.path.starts_with('/') && (entry.path.len() == 1 || !entry.path.ends_with('/')));
            assert!(!entry.summary.is_empty() && !entry.summary.ends_with('.'), "{}", entry.path);
        }
    }

    /// Not even an Administrator finds them on a port, and no client is told of them.
    #[tokio::test]
    async fn what_is_on_the_control_socket_alone_is_listed_here_and_is_not_on_a_port() {
        let test = TestConsole::start().await;
        let auth = test.login().await;
        let document = test.call(Method::GET, "/api/v1/openapi.json", &auth, Value::Null).await.1;
        let mut alone = Vec::new();
        for entry in table().into_iter().filter(|entry| entry.reach == Reach::Socket) {
            let path = entry.full_path();
            let (status, answer) = test.call(entry.method.clone(), &path, &auth, json!("x")).await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{path}: {answer}");
            assert_eq!(answer["err"], format!("there is nothing at {path}"));
            assert_eq!(document["paths"][&path], Value::Null);
            assert!(matches!(entry.work, Work::Member(_)), "{path} would need a Console");
            alone.push(format!("{} {path}", entry.method));
        }
        let expected = [
            "POST /api/v1/settings/backup/copies/fetch",
            "POST /api/v1/restore",
            "GET /api/v1/high-availability/console",
        ];
        assert_eq!(alone, expected);
    }

    /// A new route that changes something must say here how that gets into the audit.
    #[test]
    fn what_changes_something_says_how_it_gets_into_the_audit() {
        let changing = |entry: &Entry| entry.method != Method::GET && entry.method != Method::HEAD;
        let silent = table().into_iter().filter(|entry| changing(entry) && entry.trace == Trace::Reads);
        assert_eq!(silent.map(|entry| entry.full_path()).collect::<Vec<_>>(), Vec::<String>::new());
        let asked = table().into_iter().filter(|entry| !changing(entry) && entry.trace != Trace::Reads);
        let asked: Vec<_> = asked.map(|entry| entry.path).collect();
        // GETs that bring a secret along, or begin a session.
        let expected = [
            "/authenticate/renew",
            "/backups/{id}",
            "/high-availability/drill/writes",
            "/scripts/defender.sh",
            "/scripts/console.sh",
            "/high-availability/join-script",
        ];
        assert_eq!(asked, expected);
    }

    #[test]
    fn what_is_open_to_everybody_is_listed_here() {
        let open: Vec<_> = table().into_iter().filter(|entry| entry.access == Access::Open).collect();
        let mut open: Vec<_> = open.iter().map(|entry| format!("{} {}", entry.method, entry.full_path())).collect();
        open.sort();
        // A new line here is a decision: nobody is asked who he is.
        let expected = [
            "GET /",
            "GET /api/v1/_ping",
            "GET /api/v1/certs/ca.pem",
            "GET /api/v1/high-availability/requests/{id}",
            "GET /api/v1/settings/initialized",
            "GET /metrics",
            "GET /ui/{name}",
            "POST /api/v1/authenticate",
            "POST /api/v1/defenders/register",
            "POST /api/v1/high-availability/requests",
            "POST /api/v1/signup",
        ];
        assert_eq!(open, expected);
    }
}
