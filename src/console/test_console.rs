//! A Console over a plain database file, without TLS, supervisor and cluster: for the unit tests of resources. What
//! needs the real thing is tested in tests/console.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{ConnectInfo, Request},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::Scheme},
};
use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use tempfile::TempDir;
use tokio::sync::watch;
use tower::ServiceExt;

use super::Console;
use crate::{
    cluster::{ClusterId, Membership, Role},
    node::Status,
};

pub(super) const PASSWORD: &str = "correct horse";

/// The Console, and what it stands on.
pub(super) struct TestConsole {
    pub(super) console: Arc<Console>,
    router: Router,
    _status: watch::Sender<Arc<Status>>,
    _dir: TempDir,
}

impl TestConsole {
    /// With the Administrator "admin".
    pub(super) async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let options = SqliteConnectOptions::new().filename(dir.path().join("console.db"));
        let options = options.create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
        let (_status, status) = watch::channel(Arc::new(status()));
        let console = Console::new(options, status, None).unwrap();
        console.ready().await.unwrap();
        let router = console.router();
        let test = Self { console, router, _status, _dir: dir };
        let login = json!({ "username": "admin", "password": PASSWORD });
        assert_eq!(test.call(Method::POST, "/api/v1/signup", "", login).await.0, StatusCode::OK);
        test
    }

    /// Logs "admin" in; returns the Authorization header.
    pub(super) async fn login(&self) -> String {
        let login = json!({ "username": "admin", "password": PASSWORD });
        let (status, answer) = self.call(Method::POST, "/api/v1/authenticate", "", login).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        format!("Bearer {}", answer["token"].as_str().unwrap())
    }

    /// A request with JSON or without a body; `auth` may be empty.
    pub(super) async fn call(&self, method: Method, path: &str, auth: &str, body: Value) -> (StatusCode, Value) {
        let mut request = Request::builder().method(method).uri(path);
        if !auth.is_empty() {
            request = request.header(header::AUTHORIZATION, auth);
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let (status, _, text) =
            self.send(request.header(header::CONTENT_TYPE, "application/json").body(body).unwrap()).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(super) async fn send(&self, mut request: Request) -> (StatusCode, HeaderMap, String) {
        request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([192, 0, 2, 1], 1))));
        request.extensions_mut().insert(Scheme::HTTPS);
        request.headers_mut().entry(header::HOST).or_insert(HeaderValue::from_static("console.test"));
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, 1 << 20).await.unwrap();
        (parts.status, parts.headers, String::from_utf8(bytes.to_vec()).unwrap())
    }
}

pub(super) fn status() -> Status {
    Status {
        cluster: ClusterId(1),
        node: 1,
        name: "one".into(),
        version: "0".into(),
        role: Role::Primary,
        reason: String::new(),
        epoch: 1,
        primary: Some(1),
        applied: 0,
        committed: 0,
        lease_ms: None,
        members: Vec::new(),
        membership: Membership::founded(ClusterId(1), Vec::new()),
        warnings: Vec::new(),
        certificates: Vec::new(),
        recent: Default::default(),
        serving: false,
        waiting: None,
    }
}
