//! The lease at the level of a socket. [`Opening`] says whether responses may still leave; [`LeasedStream`] asks it
//! right before each write. It sits below TLS, so that nothing above it can forget to ask.

use std::{
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
    time::{Sleep, sleep},
};

use crate::{
    node::{Lease, Status},
    telemetry::steps::{Step, Stopwatch},
};

/// A client that takes no byte for this long counts as gone: it must not keep its place, or that of a download.
const STALL: Duration = Duration::from_secs(10);
/// How long a client of the service beside the Console may take no byte: a film that somebody has paused is no fault.
const SERVICE_STALL: Duration = Duration::from_secs(600);

/// How long, and how many bytes, are read and thrown away from a client that still sends when its connection is closed.
/// Otherwise the kernel would reset the connection, and the client could lose the answer (RFC 9112 section 9.6).
const LINGER: (Duration, usize) = (Duration::from_secs(2), 64 << 20);
/// Bytes that are thrown away at once.
const WASTE: usize = 8 << 10;

/// How far the closing of the ports has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Open,
    /// Requests that run may end; new ones are not taken.
    Draining,
    /// Everything is reset.
    Closed,
}

/// One span during which the ports are open: one epoch, one lease without a gap.
pub(super) struct Opening {
    lease: Lease,
    /// Whether this node still serves in the epoch of this opening.
    serves: Box<dyn Fn() -> bool + Send + Sync>,
    phase: watch::Sender<Phase>,
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("lease", &self.lease).field("phase", &self.phase).finish_non_exhaustive()
    }
}

impl Opening {
    pub(super) fn new(epoch: u64, lease: Lease, status: watch::Receiver<Arc<Status>>) -> Arc<Self> {
        Self::with(Box::new(move || status.borrow().serving() == Some(epoch)), lease)
    }

    /// An opening that goes by what `serves` says.
    pub(super) fn with(serves: Box<dyn Fn() -> bool + Send + Sync>, lease: Lease) -> Arc<Self> {
        Arc::new(Self { lease, serves, phase: watch::Sender::new(Phase::Open) })
    }

    /// True while a byte may leave. Asks the role and epoch, too: a process that was frozen long enough to lose the
    /// role and win it again has a valid lease, but not for the responses of its former term.
    pub(super) fn permits(&self) -> bool {
        *self.phase.borrow() != Phase::Closed && (self.serves)() && self.lease.is_valid()
    }

    /// Goes on to a later phase; never back.
    pub(super) fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            *now = phase.max(*now);
            later
        });
    }

    /// Returns when the phase has come.
    pub(super) async fn reached(&self, phase: Phase) {
        // The sender is in `self`: it cannot be gone.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }
}

/// A connection that only writes while its opening permits it, and is reset, not closed in order, when it ends without
/// that permission. Ends with an error when the client does not read.
pub(super) struct LeasedStream {
    stream: TcpStream,
    opening: Arc<Opening>,
    /// Runs while a write waits for the client.
    waits: Option<Pin<Box<Sleep>>>,
    limit: Duration,
    lingers: Option<Lingers>,
    /// The end of what is sent is just that: the client may go on, and is read from.
    halves: bool,
    /// Whether it was ended from outside.
    over: watch::Receiver<bool>,
    /// Wakes a read that waits when it is; made with the first one that does.
    ended: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    watches: Arc<Watches>,
}

/// What a connection is measured by, while it is.
#[derive(Debug, Default)]
pub(super) struct Watches {
    /// Bytes have come.
    pub(super) reading: Stopwatch,
    /// An answer is on its way to the socket.
    pub(super) writing: Stopwatch,
}

/// A [`LeasedStream`] as whoever accepted the connection sees it: somebody else may have gone on with it after an
/// upgrade.
#[derive(Debug)]
pub(super) struct StreamControl(watch::Sender<bool>);

impl StreamControl {
    /// Returns when nobody has the stream any more.
    pub(super) async fn dropped(&self) {
        self.0.closed().await;
    }

    /// From now on nobody who still has the stream reads or writes anything.
    pub(super) fn end(&self) {
        self.0.send_replace(true);
    }
}

/// Nothing more is sent; what the client still sends is thrown away.
struct Lingers {
    /// The time is over, or the ports are about to close: a switchover must not wait for it.
    end: Pin<Box<dyn Future<Output = ()> + Send>>,
    left: usize,
}

impl fmt::Debug for Lingers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lingers").field("left", &self.left).finish_non_exhaustive()
    }
}

