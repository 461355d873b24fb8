//! Whether a service can be used: asked by HTTP or TCP on this host, or told by the service itself. Must never ask
//! another host, and never take the word of a process that is not the service.

use std::{
    io::{self, IoSliceMut},
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddress, UnixDatagram as StdDatagram},
    },
    pin::pin,
    time::Duration,
};

use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixDatagram},
    time::{sleep, timeout},
};

use crate::config::service::Readiness;

/// First and longest pause between two questions.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
/// How long one question may take.
const QUESTION: Duration = Duration::from_secs(5);
/// Longest message of a service that is looked at, in bytes.
const MESSAGE: usize = 4096;

/// Returns when the service can be used. `word` is where it says so, if it does so itself.
pub(super) async fn wait(readiness: Readiness, word: Option<Word>) {
    let mut pause = PAUSE.0;
    loop {
        let good = match (&readiness, &word) {
            (Readiness::Tcp(port), _) => {
                timeout(QUESTION, TcpStream::connect(("127.0.0.1", *port))).await.is_ok_and(|c| c.is_ok())
            }
            (Readiness::Http { port, path }, _) => {
                timeout(QUESTION, ask(*port, path)).await.is_ok_and(|good| good.unwrap_or(false))
            }
            (Readiness::Notify, Some(word)) => word.ready().await.is_ok(),
            (Readiness::Notify, None) => false,
        };
        if good {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// True if the answer is 2xx or 3xx.
async fn ask(port: u16, path: &str) -> anyhow::Result<bool> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path)
        .header("host", format!("127.0.0.1:{port}"))
        .header("user-agent", "twistlockd (readiness)")
        .header("connection", "close")
        .body(Empty::<Bytes>::new())?;
    let mut answer = pin!(sender.send_request(request));
    let status = tokio::select! {
        answer = answer.as_mut() => answer?.status(),
        ended = connection => {
            // The answer may have come with the end.
            ended?;
            answer.await?.status()
        }
    };
    Ok(status.is_success() || status.is_redirection())
}

/// Where a service says that it is ready (`sd_notify`): a socket with a name of its own.
#[derive(Debug)]
pub(super) struct Word {
    socket: UnixDatagram,
    name: String,
    /// Who may say it.
    user: u32,
}

impl Word {
    /// A socket that listens to this user alone.
    ///
    /// # Errors
    /// When the system gives none.
    pub(super) fn listen(user: u32) -> io::Result<Self> {
        let name = format!("twistlock-service-{:032x}", rand::random::<u128>());
        let socket = StdDatagram::bind_addr(&UnixAddress::from_abstract_name(&name)?)?;
        socket.set_nonblocking(true)?;
        // The kernel vouches for the sender: anybody on this host may write to the socket.
        setsockopt(&socket, sockopt::PassCred, &true)?;
        Ok(Self { socket: UnixDatagram::from_std(socket)?, name, user })
    }

    /// What the service finds in `NOTIFY_SOCKET`.
    pub(super) fn variable(&self) -> String {
        format!("@{}", self.name)
    }

    async fn ready(&self) -> io::Result<()> {
        loop {
            self.socket.readable().await?;
            match self.socket.try_io(Interest::READABLE, || self.receive()) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes one message; true if it says READY=1 and comes from the service.
    fn receive(&self) -> io::Result<bool> {
        let mut bytes = [0; MESSAGE];
        let mut space = nix::cmsg_space!(nix::libc::ucred);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        // Descriptors that come along (FDSTORE=1) find no room, and are closed by that.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let own = message.cmsgs()?.any(|part| match part {
            ControlMessageOwned::ScmCredentials(sender) => sender.uid() == self.user,
            _ => false,
        });
        let length = message.bytes;
        Ok(own && bytes[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1"))
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn is_ready(readiness: Readiness, word: Option<Word>) -> bool {
        timeout(Duration::from_millis(500), wait(readiness, word)).await.is_ok()
    }

    #[tokio::test]
    async fn a_port_is_ready_when_it_accepts() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_ready(Readiness::Tcp(port), None).await);
        drop(listener);
        assert!(!is_ready(Readiness::Tcp(port), None).await);
    }

    /// Answers each connection with the next of these.
    async fn answering(answers: Vec<&'static str>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 1024];
                let length = stream.read(&mut head).await.unwrap();
                assert!(head[..length].starts_with(b"GET /alive?x HTTP/1.1\r\n"));
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        port
    }

    #[tokio::test]
    async fn http_is_ready_with_a_good_answer_alone() {
        let bad = "HTTP/1.1 503 Wait\r\ncontent-length: 0\r\n\r\n";
        let asked = |port| Readiness::Http { port, path: "/alive?x".to_owned() };
        let port = answering(vec![bad, "no HTTP\r\n\r\n", "", "HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n"]).await;
        assert!(is_ready(asked(port), None).await);
        let port = answering(vec![bad; 64]).await;
        assert!(!is_ready(asked(port), None).await);
    }

    #[tokio::test]
    async fn the_service_says_it_itself_and_nobody_else_for_it() {
        let own = nix::unistd::getuid().as_raw();
        let say = |word: &Word, text: &str| {
            let address = UnixAddress::from_abstract_name(word.variable().strip_prefix('@').unwrap()).unwrap();
            StdDatagram::unbound().unwrap().send_to_addr(text.as_bytes(), &address).unwrap();
        };
        let word = Word::listen(own).unwrap();
        say(&word, "STATUS=begins\n");
        say(&word, "STATUS=runs\nREADY=1\n");
        assert!(is_ready(Readiness::Notify, Some(word)).await);
        let word = Word::listen(own).unwrap();
        say(&word, "READY=10\nXREADY=1");
        assert!(!is_ready(Readiness::Notify, Some(word)).await);
        let word = Word::listen(own + 1).unwrap();
        say(&word, "READY=1");
        assert!(!is_ready(Readiness::Notify, Some(word)).await, "another user");
    }
}
