//! What a new host downloads: the join script, the programs, the CA certificate. Open to those who log in and to those
//! who have a join token; the certificate to everybody. Must never read a program into memory as a whole.

use std::{
    fs::File,
    io::{self, Read},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use hyper::body::{Bytes, Frame, SizeHint};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{
        OwnedSemaphorePermit,
        mpsc::{self, error::SendTimeoutError},
    },
    task,
};

use super::{
    Console, ConsoleServices, auth,
    cluster::check_join_token,
    cookie,
    defenders::tokens,
    errors::ApiError,
    extract::{Name, Search},
    route::{Access, BASE, Entry, route},
    user::{Role, Source, User, admitted},
};
use crate::{
    admin::Invited,
    cluster::{Membership, program_version},
    join::{self, JoinAssets, JoinAssetsError, Program, Purpose},
};

/// Where the join script is.
const SCRIPT: &str = "/scripts/console.sh";
/// Where the script is that makes a host a Defender.
pub(super) const DEFENDER_SCRIPT: &str = "/scripts/defender.sh";
pub(super) const SHELL: (HeaderName, &str) = (header::CONTENT_TYPE, "text/x-shellscript; charset=utf-8");
/// How long an invitation that comes with a script or a line is valid, if nothing else is wanted.
const VALID: Duration = Duration::from_secs(3600);
/// Bytes of a program that are read at a time, and how many such pieces wait for a slow client.
const PIECE: usize = 64 << 10;
const PIECES: usize = 4;
/// Longest time until a client has taken a piece. Pieces go in bursts of some hundred KiB.
const PIECE_TIME: Duration = Duration::from_secs(30);
/// Downloads at once: each has a thread.
pub(super) const DOWNLOADS: usize = 8;

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let get = Method::GET;
    let programs = "A program that a new host needs: twistlockd, twistcli or defender";
    vec![
        route(get.clone(), SCRIPT, Access::JoinToken, "The join script", script)
            .operates("invite", "high availability")
            .file("text/x-shellscript"),
        route(get.clone(), "/programs/{name}", Access::EitherToken, programs, program).file("application/octet-stream"),
        route(get.clone(), "/certs/ca.pem", Access::Open, "The CA certificate of the cluster", ca)
            .file("application/x-pem-file"),
        route(
            get,
            "/high-availability/join-script",
            Access::Roles(Role::INSTALLERS),
            "A new invitation: the line to run on the other hosts",
            line,
        )
        .here(own_line)
        .operates("invite", "high availability")
        .query::<Wish>()
        .answer::<Line>(),
    ]
}

impl From<JoinAssetsError> for ApiError {
    fn from(error: JoinAssetsError) -> Self {
        match error {
            JoinAssetsError::NoHttps
            | JoinAssetsError::NoAuthority
            | JoinAssetsError::NoDefenderPort
            | JoinAssetsError::NoProgram(_) => Self::Conflict(error.to_string()),
            JoinAssetsError::Token => Self::Forbidden(error.to_string()),
            JoinAssetsError::Program(_) => {
                tracing::error!("{error}");
                Self::Internal
            }
        }
    }
}

/// `GET scripts/console.sh`: the join script, for a join token, or with a new invitation for a user who logs in.
pub(super) async fn script(
    State(console): State<Arc<Console>>,
    headers: HeaderMap,
    installer: Installer,
) -> Result<Response, ApiError> {
    let (token, host) = match installer {
        Installer::Host { token } => (token, true),
        Installer::User(user) => {
            check_page(&user, &headers)?;
            (invite(console.services()?, &user, VALID).await?.token, false)
        }
    };
    match with_join_assets(console.services()?, move |assets, membership, me| assets.script(membership, me, &token))
        .await
    {
        Ok(script) => Ok(([SHELL], script).into_response()),
        Err(error) if host => Ok(refusal(SCRIPT, &error)),
        Err(error) => Err(error),
    }
}

/// A refusal for a shell: whoever runs a line must read why it no longer works.
pub(super) fn refusal(script: &str, error: &ApiError) -> Response {
    let status = error.status();
    let later = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
    let purpose = if script == SCRIPT { Purpose::Join } else { Purpose::Defender };
    (status, [SHELL], join::refusal(purpose, &error.to_string(), later)).into_response()
}

