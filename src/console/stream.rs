//! `GET high-availability/stream`: the status as server-sent events, for the page. Bounded in number, pace and time;
//! must never keep the ports from closing.
//!
//! Events: `status` with the JSON of `GET high-availability`, `history` when something was added to `GET
//! high-availability/events`, and `end` before the stream ends in order. The data of `end` is the reason: `renew` (ask
//! again, your session is checked then) or `closing` (the ports close, as in a switchover).

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{Method, header},
    response::{IntoResponse, Response},
};
use futures_util::stream::unfold;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep_until, timeout},
};

use super::{
    Console,
    errors::ApiError,
    route::{Access, Entry, route},
};
use crate::node::Status;

/// Streams at once: each holds a connection.
pub(super) const STREAMS: usize = 64;
const TIMES: Times =
    Times { pace: Duration::from_millis(250), beat: Duration::from_secs(10), life: Duration::from_secs(60) };

/// When something is sent.
#[derive(Clone, Copy)]
struct Times {
    /// Shortest time between two events: at most four a second.
    pace: Duration,
    /// After so long without an event, a line is sent that means nothing.
    beat: Duration,
    /// How long a stream lives: a session that has ended must not go on seeing the cluster.
    life: Duration,
}

/// The routes of this file.
pub(super) fn routes() -> Vec<Entry> {
    let summary = "The state of the cluster, again and again, as server-sent events";
    vec![route(Method::GET, "/high-availability/stream", Access::Any, summary, stream).file("text/event-stream")]
}