impl Lingers {
    fn new(opening: Arc<Opening>) -> Self {
        let end = async move {
            tokio::select! {
                () = opening.reached(Phase::Draining) => {}
                () = sleep(LINGER.0) => {}
            }
        };
        Self { end: Box::pin(end), left: LINGER.1 }
    }

    /// Ready when the client is gone, or a limit is reached.
    fn poll(&mut self, cx: &mut Context<'_>, stream: &mut TcpStream) -> Poll<()> {
        let mut waste = [0; WASTE];
        while self.end.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut waste);
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer));
            let length = buffer.filled().len();
            if read.is_err() || length == 0 || length > self.left {
                break;
            }
            self.left -= length;
        }
        Poll::Ready(())
    }
}

impl LeasedStream {
    pub(super) fn new(stream: TcpStream, opening: Arc<Opening>) -> (Self, StreamControl) {
        let (end, over) = watch::channel(false);
        let (waits, lingers, ended, watches) = (None, None, None, Arc::default());
        (
            Self { stream, opening, waits, limit: STALL, lingers, halves: false, over, ended, watches },
            StreamControl(end),
        )
    }

    /// For a protocol that nobody here knows: either side may be done with sending before the other is.
    pub(super) fn in_halves(mut self) -> Self {
        (self.halves, self.limit) = (true, SERVICE_STALL);
        self
    }

    /// It is reset when it ends: the client must not take what it has got for the whole.
    pub(super) fn reset(&self) {
        // It fails only if the connection is gone anyway.
        let _ = self.stream.set_zero_linger();
    }

    pub(super) fn watches(&self) -> Arc<Watches> {
        Arc::clone(&self.watches)
    }

    /// Passes the outcome of a write on, unless it has waited for too long.
    fn in_time(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.watches.writing.stop(Step::RequestWrite);
            self.waits = None;
            return written;
        }
        let limit = self.limit;
        ready!(self.waits.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }

    fn permitted(&self) -> io::Result<()> {
        if *self.over.borrow() {
            return Err(over());
        }
        if self.opening.permits() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, "this node is not PRIMARY with a valid lease any more"))
    }
}

impl fmt::Debug for LeasedStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeasedStream").field("stream", &self.stream).finish_non_exhaustive()
    }
}

fn over() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "this connection was ended from here")
}

impl Drop for LeasedStream {
    fn drop(&mut self) {
        if !self.opening.permits() {
            // The client learns at once. It fails only if the connection is gone anyway.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for LeasedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if *self.over.borrow() {
            return Poll::Ready(Err(over()));
        }
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(cx, buf) {
            self.watches.reading.start();
            return Poll::Ready(read);
        }
        let this = &mut *self;
        let ended = this.ended.get_or_insert_with(|| {
            let mut over = this.over.clone();
            Box::pin(async move {
                if over.wait_for(|over| *over).await.is_err() {
                    std::future::pending().await // nobody is left who could end it
                }
            })
        });
        ready!(ended.as_mut().poll(cx));
        Poll::Ready(Err(over()))
    }
}