/// The answer to a request that is not admitted.
pub(super) fn refused(parts: &Parts, error: ApiError) -> Response {
    let scripts = [SCRIPT, DEFENDER_SCRIPT];
    let script = parts.uri.path().strip_prefix(BASE).filter(|path| scripts.contains(path));
    match script.filter(|_| auth::join_token(&parts.headers).is_some()) {
        Some(script) => refusal(script, &error),
        None => error.into_response(),
    }
}

/// Which join line is wanted.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Wish {
    /// How long the invitation is valid: up to seven days; one hour if not given.
    #[schemars(range(min = 1, max = 604_800))]
    valid_sec: Option<u32>,
    /// Whether the script itself is wanted, too.
    #[serde(default)]
    script: bool,
}

/// A join line.
#[derive(Serialize, JsonSchema)]
pub(super) struct Line {
    line: String,
    script_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    script: Option<String>,
    /// Its id among the `invitations` of the status, for as long as it is valid.
    id: String,
    until: u64,
}

/// `GET high-availability/join-script`: a new invitation, as the line to run on the other hosts.
pub(super) async fn line(
    State(console): State<Arc<Console>>,
    headers: HeaderMap,
    user: User,
    wish: Search<Wish>,
) -> Result<Json<Line>, ApiError> {
    check_page(&user, &headers)?;
    own_line(State(console.services()?.clone()), user, wish).await
}

/// The join line on the control socket, which serves no page.
async fn own_line(
    State(services): State<ConsoleServices>,
    user: User,
    Search(wish): Search<Wish>,
) -> Result<Json<Line>, ApiError> {
    let valid = wish.valid_sec.map_or(VALID, |seconds| Duration::from_secs(seconds.into()));
    let Invited { id, token, until, .. } = invite(&services, &user, valid).await?;
    let make = move |assets: &JoinAssets, membership: &Membership, me| {
        let script = wish.script.then(|| assets.script(membership, me, &token)).transpose()?;
        Ok((assets.line(membership, me, &token)?, assets.url(membership, me)?, script))
    };
    let (line, script_url, script) = with_join_assets(&services, make).await?;
    Ok(Json(Line { line, script_url, script, id, until }))
}

/// A new invitation is a change, whatever the method of its request: no other site may have a browser make one.
pub(super) fn check_page(user: &User, headers: &HeaderMap) -> Result<(), ApiError> {
    match &user.session {
        Some(session) if session.page => cookie::check_page(headers),
        _ => Ok(()),
    }
}

async fn invite(services: &ConsoleServices, user: &User, valid: Duration) -> Result<Invited, ApiError> {
    Ok(services.admin.invite(valid, &user.actor()).await?)
}

/// Runs something that may have to compute a checksum.
pub(super) async fn with_join_assets<T: Send + 'static>(
    services: &ConsoleServices,
    make: impl FnOnce(&JoinAssets, &Membership, u64) -> Result<T, JoinAssetsError> + Send + 'static,
) -> Result<T, ApiError> {
    let (assets, me) = (Arc::clone(&services.join_assets), services.admin.status().node);
    // Not that of the status, which lacks an invitation that was made a moment ago.
    let membership = services.admin.membership();
    let made = task::spawn_blocking(move || make(&assets, &membership, me)).await.map_err(|_| ApiError::Internal)?;
    Ok(made?)
}

