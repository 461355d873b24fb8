//! The body of a request on its way in: all of it must come within a time limit, and what no handler has read of it is
//! read before the answer leaves. Otherwise a client that sends the head and then the body would find the connection
//! closed in the middle of its request, instead of the answer. Must never keep more than a piece of it.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    BoxError,
    body::Body,
    extract::Request,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper::body::{Body as Frames, Bytes, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::errors::ApiError;
use crate::mutex::locked;

/// Limits of a body, besides its size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Longest time from the request's head to the end of its body: below the limit of the whole request.
    pub(super) time: Duration,
    /// Bytes that are read in vain, so that the client gets its answer; a longer rest costs it the connection.
    pub(super) rest: usize,
}

/// What [`super::Console`] keeps to.
pub(super) const LIMITS: Limits = Limits { time: Duration::from_secs(20), rest: 8 << 20 };

/// A body with two readers: first the handler, then whoever reads the rest.
#[derive(Debug)]
struct Shared {
    body: Body,
    until: Pin<Box<Sleep>>,
    /// A handler has begun to read it.
    read: bool,
    /// A handler was told that it came too late.
    late: bool,
}

impl Shared {
    /// The next piece; an error once the time is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(piece) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(piece.map(|piece| piece.map_err(Into::into)));
        }
        ready!(self.until.as_mut().poll(cx));
        Poll::Ready(Some(Err("the body came too slowly".into())))
    }
}

/// What the handler gets in place of the body.
struct Bounded(Arc<Mutex<Shared>>);

impl Frames for Bounded {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut shared = locked(&self.0);
        shared.read = true;
        let piece = ready!(shared.poll(cx));
        shared.late |= matches!(piece, Some(Err(_))) && shared.until.is_elapsed();
        Poll::Ready(piece)
    }

    fn is_end_stream(&self) -> bool {
        locked(&self.0).body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        locked(&self.0).body.size_hint()
    }
}

/// A body that is on its way.
#[derive(Debug)]
pub(super) struct Arriving {
    shared: Arc<Mutex<Shared>>,
    limits: Limits,
    /// The client waits to be told to send the body.
    asks: bool,
}

impl Arriving {
    /// Puts the limits on the body of a request; none if it has no body.
    pub(super) fn of(request: Request, limits: Limits) -> (Request, Option<Self>) {
        if request.body().is_end_stream() {
            return (request, None);
        }
        let asks = request.headers().contains_key(header::EXPECT);
        let (parts, body) = request.into_parts();
        let until = Box::pin(sleep(limits.time));
        let shared = Arc::new(Mutex::new(Shared { body, until, read: false, late: false }));
        let bounded = Body::new(Bounded(Arc::clone(&shared)));
        (Request::from_parts(parts, bounded), Some(Self { shared, limits, asks }))
    }

    /// The answer, once the body has come or its limits are reached: then the connection ends after it.
    pub(super) async fn answer(self, response: Response) -> Response {
        let seconds = self.limits.time.as_secs();
        let late = locked(&self.shared).late;
        let mut response = match late {
            true => {
                let text = format!("the body of the request did not come within {seconds} s");
                ApiError::Request(StatusCode::REQUEST_TIMEOUT, text).into_response()
            }
            false => response,
        };
        if late || !self.drained().await {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Reads the rest. True if it came to the end.
    async fn drained(&self) -> bool {
        let told = {
            let shared = locked(&self.shared);
            if shared.body.is_end_stream() {
                return true;
            }
            shared.read || !self.asks
        };
        let mut left = Some(self.limits.rest).filter(|_| told);
        while let Some(most) = left {
            match poll_fn(|cx| locked(&self.shared).poll(cx)).await {
                None => return true,
                Some(Ok(piece)) => left = most.checked_sub(piece.data_ref().map_or(0, Bytes::len)),
                Some(Err(_)) => return false,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream::{self, StreamExt};
    use tokio::time::{Instant, interval};

    use super::{super::extract::Body as Json, *};

    const FAST: Limits = Limits { time: Duration::from_millis(200), rest: 64 };

    fn request(body: Body) -> Request {
        Request::builder().header(header::CONTENT_TYPE, "application/json").body(body).unwrap()
    }

    /// One letter again and again, a piece each 10 ms.
    fn drip(pieces: usize) -> Body {
        let clock = stream::unfold(interval(Duration::from_millis(10)), async |mut clock| {
            clock.tick().await;
            Some((Ok::<_, Infallible>(Bytes::from_static(b"1111")), clock))
        });
        Body::from_stream(clock.take(pieces))
    }

    async fn handle(request: Request) -> Response {
        match <Json<u64> as axum::extract::FromRequest<()>>::from_request(request, &()).await {
            Ok(Json(number)) => number.to_string().into_response(),
            Err(error) => error.into_response(),
        }
    }

    fn closes(response: &Response) -> bool {
        response.headers().contains_key(header::CONNECTION)
    }

    #[tokio::test]
    async fn a_body_that_drips_ends_with_a_time_out_and_costs_the_connection() {
        let begin = Instant::now();
        let (request, arriving) = Arriving::of(request(drip(usize::MAX)), FAST);
        let response = arriving.unwrap().answer(handle(request).await).await;
        assert!(response.status() == StatusCode::REQUEST_TIMEOUT && closes(&response), "{response:?}");
        assert!((FAST.time..FAST.time * 10).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn a_slow_body_that_comes_in_time_is_taken() {
        let (request, arriving) = Arriving::of(request(drip(3)), FAST);
        let response = arriving.unwrap().answer(handle(request).await).await;
        assert!(response.status() == StatusCode::OK && !closes(&response), "{response:?}");
    }

    #[tokio::test]
    async fn what_no_handler_reads_is_read_up_to_a_limit_before_the_answer() {
        for (pieces, kept) in [(FAST.rest / 4, true), (FAST.rest / 4 + 1, false)] {
            let (request, arriving) = Arriving::of(request(drip(pieces)), Limits { time: LIMITS.time, ..FAST });
            drop(request);
            let response = arriving.unwrap().answer(StatusCode::NOT_FOUND.into_response()).await;
            assert!(response.status() == StatusCode::NOT_FOUND && closes(&response) != kept, "{pieces}: {response:?}");
        }
        // Too slow for that: the answer stays what it is, since the handler may have done something.
        let (request, arriving) = Arriving::of(request(drip(usize::MAX)), Limits { rest: usize::MAX, ..FAST });
        drop(request);
        let response = arriving.unwrap().answer(StatusCode::OK.into_response()).await;
        assert!(response.status() == StatusCode::OK && closes(&response), "{response:?}");
    }

    #[tokio::test]
    async fn who_asks_before_sending_is_not_told_to_send_in_vain() {
        let mut asking = request(drip(1));
        asking.headers_mut().insert(header::EXPECT, HeaderValue::from_static("100-continue"));
        let (request, arriving) = Arriving::of(asking, FAST);
        drop(request);
        assert!(closes(&arriving.unwrap().answer(StatusCode::OK.into_response()).await));
        assert!(Arriving::of(Request::new(Body::empty()), FAST).1.is_none());
    }
}
