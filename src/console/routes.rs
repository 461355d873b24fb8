//! The table of all routes: method, path, who may, what goes in and comes out. The router, the check of roles and the
//! OpenAPI document are made from it, so that none of them can forget a route. Handlers belong to their resource's file.

use std::sync::Arc;

use axum::{
    Router,
    handler::Handler,
    http::{Method, StatusCode},
    middleware,
    routing::{MethodFilter, MethodRouter, on},
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

pub(super) use super::access::{Access, Role, Trace};
use super::{
    Console, audits, backups, certs, cluster, drills, events, logs, notifications, openapi, programs, sessions,
    settings, stream, system, tags, ui, users,
};

/// Where the API begins.
pub(super) const BASE: &str = "/api/v1";

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
        openapi::routes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Makes a schema of some type.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// What a successful answer carries.
#[derive(Clone, Copy)]
pub(super) enum Content {
    Nothing,
    Json(SchemaOf),
    /// Anything else, by its media type.
    File(&'static str),
}

/// One route.
pub(super) struct Entry {
    pub(super) method: Method,
    /// Below [`BASE`], or the whole path: see [`Self::at_root`].
    pub(super) path: &'static str,
    pub(super) access: Access,
    pub(super) trace: Trace,
    pub(super) summary: &'static str,
    pub(super) tag: &'static str,
    pub(super) root: bool,
    /// With it, whether it must be there.
    pub(super) body: Option<(SchemaOf, bool)>,
    pub(super) query: Option<SchemaOf>,
    pub(super) status: StatusCode,
    pub(super) content: Content,
    /// What else than JSON the client may ask for.
    pub(super) also: Option<&'static str>,
    /// A list: `limit`, `offset` and `X-Total-Count`.
    pub(super) paged: bool,
    handler: MethodRouter<Arc<Console>>,
}

/// A route below [`BASE`]. `{name}` in the path is what `extract::Name` gives to the handler.
///
/// # Panics
/// With a method that axum has no filter for: a mistake in the table, found by each test.
pub(super) fn route<H, T>(
    method: Method,
    path: &'static str,
    access: Access,
    summary: &'static str,
    handler: H,
) -> Entry
where
    H: Handler<T, Arc<Console>>,
    T: 'static,
{
    let filter = MethodFilter::try_from(method.clone()).expect("a method of the table is a usual one");
    let tag = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    Entry {
        method,
        path,
        access,
        trace: Trace::Reads,
        summary,
        tag,
        root: false,
        body: None,
        query: None,
        status: StatusCode::OK,
        content: Content::Nothing,
        also: None,
        paged: false,
        handler: on(filter, handler),
    }
}

impl Entry {
    /// The handler changes something of the Console's own tables, and writes the row of the audit with it.
    pub(super) fn changes(self, action: &'static str, noun: &'static str) -> Self {
        Self { trace: Trace::Own(action, noun), ..self }
    }

    /// The handler asks for an operation that writes its own rows of the audit.
    pub(super) fn operates(self, action: &'static str, noun: &'static str) -> Self {
        Self { trace: Trace::Operation(action, noun), ..self }
    }

    /// The handler says what of it is written down: see [`Trace::Handler`].
    pub(super) fn traced(self) -> Self {
        Self { trace: Trace::Handler, ..self }
    }

    /// The JSON body that the handler takes.
    pub(super) fn body<T: JsonSchema>(self) -> Self {
        Self { body: Some((schema_of::<T>, true)), ..self }
    }

    /// The same where it may be missing.
    pub(super) fn optional_body<T: JsonSchema>(self) -> Self {
        Self { body: Some((schema_of::<T>, false)), ..self }
    }

    /// The fields of the query string.
    pub(super) fn query<T: JsonSchema>(self) -> Self {
        Self { query: Some(schema_of::<T>), ..self }
    }

    /// The JSON of a success.
    pub(super) fn answer<T: JsonSchema>(self) -> Self {
        Self { content: Content::Json(schema_of::<T>), ..self }
    }

    /// A success that is not JSON, by its media type.
    pub(super) fn file(self, media_type: &'static str) -> Self {
        Self { content: Content::File(media_type), ..self }
    }

    /// Another media type that the client may choose.
    pub(super) fn also(self, media_type: &'static str) -> Self {
        Self { also: Some(media_type), ..self }
    }

    /// The status of a success, if it is not 200.
    pub(super) fn status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// The answer is a part of a list, and the handler says how long the whole is: see `extract::Paged`.
    pub(super) fn paged(self) -> Self {
        Self { paged: true, ..self }
    }

    /// The group in the document, if it is not the first part of the path.
    pub(super) fn tag(self, tag: &'static str) -> Self {
        Self { tag, ..self }
    }

    /// The path is not below [`BASE`]: for what browsers and scrapers expect elsewhere.
    pub(super) fn at_root(self) -> Self {
        Self { root: true, ..self }
    }

    /// As a client writes it.
    pub(super) fn full_path(&self) -> String {
        if self.root { self.path.to_owned() } else { format!("{BASE}{}", self.path) }
    }
}

/// All routes, each behind the check of its entry.
pub(super) fn router(console: &Arc<Console>) -> Router<Arc<Console>> {
    table().into_iter().fold(Router::new(), |router, entry| {
        let path = entry.full_path();
        let state = (Arc::clone(console), entry.access, entry.trace);
        // On the method alone: that another one is not possible here is no secret.
        router.route(&path, entry.handler.route_layer(middleware::from_fn_with_state(state, super::access::enforce)))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

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
