//! What a route is: method, path, who may use it, what it needs, what goes in and comes out, and how it is audited.

use std::sync::Arc;

use axum::{
    handler::Handler,
    http::{Method, StatusCode},
    routing::{MethodFilter, MethodRouter, on},
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{Console, ConsoleServices, user::Role};

/// Where the API begins.
pub(super) const BASE: &str = "/api/v1";

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody; the handler gets no `user::User`.
    Open,
    /// A host with a join token, or a user who may make one: the handler takes a `programs::Installer`.
    JoinToken,
    /// A host with a token for Defenders, or a user who may make one: the handler takes a `programs::Installer`.
    DefenderToken,
    /// A host with a token of either kind, or a user who may make one: the handler takes a `programs::Installer`.
    EitherToken,
    /// A drill that is under way, by its token: the handler takes a `drills::Drill`.
    Drill,
    /// Any user who is logged in.
    Any,
    /// Users with one of these roles.
    Roles(&'static [Role]),
}

impl Access {
    /// The roles that may use it; none if it is not for users.
    pub(super) fn roles(self) -> &'static [Role] {
        match self {
            Self::Open | Self::Drill => &[],
            Self::Any => &Role::ALL,
            Self::JoinToken | Self::DefenderToken | Self::EitherToken => Role::INSTALLERS,
            Self::Roles(roles) => roles,
        }
    }
}

/// How the requests of a route are audited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trace {
    /// They change nothing.
    Reads,
    /// The handler writes a row in the transaction of its change, and the check writes one for what is refused. Has the
    /// action, and what it is done to.
    Own(&'static str, &'static str),
    /// The operation writes its own rows, and the check writes one for whoever may not begin it.
    Operation(&'static str, &'static str),
    /// Logins and sessions, and what is part of something that has its own row: the handler decides what is audited.
    Handler,
}

/// Makes the schema of a type.
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

/// The handler, by what it needs.
#[derive(Clone)]
pub(super) enum Work {
    /// The Console with its database: only on the PRIMARY.
    Console(MethodRouter<Arc<Console>>),
    /// Only the node: on every member.
    Member(MethodRouter<ConsoleServices>),
}

/// Where a route is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// On the Console's ports, and on the control socket.
    Everywhere,
    /// Only on the control socket: what is about files of this host, or the host itself.
    Socket,
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
    /// Its type, and whether it must be there.
    pub(super) body: Option<(SchemaOf, bool)>,
    pub(super) query: Option<SchemaOf>,
    pub(super) status: StatusCode,
    pub(super) content: Content,
    /// A media type that the client may ask for instead of JSON.
    pub(super) also: Option<&'static str>,
    /// A list: `limit`, `offset` and `X-Total-Count`.
    pub(super) paged: bool,
    pub(super) reach: Reach,
    pub(super) work: Work,
    /// What answers on the control socket instead.
    pub(super) here: Option<MethodRouter<ConsoleServices>>,
    /// It never waits: see `control::Routes`.
    pub(super) at_once: bool,
}

/// A route below [`BASE`] that needs the Console. `{name}` in the path is what `extract::Name` gives to the handler.
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
    let work = Work::Console(on(filter(&method), handler));
    entry(method, path, access, summary, work)
}

/// A route that needs only the node: on the control socket every member answers, whatever its role.
pub(super) fn node<H, T>(method: Method, path: &'static str, access: Access, summary: &'static str, handler: H) -> Entry
where
    H: Handler<T, ConsoleServices>,
    T: 'static,
{
    let work = Work::Member(on(filter(&method), handler));
    entry(method, path, access, summary, work)
}

/// # Panics
/// With a method that axum has no filter for: a mistake in the table, found by each test.
pub(super) fn filter(method: &Method) -> MethodFilter {
    MethodFilter::try_from(method.clone()).expect("a method of the table is a usual one")
}

fn entry(method: Method, path: &'static str, access: Access, summary: &'static str, work: Work) -> Entry {
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
        reach: Reach::Everywhere,
        work,
        here: None,
        at_once: false,
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

    /// The handler decides what is audited: see [`Trace::Handler`].
    pub(super) fn traced(self) -> Self {
        Self { trace: Trace::Handler, ..self }
    }

    /// The JSON body that the handler takes.
    pub(super) fn body<T: JsonSchema>(self) -> Self {
        Self { body: Some((schema_of::<T>, true)), ..self }
    }

    /// The type of the body, which may be missing.
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

    /// The answer is a part of a list, and the handler says how long the whole is: see `paging::Paged`.
    pub(super) fn paged(self) -> Self {
        Self { paged: true, ..self }
    }

    /// Never on a port, whoever asks.
    pub(super) fn on_socket_alone(self) -> Self {
        Self { reach: Reach::Socket, ..self }
    }

    /// On the control socket this answers instead, on every member.
    pub(super) fn here<H: Handler<T, ConsoleServices>, T: 'static>(self, handler: H) -> Self {
        Self { here: Some(on(filter(&self.method), handler)), ..self }
    }

    /// On the control socket it is answered whatever else waits.
    pub(super) fn at_once(self) -> Self {
        Self { at_once: true, ..self }
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
