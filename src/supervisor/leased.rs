//! The lease at the level of a socket. [`Opening`] says whether responses may still leave; [`LeasedStream`] asks it right
//! before each write. It sits below TLS, so that nothing above it can forget to ask.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
};

use crate::{
    cluster::Role,
    node::{Lease, Status},
};

/// How far the closing of the ports has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Open,
    /// Requests that run may end; new ones are not taken.
    Draining,
    /// Everything is reset.
    Closed,
}

/// One span during which the ports are open: one epoch, one lease without a gap.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) epoch: u64,
    lease: Lease,
    status: watch::Receiver<Arc<Status>>,
    phase: watch::Sender<Phase>,
}

impl Opening {
    pub(super) fn new(epoch: u64, lease: Lease, status: watch::Receiver<Arc<Status>>) -> Arc<Self> {
        Arc::new(Self { epoch, lease, status, phase: watch::Sender::new(Phase::Open) })
    }

    /// True while a byte may leave. Asks the role and epoch, too: a process that was frozen long enough to lose the
    /// role and win it again has a valid lease, but not for the responses of its former term.
    pub(super) fn permits(&self) -> bool {
        if *self.phase.borrow() == Phase::Closed || !self.lease.is_valid() {
            return false;
        }
        let status = self.status.borrow();
        status.role == Role::Primary && status.epoch == self.epoch
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
/// that permission.
#[derive(Debug)]
pub(super) struct LeasedStream {
    stream: TcpStream,
    opening: Arc<Opening>,
}

impl LeasedStream {
    pub(super) fn new(stream: TcpStream, opening: Arc<Opening>) -> Self {
        Self { stream, opening }
    }

    fn permitted(&self) -> io::Result<()> {
        if self.opening.permits() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, "this node is not PRIMARY with a valid lease any more"))
    }
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
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for LeasedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.permitted()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.permitted()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.permitted()?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
