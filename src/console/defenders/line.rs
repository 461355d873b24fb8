//! The WebSocket of a Defender: its messages and silence, and the pings that are answered below those. Must never read
//! a message for which there is no room, nor take for dead whom it does not read.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{body::Body, extract::Request, response::Response};
use hyper::upgrade::{self, OnUpgrade};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{Instant, Sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::{
    handshake::server::create_response_with_body,
    protocol::frame::coding::{Control, Data, OpCode},
};

use super::{
    budget::{Account, Budget, OWN, Share},
    frames::{self, Frame, Incoming, Progress},
};
use crate::{
    console::errors::ApiError,
    defender::wire::{FromConsole, MESSAGE, PING_MS, SILENCE_MS},
};

/// How long nothing may come from a Defender, which pings every second.
const SILENCE: Duration = Duration::from_millis(SILENCE_MS);
/// From one sign of life to the next while a message comes or waits for room: its Defender cannot ping meanwhile, and
/// would take silence for death.
const BEAT: Duration = Duration::from_millis(PING_MS);
/// How long a message may take to come once there is room for it: others may wait for that room.
const MESSAGE_COMES: Duration = Duration::from_secs(30);

/// The answer to whoever asks for a WebSocket, and what becomes of the connection.
///
/// # Errors
/// When that is not what is asked for.
pub(super) fn upgrade(request: &mut Request) -> Result<(Response, OnUpgrade), ApiError> {
    let answer = create_response_with_body(request, Body::empty).map_err(|error| ApiError::bad(error.to_string()))?;
    Ok((answer, upgrade::on(request)))
}

/// What has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Text(String),
    /// There is more room for what came before: see [`Line::hand_on`].
    Room,
}

/// The connection.
pub(super) struct Line<S> {
    stream: S,
    incoming: Incoming,
    /// What the messages need that come or have come.
    account: Account,
    /// Frames that are to be written when there is nothing else to do: short ones.
    out: Vec<u8>,
    unflushed: bool,
    /// When something has come, or could not have.
    heard: Instant,
    /// Since when there is room for the message that comes.
    comes: Option<Instant>,
    /// Ends a while after something was heard, and is set again only then: a ping costs no timer.
    quiet: Pin<Box<Sleep>>,
    /// The timer has the pace of [`BEAT`].
    beats: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    /// `budget` is for what it reads.
    pub(super) fn new(stream: S, budget: &Arc<Budget>) -> Self {
        let heard = Instant::now();
        Self {
            stream,
            incoming: Incoming::default(),
            account: Account::new(budget),
            out: Vec::new(),
            unflushed: false,
            heard,
            comes: None,
            quiet: Box::pin(sleep_until(heard + SILENCE)),
            beats: false,
        }
    }

    /// The next message, or that there is room. What a message needs of the budget is needed until [`Self::spare`] or
    /// [`Self::hand_on`]. It may be given up at any time.
    ///
    /// # Errors
    /// Why nothing comes any more.
    pub(super) async fn hear(&mut self) -> Result<Heard, String> {
        std::future::poll_fn(|cx| self.poll_hear(cx)).await
    }

    /// The next message, which needs no room beyond this.
    ///
    /// # Errors
    /// As those of [`Self::hear`].
    pub(super) async fn text(&mut self) -> Result<String, String> {
        loop {
            if let Heard::Text(text) = self.hear().await? {
                self.spare(text.len());
                return Ok(text);
            }
        }
    }

    /// A message of so many bytes is not kept any more.
    pub(super) fn spare(&mut self, bytes: usize) {
        self.account.spare(bytes);
    }

    /// The share of a message of so many bytes, for whoever keeps it from now on; none as long as there is no room.
    pub(super) fn hand_on(&mut self, bytes: usize) -> Option<Share> {
        self.account.hand_on(bytes)
    }