impl AsyncWrite for LeasedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.permitted()?;
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.in_time(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.permitted()?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.in_time(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.permitted()?;
        let this = &mut *self;
        if this.halves {
            return Pin::new(&mut this.stream).poll_shutdown(cx);
        }
        if this.lingers.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let lingers = this.lingers.get_or_insert_with(|| Lingers::new(Arc::clone(&this.opening)));
        ready!(lingers.poll(cx, &mut this.stream));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::node::lease::boottime;

    /// A status that serves in this epoch needs a database, which a test of sockets does not have: so these tests set
    /// the phase and the lease, and those of the Console the status.
    async fn connection(opening: &Arc<Opening>) -> (LeasedStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        (LeasedStream::new(server, Arc::clone(opening)).0, client)
    }

    fn opening(lease: &Lease) -> Arc<Opening> {
        Opening::with(Box::new(|| true), lease.clone())
    }

    fn extend(lease: &Lease) {
        lease.set(boottime() + Duration::from_secs(60).as_nanos() as u64).unwrap();
    }

    #[tokio::test]
    async fn nothing_is_written_without_a_lease_and_the_connection_is_reset() {
        let lease = Lease::new().unwrap();
        let opening = opening(&lease);
        let (mut server, mut client) = connection(&opening).await;
        extend(&lease);
        server.write_all(b"first").await.unwrap();
        lease.set(boottime()).unwrap();
        let error = server.write_all(b"late").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        let mut bytes = [0; 5];
        client.read_exact(&mut bytes).await.unwrap();
        drop(server);
        let error = client.read(&mut bytes).await.unwrap_err();
        assert_eq!((&bytes, error.kind()), (b"first", io::ErrorKind::ConnectionReset));
    }

    #[tokio::test]
    async fn a_closed_opening_stays_closed_whatever_the_lease_says() {
        let lease = Lease::new().unwrap();
        let opening = opening(&lease);
        let (mut server, mut client) = connection(&opening).await;
        extend(&lease);
        opening.advance(Phase::Draining);
        server.write_all(b"drain").await.unwrap();
        opening.advance(Phase::Closed);
        opening.advance(Phase::Open);
        opening.reached(Phase::Closed).await;
        assert!(server.write_all(b"late").await.is_err());
        let mut bytes = [0; 5];
        client.read_exact(&mut bytes).await.unwrap();
    }

    #[tokio::test]
    async fn another_epoch_stops_the_responses_of_this_one() {
        let lease = Lease::new().unwrap();
        let serving = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let asked = Arc::clone(&serving);
        let opening = Opening::with(Box::new(move || asked.load(std::sync::atomic::Ordering::SeqCst)), lease.clone());
        let (mut server, _client) = connection(&opening).await;
        extend(&lease);
        server.write_all(b"first").await.unwrap();
        serving.store(false, std::sync::atomic::Ordering::SeqCst);
        assert!(server.write_all(b"late").await.is_err());
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_dropped_and_a_slow_one_is_not() {
        let lease = Lease::new().unwrap();
        let opening = opening(&lease);
        let (mut server, mut client) = connection(&opening).await;
        extend(&lease);
        server.limit = Duration::from_millis(500);
        let piece = vec![0; 64 << 10];
        let error = loop {
            if let Err(error) = server.write_all(&piece).await {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // As soon as it reads, there is time again.
        server.waits = None;
        let mut sink = vec![0; 8 << 20];
        let reading = async { while client.read(&mut sink).await.is_ok_and(|read| read > 0) {} };
        tokio::select! {
            written = server.write_all(&piece) => written.unwrap(),
            () = reading => panic!("the connection has ended"),
        }
        assert!(server.waits.is_none());
    }

    #[tokio::test]
    async fn an_orderly_end_is_no_reset() {
        let lease = Lease::new().unwrap();
        let opening = opening(&lease);
        let (server, mut client) = connection(&opening).await;
        extend(&lease);
        drop(server);
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn whoever_has_the_stream_is_stopped_from_outside_and_its_end_is_seen_there() {
        let lease = Lease::new().unwrap();
        extend(&lease);
        let opening = opening(&lease);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut stream, control) = LeasedStream::new(listener.accept().await.unwrap().0, Arc::clone(&opening));
        client.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        let mut dropped = std::pin::pin!(control.dropped());
        assert!(tokio::time::timeout(Duration::from_millis(20), dropped.as_mut()).await.is_err());
        let other = tokio::spawn(async move {
            let error = stream.read(&mut [0; 4]).await.unwrap_err();
            (error.kind(), stream.write_all(b"late").await.unwrap_err().kind())
        });
        control.end();
        assert_eq!(other.await.unwrap(), (io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionAborted));
        dropped.await;
        assert_eq!(client.read(&mut [0; 4]).await.unwrap(), 0);
    }

    /// The answer comes before the client has sent all: it must get it, and not a reset.
    #[tokio::test]
    async fn a_client_that_still_sends_gets_the_answer_before_the_connection_ends() {
        let lease = Lease::new().unwrap();
        extend(&lease);
        let opening = opening(&lease);
        let (mut server, client) = connection(&opening).await;
        let (mut reading, mut writing) = client.into_split();
        let sending = tokio::spawn(async move {
            let piece = vec![0; 64 << 10];
            for _ in 0..480 {
                writing.write_all(&piece).await?;
            }
            writing.shutdown().await
        });
        server.read_exact(&mut [0; 4]).await.unwrap();
        server.write_all(b"too long").await.unwrap();
        server.shutdown().await.unwrap();
        drop(server);
        sending.await.unwrap().expect("30 MiB are taken");
        let mut answer = Vec::new();
        reading.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"too long");
    }

    #[tokio::test]
    async fn lingering_ends_with_the_opening() {
        let lease = Lease::new().unwrap();
        extend(&lease);
        let opening = opening(&lease);
        let (mut server, _client) = connection(&opening).await;
        let mut ending = std::pin::pin!(server.shutdown());
        assert!(tokio::time::timeout(Duration::from_millis(20), ending.as_mut()).await.is_err(), "the client is there");
        let begin = tokio::time::Instant::now();
        opening.advance(Phase::Draining);
        ending.await.unwrap();
        assert!(begin.elapsed() < LINGER.0);
    }
}
