//! What a route is: method, path, who may, what goes in and comes out, and how it gets into the audit.

use std::sync::Arc;

use axum::{
    handler::Handler,
    http::{Method, StatusCode},
    routing::{MethodFilter, MethodRouter, on},
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{Console, user::Role};

/// Where the API begins.
pub(super) const BASE: &str = "/api/v1";

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody; the handler gets no `user::User`.
    Open,
    /// A host with a join token, or a user who may make one: the handler takes a `programs::Installer`.
    JoinToken,
    /// A drill that is under way, by its token: the handler takes a `drills::Drill`.
    Drill,
    /// Any user who is logged in.
    Any,
    /// Users with one of these roles.
    Roles(&'static [Role]),
}

impl Access {
    /// The roles that may; none if no user is asked for.
    pub(super) fn roles(self) -> &'static [Role] {
        match self {
            Self::Open | Self::Drill => &[],
            Self::Any => &Role::ALL,
            Self::JoinToken => Role::INSTALLERS,
            Self::Roles(roles) => roles,
        }
    }
}

/// How the requests of a route get into the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trace {
    /// They change nothing.
    Reads,
    /// The handler writes a row in the transaction of its change; of what was refused the check writes one: what was to be
    /// done, and to what.
    Own(&'static str, &'static str),
    /// The operation behind it writes what becomes of it; of those who may not begin it the check writes a row.
    Operation(&'static str, &'static str),
    /// Logins and sessions, and what is part of something that has its row: the handler says what of it is written down.
    Handler,
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
    pub(super) handler: MethodRouter<Arc<Console>>,
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