/// `GET certs/ca.pem`: the CA certificate. Whoever fetches it without knowing it already must compare its fingerprint.
pub(super) async fn ca(
    State(console): State<Arc<Console>>,
) -> Result<([(HeaderName, &'static str); 1], String), ApiError> {
    let status = console.status.borrow().clone();
    let membership = &status.membership;
    // With the one that will sign before long, so that clients have it in time.
    let pem = membership.shared.authority.as_ref().map(|sealed| match &membership.shared.coming {
        Some(coming) => format!("{}{}", sealed.certificate, coming.authority.certificate),
        None => sealed.certificate.clone(),
    });
    let pem = pem.ok_or_else(|| ApiError::NotFound(JoinAssetsError::NoAuthority.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/x-pem-file")], pem))
}

/// `GET` and `HEAD programs/{twistlockd, twistcli or defender}`: the program that runs here, with its SHA-256 and
/// architecture.
pub(super) async fn program(
    State(console): State<Arc<Console>>,
    _: Installer,
    method: Method,
    Name(name): Name,
) -> Result<Response, ApiError> {
    let slot = slot(&console)?;
    let wanted = name.clone();
    let found = with_join_assets(console.services()?, move |assets, _, _| Ok(assets.program(&wanted)?)).await?;
    let all = "twistlockd is there, and twistcli and defender if they are installed beside it";
    let none = || ApiError::NotFound(format!("there is no program {name:?}: {all}"));
    let Program { file, length, sha256 } = found.ok_or_else(none)?;
    let text = |value: &str| HeaderValue::from_str(value).map_err(|_| ApiError::Internal);
    let headers = HeaderMap::from_iter([
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, HeaderValue::from(length)),
        (HeaderName::from_static("x-sha256"), text(&sha256)?),
        (HeaderName::from_static("x-architecture"), HeaderValue::from_static(std::env::consts::ARCH)),
        (HeaderName::from_static("x-version"), HeaderValue::from_static(program_version())),
    ]);
    if method == Method::HEAD {
        return Ok(headers.into_response());
    }
    Ok((headers, body(file, length, slot)).into_response())
}

/// Takes one of the places for downloads.
pub(super) fn slot(console: &Console) -> Result<OwnedSemaphorePermit, ApiError> {
    let busy = |_| ApiError::Unavailable(format!("{DOWNLOADS} downloads are under way: try again"));
    Arc::clone(&console.downloads).try_acquire_owned().map_err(busy)
}

/// The first `length` bytes of a file as the body of a response.
pub(super) fn body(file: File, length: u64, slot: OwnedSemaphorePermit) -> axum::body::Body {
    let (sender, pieces) = mpsc::channel(PIECES);
    task::spawn_blocking(move || {
        read_pieces(file, length, &sender, PIECE_TIME);
        drop(slot);
    });
    axum::body::Body::new(Download { pieces, left: length })
}

/// Reads until the end. After an error, or when the client is gone or too slow, the body ends too early, and the
/// connection with it. Runs on a thread that may wait.
fn read_pieces(mut file: File, length: u64, sender: &mpsc::Sender<io::Result<Bytes>>, limit: Duration) {
    let runtime = Handle::current();
    let mut left = length;
    while left > 0 {
        let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
        let read = file.read_exact(&mut piece);
        left -= piece.len() as u64;
        let failed = read.is_err();
        let sent = runtime.block_on(sender.send_timeout(read.map(|()| piece.into()), limit));
        if let Err(SendTimeoutError::Timeout(_)) = &sent {
            tracing::info!(left, "a download is given up: its client is too slow");
        }
        if sent.is_err() || failed {
            return;
        }
    }
}

/// A body whose length is known and whose pieces come from a thread.
struct Download {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    left: u64,
}

impl hyper::body::Body for Download {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let piece = std::task::ready!(self.pieces.poll_recv(context));
        if let Some(Ok(bytes)) = &piece {
            self.left -= bytes.len() as u64;
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Who may have the join script and the programs.
#[derive(Clone)]
pub(super) enum Installer {
    User(User),
    /// A host that is no member yet, with its join token.
    Host {
        token: String,
    },
}

impl FromRequestParts<Arc<Console>> for Installer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Console>) -> Result<Self, ApiError> {
        admitted(parts)
    }
}

/// The host that asks, if it has a token, which must be one of those that the route admits.
pub(super) async fn installer(
    console: &Console,
    access: Access,
    headers: &HeaderMap,
    Source(from): Source,
) -> Result<Option<Installer>, ApiError> {
    let Some(token) = auth::join_token(headers) else { return Ok(None) };
    let invited = match access {
        Access::DefenderToken => tokens::check(console, &token).await.map(|_| true)?,
        Access::EitherToken => tokens::check(console, &token).await.is_ok(),
        _ => false,
    };
    if !invited {
        check_join_token(console, &token, from)?;
    }
    Ok(Some(Installer::Host { token }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_takes_nothing_does_not_keep_its_slot() {
        let mut file = tempfile::tempfile().unwrap();
        let length = (PIECE * (PIECES + 2)) as u64;
        file.set_len(length).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        let (sender, mut pieces) = mpsc::channel(PIECES);
        let reader = task::spawn_blocking(move || read_pieces(file, length, &sender, Duration::from_millis(50)));
        reader.await.unwrap();
        for _ in 0..PIECES {
            assert_eq!(pieces.recv().await.unwrap().unwrap().len(), PIECE);
        }
        assert!(pieces.recv().await.is_none(), "the body ends before its length is reached");
    }
}