    fn poll_hear(&mut self, cx: &mut Context<'_>) -> Poll<Result<Heard, String>> {
        loop {
            let _ = self.poll_out(cx).map_err(|error| error.to_string())?;
            if self.account.poll_cover(cx) {
                return Poll::Ready(Ok(Heard::Room));
            }
            if self.is_held() {
                break;
            }
            if self.incoming.is_message() && self.comes.is_none() {
                self.comes = Some(Instant::now());
            }
            let mut buffer = ReadBuf::new(self.incoming.space());
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                Poll::Ready(done) => done.map_err(|error| error.to_string())?,
                Poll::Pending => break,
            }
            let count = buffer.filled().len();
            if count == 0 {
                return Poll::Ready(Err("it was closed".to_owned()));
            }
            self.heard = Instant::now();
            match self.incoming.fill(count, MESSAGE)? {
                Progress::More => {}
                Progress::Message(length) => self.account.need(length),
                Progress::Frame(frame) => {
                    self.comes = None;
                    match frame {
                        Frame::Text(text) => return Poll::Ready(Ok(Heard::Text(text))),
                        Frame::Binary(length) => self.account.spare(length),
                        Frame::Ping(payload) => self.put(Control::Pong, &payload),
                        Frame::Pong => {}
                        Frame::Close => return Poll::Ready(Err("it was closed".to_owned())),
                    }
                }
            }
        }
        self.poll_silence(cx).map(Err)
    }

    /// True if the message that comes has no room yet.
    fn is_held(&self) -> bool {
        self.incoming.is_message() && !self.account.may_read()
    }

    /// Whether it is dead, and why. As long as a message comes or waits for room, it is told that somebody is there.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        let busy = self.incoming.is_message();
        if busy && !self.beats {
            self.beats = true;
            self.quiet.as_mut().reset(Instant::now() + BEAT);
        }
        loop {
            ready!(self.quiet.as_mut().poll(cx));
            let (now, held) = (Instant::now(), self.is_held());
            if held {
                // Whatever it has said since is not read.
                (self.heard, self.comes) = (now, None);
            }
            if now >= self.heard + SILENCE {
                return Poll::Ready("nothing came for too long".to_owned());
            }
            if self.comes.is_some_and(|since| now >= since + MESSAGE_COMES) {
                return Poll::Ready("a message came too slowly".to_owned());
            }
            if busy {
                self.put(Control::Pong, &[]);
                if let Poll::Ready(Err(error)) = self.poll_out(cx) {
                    return Poll::Ready(error.to_string());
                }
            }
            self.beats = busy;
            self.quiet.as_mut().reset(if busy { now + BEAT } else { self.heard + SILENCE });
        }
    }

    /// Puts a frame behind what is to be written. If that is not taken, one more would be of no use.
    fn put(&mut self, kind: Control, payload: &[u8]) {
        if self.out.is_empty() {
            frames::begin(OpCode::Control(kind), payload.len(), &mut self.out);
            self.out.extend_from_slice(payload);
        }
    }

    /// Writes what is to be written.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.out))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.drain(..count);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// A Defender that takes nothing for that long is as dead as one that says nothing.
    ///
    /// # Errors
    /// Why it could not be told.
    pub(super) async fn say(&mut self, message: &FromConsole) -> Result<(), String> {
        let text = serde_json::to_string(message).map_err(|error| error.to_string())?;
        let sent = timeout(SILENCE, self.send(OpCode::Data(Data::Text), text.as_bytes())).await;
        sent.map_err(|_| "it takes nothing".to_owned())?.map_err(|error| error.to_string())
    }

    /// Says that this is the end.
    pub(super) async fn close(&mut self) {
        // It may be gone already.
        let _ = timeout(SILENCE, self.send(OpCode::Control(Control::Close), &[])).await;
    }

    async fn send(&mut self, kind: OpCode, payload: &[u8]) -> io::Result<()> {
        // What was begun before goes first.
        let mut first = std::mem::take(&mut self.out);
        frames::begin(kind, payload.len(), &mut first);
        if payload.len() <= OWN {
            first.extend_from_slice(payload);
            self.stream.write_all(&first).await?;
        } else {
            self.stream.write_all(&first).await?;
            self.stream.write_all(payload).await?;
        }
        self.stream.flush().await
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};

    use super::{super::budget::Budgets, *};

    #[tokio::test]
    async fn a_connection_on_which_nothing_comes_is_dead_after_three_seconds() {
        let (mut client, server) = duplex(1024);
        let mut line = Line::new(server, &Budgets::default().read);
        let begin = Instant::now();
        let talk = async {
            // It counts from what has come last, and a ping is something.
            tokio::time::sleep(SILENCE / 2).await;
            client.write_all(&[0x89, 0x80, 1, 2, 3, 4]).await.unwrap();
            let mut answer = [0; 2];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, [0x8a, 0], "a pong");
            std::future::pending().await
        };
        let heard = tokio::select! {
            heard = line.hear() => heard,
            heard = talk => heard,
        };
        assert_eq!(heard, Err("nothing came for too long".to_owned()));
        assert!(begin.elapsed() >= SILENCE + SILENCE / 2);
    }

    /// Its Defender cannot ping while it sends the rest.
    #[tokio::test]
    async fn who_sends_a_message_slowly_is_heard_and_hears() {
        let (client, server) = duplex(1024);
        let mut line = Line::new(server, &Budgets::default().read);
        let (mut reading, mut writing) = tokio::io::split(client);
        let talk = async {
            for part in [&[0x81, 0x83, 0, 0, 0, 0][..], b"a", b"b", b"c"] {
                writing.write_all(part).await.unwrap();
                let mut beat = [0; 2];
                if part != b"c" {
                    reading.read_exact(&mut beat).await.unwrap();
                    assert_eq!(beat, [0x8a, 0], "a sign of life");
                }
            }
            std::future::pending().await
        };
        let heard = tokio::select! {
            heard = line.text() => heard,
            heard = talk => heard,
        };
        assert_eq!(heard, Ok("abc".to_owned()));
    }
}
