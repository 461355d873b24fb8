//! The claim to serve, at the level of a socket: an answer that calls this node the primary leaves only while that is
//! true. A process that was frozen between making the answer and sending it must not send it when it wakes.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::Sources;

/// What a connection's one answer says about this node.
pub(super) struct Claim {
    /// The epoch in which this node serves at this moment.
    serves: Box<dyn Fn() -> Option<u64> + Send + Sync>,
    /// The epoch in which the answer says that this node serves; 0: it does not say so.
    epoch: AtomicU64,
}

impl Claim {
    pub(super) fn new(sources: Sources) -> Arc<Self> {
        Self::with(Box::new(move || sources.serves()))
    }

    fn with(serves: Box<dyn Fn() -> Option<u64> + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { serves, epoch: AtomicU64::new(0) })
    }

    /// True if this node serves now. Then nothing leaves on this connection once that is over.
    pub(super) fn make(&self) -> bool {
        let epoch = (self.serves)().unwrap_or(0);
        self.epoch.store(epoch, Ordering::SeqCst);
        epoch != 0
    }

    fn holds(&self) -> io::Result<()> {
        let claimed = self.epoch.load(Ordering::SeqCst);
        if claimed == 0 || (self.serves)() == Some(claimed) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, "this node is not PRIMARY with a valid lease any more"))
    }
}

/// A connection that writes only what still holds.
pub(super) struct ClaimedStream {
    stream: TcpStream,
    claim: Arc<Claim>,
}

impl ClaimedStream {
    pub(super) fn new(stream: TcpStream, claim: Arc<Claim>) -> Self {
        Self { stream, claim }
    }
}

impl AsyncRead for ClaimedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ClaimedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.claim.holds()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.claim.holds()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn what_was_claimed_leaves_only_while_it_is_true() {
        let epoch = Arc::new(AtomicU64::new(3));
        let asked = Arc::clone(&epoch);
        let claim = Claim::with(Box::new(move || Some(asked.load(Ordering::SeqCst)).filter(|epoch| *epoch != 0)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut server = ClaimedStream::new(listener.accept().await.unwrap().0, Arc::clone(&claim));
        assert!(claim.make());
        server.write_all(b"true").await.unwrap();
        // It has lost the role, and even when it has won it again, this answer is of its former term.
        for later in [0, 4] {
            epoch.store(later, Ordering::SeqCst);
            assert!(server.write_all(b"late").await.is_err());
        }
        // Who claims nothing may speak at any time.
        epoch.store(0, Ordering::SeqCst);
        assert!(!claim.make());
        server.write_all(b"503").await.unwrap();
        drop(server);
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "true503");
    }
}