/// `GET high-availability/stream`.
async fn stream(State(console): State<Arc<Console>>) -> Result<Response, ApiError> {
    let busy = || ApiError::Unavailable(format!("{STREAMS} streams are open: ask for the status now and then instead"));
    let slot = Arc::clone(&console.streams).try_acquire_owned().map_err(|_| busy())?;
    let history = console.services.as_ref().map(|services| services.events.written());
    let feed = Feed::new(console.status.clone(), history, console.closing.subscribe(), TIMES, slot);
    let pieces = unfold(feed, async |mut feed| feed.next().await.map(|piece| (Ok::<_, Infallible>(piece), feed)));
    Ok(([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(pieces)).into_response())
}

/// One stream.
struct Feed {
    status: watch::Receiver<Arc<Status>>,
    /// Changes with the history, if one is kept.
    history: Option<watch::Receiver<()>>,
    /// Turns true, or loses its sender, when the ports close.
    closing: watch::Receiver<bool>,
    times: Times,
    until: Instant,
    /// When the next event may be sent.
    next: Instant,
    ended: bool,
    _slot: OwnedSemaphorePermit,
}

/// What a stream has waited for.
enum Happened {
    Nothing,
    Status,
    History,
    Renew,
    Closing,
}

impl Feed {
    fn new(
        mut status: watch::Receiver<Arc<Status>>,
        history: Option<watch::Receiver<()>>,
        closing: watch::Receiver<bool>,
        times: Times,
        slot: OwnedSemaphorePermit,
    ) -> Self {
        // What is there now is the first event.
        status.mark_changed();
        let now = Instant::now();
        Self { status, history, closing, times, until: now + times.life, next: now, ended: false, _slot: slot }
    }

    /// What is sent next, when it is time to; none at the end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let ready = async {
            sleep_until(self.next).await;
            timeout(self.times.beat, self.status.changed()).await
        };
        let written = async {
            match &mut self.history {
                Some(history) => history.changed().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        let happened = tokio::select! {
            biased;
            // An error means that the Console is gone.
            _ = async { self.closing.wait_for(|closing| *closing).await.is_ok() } => Happened::Closing,
            () = sleep_until(self.until) => Happened::Renew,
            // Not often: what is written is written together.
            true = written => Happened::History,
            changed = ready => match changed {
                Err(_) => Happened::Nothing,
                Ok(Ok(())) => Happened::Status,
                Ok(Err(_)) => Happened::Closing,
            },
        };
        match happened {
            Happened::Nothing => Some(Bytes::from_static(b":\n\n")),
            Happened::Status => self.picture(),
            Happened::History => Some(Bytes::from_static(b"event: history\ndata:\n\n")),
            Happened::Renew => Some(self.end("renew")),
            Happened::Closing => Some(self.end("closing")),
        }
    }

    fn end(&mut self, why: &str) -> Bytes {
        self.ended = true;
        format!("event: end\ndata: {why}\n\n").into()
    }

    fn picture(&mut self) -> Option<Bytes> {
        self.next = Instant::now() + self.times.pace;
        // Not under the guard, which keeps the consensus loop from publishing.
        let status = Arc::clone(&self.status.borrow_and_update());
        let text = serde_json::to_string(&*status);
        text.inspect_err(|error| tracing::error!("cannot write the status as JSON: {error}"))
            .ok()
            .map(|text| format!("event: status\ndata: {text}\n\n").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ClusterId, Membership, Role};

    fn status(reason: &str) -> Arc<Status> {
        Arc::new(Status {
            cluster: ClusterId(1),
            node: 1,
            name: "one\ntwo".to_owned(),
            version: "1".to_owned(),
            role: Role::Primary,
            reason: reason.to_owned(),
            epoch: 1,
            primary: Some(1),
            applied: 0,
            committed: 0,
            lease_ms: None,
            members: Vec::new(),
            membership: Membership::founded(ClusterId(1), Vec::new()),
            warnings: Vec::new(),
            certificates: Vec::new(),
            serving: false,
            waiting: None,
            recent: Default::default(),
        })
    }

    const PACE: Duration = Duration::from_millis(40);
    const BEAT: Duration = Duration::from_millis(80);
    const LONG: Duration = Duration::from_secs(60);

    struct Fixture {
        status: watch::Sender<Arc<Status>>,
        history: watch::Sender<()>,
        closing: watch::Sender<bool>,
        feed: Feed,
    }

    fn fixture(life: Duration) -> Fixture {
        let (status, watched) = watch::channel(status("first"));
        let (closing, closes) = watch::channel(false);
        let slot = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
        let (history, written) = watch::channel(());
        let times = Times { pace: PACE, beat: BEAT, life };
        Fixture { feed: Feed::new(watched, Some(written), closes, times, slot), status, history, closing }
    }

    async fn text(feed: &mut Feed) -> String {
        String::from_utf8(feed.next().await.unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn the_newest_status_comes_at_most_four_times_a_second() {
        let Fixture { mut feed, status: sender, history, closing: _closing } = fixture(LONG);
        let begin = Instant::now();
        let first = text(&mut feed).await;
        assert!(first.starts_with("event: status\ndata: {") && first.contains("\"first\""), "{first}");
        assert_eq!(first.lines().count(), 3, "a name with a line break is no line of the stream: {first}");
        for number in 0..50 {
            sender.send_replace(status(&format!("number {number}")));
        }
        assert!(text(&mut feed).await.contains("\"number 49\""));
        assert!(begin.elapsed() >= PACE);
        history.send_replace(());
        assert_eq!(text(&mut feed).await, "event: history\ndata:\n\n");
        assert_eq!(text(&mut feed).await, ":\n\n");
        assert!(begin.elapsed() >= PACE + BEAT);
    }

    #[tokio::test]
    async fn it_ends_after_its_life_and_at_once_when_the_ports_close() {
        let Fixture { mut feed, status: sender, history: _history, closing: _closing } = fixture(PACE * 5);
        let begin = Instant::now();
        let mut last = String::new();
        while let Some(piece) = feed.next().await {
            last = String::from_utf8(piece.to_vec()).unwrap();
            sender.send_replace(status("goes on"));
        }
        assert_eq!(last, "event: end\ndata: renew\n\n");
        assert!(begin.elapsed() >= PACE * 5, "{:?}", begin.elapsed());

        let Fixture { mut feed, status: _status, history: _history, closing } = fixture(LONG);
        text(&mut feed).await;
        closing.send_replace(true);
        assert_eq!(text(&mut feed).await, "event: end\ndata: closing\n\n");
        assert!(feed.next().await.is_none());
    }
}
