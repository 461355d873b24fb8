//! What a host that waits for a pool serves at the Console's HTTPS port: the page's sign-up, which makes it the seed of
//! a pool, and nothing else. There is no database yet. Must never look like a PRIMARY to a load balancer.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::{
    DEFAULT_HEADERS,
    errors::ApiError,
    extract::Body,
    password::{self, Hasher},
    route::BASE,
    seed::Seed,
    settings::Logon,
    ui,
    user::{Login, Source},
    users,
};
use crate::http;

/// Largest body of a request in bytes: a name and a password.
const BODY: usize = 16 << 10;
/// Longest time from a request's head to its response.
const REQUEST: Duration = Duration::from_secs(30);
/// Why everything else has to wait.
const WAITS: &str = "this host waits for a pool and serves nothing yet: sign up to make it the first member of a new one, or \
                     add it to one with twistcli clustered-db add";

/// Somebody wants to make this host the seed of a pool.
pub struct SignUp {
    /// Who will be its first Administrator.
    pub seed: Seed,
    /// Told when the pool is founded, or why not.
    pub answer: oneshot::Sender<Result<(), String>>,
}

/// What the handlers need.
struct Front {
    sign_ups: mpsc::Sender<SignUp>,
    hasher: Hasher,
}

/// What is served while the host waits. Each sign-up that could be is sent on, and answered as its receiver says.
pub fn waiting(sign_ups: mpsc::Sender<SignUp>) -> Router {
    let front = Arc::new(Front { sign_ups, hasher: Hasher::new() });
    Router::new()
        .route("/", get(ui::index))
        .route("/ui/{name}", get(ui::part))
        .route(&format!("{BASE}/settings/initialized"), get(initialized))
        .route(&format!("{BASE}/signup"), post(sign_up))
        .route(&format!("{BASE}/authenticate"), get(nobody))
        .fallback(refuse)
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn(around))
        .with_state(front)
}

/// `GET settings/initialized`.
async fn initialized() -> Json<Value> {
    Json(json!({ "initialized": false }))
}

/// `GET authenticate`: the page asks who is logged in before it asks for a sign-up.
async fn nobody() -> ApiError {
    ApiError::Unauthorized("nobody is logged in at a host that waits for a pool")
}

/// `POST signup`: whoever is first founds the pool.
async fn sign_up(
    State(front): State<Arc<Front>>,
    Source(from): Source,
    Body(Login { username, password }): Body<Login>,
) -> Result<StatusCode, ApiError> {
    users::check_name(&username)?;
    password::check(&username, &password, Logon::default().strong_password())?;
    let password = front.hasher.turn(true).await?.hash(password).await?;
    let (answer, answered) = oneshot::channel();
    let seed = Seed { username, password, from };
    let busy = || ApiError::Conflict("this host is being added to a pool, or signed up, just now".to_owned());
    front.sign_ups.try_send(SignUp { seed, answer }).map_err(|_| busy())?;
    match answered.await {
        Ok(Ok(())) => Ok(StatusCode::OK),
        Ok(Err(why)) => Err(ApiError::Conflict(why)),
        Err(_) => Err(busy()),
    }
}

async fn refuse() -> ApiError {
    ApiError::Unavailable(WAITS.to_owned())
}

/// Limits requests as the Console does, and sets its headers.
async fn around(request: Request, next: Next) -> Response {
    let mut response = match http::refusal(&request, BODY as u64) {
        Some((status, text)) => ApiError::Request(status, text).into_response(),
        None => match tokio::time::timeout(REQUEST, next.run(request)).await {
            Ok(response) => response,
            Err(_) => ApiError::Unavailable(format!("no answer within {} s", REQUEST.as_secs())).into_response(),
        },
    };
    if let Some(challenge) = response.headers_mut().get_mut(header::WWW_AUTHENTICATE) {
        // A browser must not ask for a name and a password: nobody has one yet.
        *challenge = HeaderValue::from_static("Bearer");
    }
    for (name, value) in DEFAULT_HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::{
        body::{Body as Bytes, to_bytes},
        extract::ConnectInfo,
    };
    use tower::ServiceExt;

    use super::*;

    async fn ask(router: &Router, method: &str, path: &str, body: Value) -> (u16, String) {
        let request = Request::builder().method(method).uri(path).header("host", "a");
        let request = request.header("content-type", "application/json");
        let mut request = request.body(Bytes::from(body.to_string())).unwrap();
        request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([192, 0, 2, 7], 1))));
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        assert!(response.headers().contains_key("x-content-type-options"));
        let text = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8_lossy(&text).into_owned())
    }

    #[tokio::test]
    async fn only_a_sign_up_is_taken_and_no_balancer_takes_it_for_a_primary() {
        let (sender, mut sign_ups) = mpsc::channel(1);
        let router = waiting(sender);
        let get = async |path: &str| ask(&router, "GET", path, Value::Null).await;
        assert_eq!(get("/api/v1/settings/initialized").await, (200, "{\"initialized\":false}".to_owned()));
        assert!(get("/").await.1.contains("<html"));
        assert_eq!(get("/ui/login.js").await.0, 200);
        assert_eq!(get("/api/v1/authenticate").await.0, 401, "the page goes on to the sign-up");
        for path in ["/api/v1/_ping", "/api/v1/users", "/api/v1/version", "/metrics", "/nowhere"] {
            let (status, text) = get(path).await;
            assert!(status == 503 && text.contains("waits for a pool"), "{path}: {text}");
        }
        let sign_up = async |name: &str, password: &str| {
            ask(&router, "POST", "/api/v1/signup", json!({"username": name, "password": password})).await
        };
        assert_eq!(sign_up("admin", "short").await.0, 400);
        assert_eq!(sign_up("a:b", "Correct-Horse7").await.0, 400);
        assert!(sign_ups.try_recv().is_err(), "nothing was sent on");
        let (answer, ()) = tokio::join!(sign_up("admin", "Correct-Horse7"), async {
            let SignUp { seed, answer } = sign_ups.recv().await.unwrap();
            assert!(seed.username == "admin" && seed.password.starts_with("$argon2id$"));
            assert_eq!(seed.from.to_string(), "192.0.2.7");
            answer.send(Err("no".to_owned())).unwrap();
        });
        assert_eq!(answer, (409, "{\"err\":\"no\"}".to_owned()));
        let (answer, ()) = tokio::join!(sign_up("admin", "Correct-Horse7"), async {
            sign_ups.recv().await.unwrap().answer.send(Ok(())).unwrap();
        });
        assert_eq!(answer.0, 200);
    }
}
