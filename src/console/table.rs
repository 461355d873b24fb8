//! The table of all routes. The router, the check of roles and the OpenAPI document are made from it, so that none of them can
//! forget a route. Handlers belong to their resource's file.

use std::sync::Arc;

use axum::{Router, middleware};

use super::{
    Console, audits, backups, certs, cluster, drills, enforce, events, logs, notifications, openapi, programs,
    route::Entry, sessions, settings, stream, system, tags, ui, users,
};

/// The routes of all resources.
pub(super) fn table() -> Vec<Entry> {
    [
        system::routes(),
        sessions::routes(),
        users::routes(),
        settings::routes(),
        certs::routes(),
        audits::routes(),
        logs::routes(),
        backups::routes(),
        cluster::routes(),
        drills::routes(),
        events::routes(),
        notifications::routes(),
        programs::routes(),
        tags::routes(),
        stream::routes(),
        ui::routes(),
        openapi::routes(table),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// All routes, each behind the check of its entry.
pub(super) fn router(console: &Arc<Console>) -> Router<Arc<Console>> {
    table().into_iter().fold(Router::new(), |router, entry| {
        let path = entry.full_path();
        let state = (Arc::clone(console), entry.access, entry.trace);
        // On the method alone: that another one is not possible here is no secret.
        router.route(&path, entry.handler.route_layer(middleware::from_fn_with_state(state, enforce::enforce)))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use axum::http::Method;

    use super::{
        super::route::{Access, Trace},
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
            "POST /api/v1/high-availability/requests",
            "POST /api/v1/signup",
        ];
        assert_eq!(open, expected);
    }
}
