//! Carries a client's connection to the service on this host and back, byte for byte. Either side may be done with
//! sending long before the other is. Must never read more than can be written, nor hold a buffer for a connection on
//! which nothing happens.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};

use crate::telemetry::{SERVICE_BYTES, SERVICE_UNREACHABLE};

/// Longest time for the service to accept a connection, and its header.
const CONNECT: Duration = Duration::from_secs(5);
/// Bytes that are carried at once.
const PIECE: usize = 64 << 10;
/// The 12 bytes by which the PROXY protocol, version 2, begins (its specification, section 2.2).
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

thread_local! {
    /// One for each thread that carries: what cannot be written at once is copied out of it.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIECE].into_boxed_slice());
}

/// Where the connections of one port go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// A port of 127.0.0.1.
    pub port: u16,
    /// Whether the service is told the addresses by a header of the PROXY protocol, version 2.
    pub proxy: bool,
}

/// Carries until both sides are done, and returns how many bytes went in and out. `addresses` are the client's and the
/// one that it has reached.
///
/// # Errors
/// When the service does not accept the connection, or either side ends it out of order: the caller then resets the
/// client's. The service's is reset already.
pub async fn carry<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut S,
    addresses: (SocketAddr, SocketAddr),
    target: Target,
) -> io::Result<(u64, u64)> {
    let mut service =
        connect(addresses, target).await.inspect_err(|_| metrics::counter!(SERVICE_UNREACHABLE).increment(1))?;
    let carried = Carrier { client, service: &mut service, inward: Way::default(), outward: Way::default() }.await;
    if carried.is_err() {
        // It learns that the client is gone, and does not take what has come for the whole. It fails only if it is
        // gone.
        let _ = service.set_zero_linger();
    }
    carried
}

async fn connect((from, to): (SocketAddr, SocketAddr), target: Target) -> io::Result<TcpStream> {
    let connected = async {
        let mut service = TcpStream::connect((Ipv4Addr::LOCALHOST, target.port)).await?;
        service.set_nodelay(true)?;
        if target.proxy {
            service.write_all(&header(from, to)).await?;
        }
        Ok(service)
    };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("the service does not accept within {CONNECT:?}"));
    timeout(CONNECT, connected).await.map_err(late)?
}

/// Has the kernel find out whether a client that says nothing is still there. It fails only if it is not.
pub fn keep_alive(client: &TcpStream) {
    let probes = socket2::TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
    let _ = SockRef::from(client).set_tcp_keepalive(&probes);
}

/// The header of the PROXY protocol, version 2: a TCP connection from one address to the other.
fn header(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    header.push(0x21); // version 2, a connection of somebody else
    let addresses = match (from.ip().to_canonical(), to.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            header.push(0x11); // TCP over IPv4
            [from.octets(), to.octets()].concat()
        }
        (from, to) => {
            let wide = |address: IpAddr| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            };
            header.push(0x21); // TCP over IPv6
            [wide(from), wide(to)].concat()
        }
    };
    header.extend((addresses.len() as u16 + 4).to_be_bytes());
    header.extend(addresses);
    header.extend(from.port().to_be_bytes());
    header.extend(to.port().to_be_bytes());
    header
}

/// Both directions of one connection.
struct Carrier<'a, S> {
    client: &'a mut S,
    service: &'a mut TcpStream,
    inward: Way,
    outward: Way,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Carrier<'_, S> {
    type Output = io::Result<(u64, u64)>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let outcome: io::Result<(bool, bool)> = BUFFER.with_borrow_mut(|buffer| {
            let inward = this.inward.poll(cx, this.client, this.service, buffer)?;
            let outward = this.outward.poll(cx, this.service, this.client, buffer)?;
            Ok((inward.is_ready(), outward.is_ready()))
        });
        for (direction, way) in [("in", &mut this.inward), ("out", &mut this.outward)] {
            let news = way.carried - std::mem::replace(&mut way.told, way.carried);
            if news > 0 {
                metrics::counter!(SERVICE_BYTES, "direction" => direction).increment(news);
            }
        }
        match outcome {
            Err(error) => Poll::Ready(Err(error)),
            Ok((true, true)) => Poll::Ready(Ok((this.inward.carried, this.outward.carried))),
            Ok(_) => Poll::Pending,
        }
    }
}

/// One direction.
#[derive(Debug, Default)]
struct Way {
    /// Read and not written yet, from `written` on.
    left: Vec<u8>,
    written: usize,
    /// Nothing more comes.
    ended: bool,
    /// That was passed on.
    closed: bool,
    carried: u64,
    told: u64,
}

impl Way {
    fn poll<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        buffer: &mut [u8],
    ) -> Poll<io::Result<()>> {
        loop {
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            while self.written < self.left.len() {
                let length = ready!(Pin::new(&mut *to).poll_write(cx, &self.left[self.written..]))?;
                self.wrote(length)?;
                self.written += length;
            }
            (self.left, self.written) = (Vec::new(), 0);
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.closed = true;
                continue;
            }
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(&mut *from).poll_read(cx, &mut read))?;
            let bytes = read.filled();
            if bytes.is_empty() {
                self.ended = true;
                continue;
            }
            // The next round goes on with what is left.
            match Pin::new(&mut *to).poll_write(cx, bytes) {
                Poll::Ready(written) => {
                    let length = written?;
                    self.wrote(length)?;
                    self.left.extend_from_slice(&bytes[length..]);
                }
                Poll::Pending => {
                    self.left.extend_from_slice(bytes);
                    return Poll::Pending;
                }
            }
        }
    }

    fn wrote(&mut self, length: usize) -> io::Result<()> {
        if length == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.carried += length as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncReadExt,
        net::{TcpListener, tcp::OwnedReadHalf},
        task::JoinHandle,
    };

    use super::*;

    /// A client's connection through the proxy, the service's end of it, and the proxy's task.
    async fn connection(proxy: bool) -> (TcpStream, TcpStream, JoinHandle<io::Result<(u64, u64)>>) {
        let (outside, inside) =
            (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let client = TcpStream::connect(outside.local_addr().unwrap()).await.unwrap();
        let (mut accepted, from) = outside.accept().await.unwrap();
        let target = Target { port: inside.local_addr().unwrap().port(), proxy };
        let to = accepted.local_addr().unwrap();
        let carrying = tokio::spawn(async move { carry(&mut accepted, (from, to), target).await });
        let (service, _) = inside.accept().await.unwrap();
        (client, service, carrying)
    }

    async fn sum(mut stream: OwnedReadHalf) -> (u64, u32) {
        let (mut length, mut sum, mut bytes) = (0, 0, vec![0; 100_000]);
        loop {
            let read = stream.read(&mut bytes).await.unwrap();
            if read == 0 {
                return (length, sum);
            }
            (length, sum) = (length + read as u64, crc32c::crc32c_append(sum, &bytes[..read]));
        }
    }

    #[tokio::test]
    async fn a_side_that_is_done_still_gets_the_answer() {
        let (mut client, mut service, carrying) = connection(false).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        service.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question", "the end came through");
        for _ in 0..3 {
            service.write_all(b"part ").await.unwrap();
            assert_eq!(client.read(&mut [0; 9]).await.unwrap(), 5, "at once, and not at the end");
        }
        drop(service);
        assert_eq!(client.read(&mut [0; 9]).await.unwrap(), 0);
        assert_eq!(carrying.await.unwrap().unwrap(), (8, 15));
    }

    /// The other way round: the service has answered before the client has sent everything.
    #[tokio::test]
    async fn an_early_answer_does_not_cut_an_upload_short() {
        let (mut client, mut service, carrying) = connection(false).await;
        client.write_all(b"first").await.unwrap();
        service.read_exact(&mut [0; 5]).await.unwrap();
        service.write_all(b"done").await.unwrap();
        service.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "done");
        let piece = vec![7; 1 << 20];
        let sending = tokio::spawn(async move {
            for _ in 0..32 {
                client.write_all(&piece).await.unwrap();
            }
        });
        let mut rest = Vec::new();
        service.read_to_end(&mut rest).await.unwrap();
        sending.await.unwrap();
        assert_eq!(rest.len(), 32 << 20);
        drop(service);
        assert_eq!(carrying.await.unwrap().unwrap(), (5 + (32 << 20), 4));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn much_goes_both_ways_at_once_and_arrives_as_it_was() {
        let (client, service, carrying) = connection(false).await;
        let (client_in, mut client_out) = client.into_split();
        let (service_in, mut service_out) = service.into_split();
        let up = tokio::spawn(async move {
            let (mut sum, mut piece) = (0, vec![0; 77_777]);
            for round in 0..3000_u32 {
                piece.fill(round as u8);
                sum = crc32c::crc32c_append(sum, &piece);
                client_out.write_all(&piece).await.unwrap();
            }
            client_out.shutdown().await.unwrap();
            (3000 * 77_777, sum)
        });
        let down = tokio::spawn(async move {
            let (mut sum, piece) = (0, vec![9; 1_000]);
            for _ in 0..50_000 {
                sum = crc32c::crc32c_append(sum, &piece);
                service_out.write_all(&piece).await.unwrap();
            }
            service_out.shutdown().await.unwrap();
            (50_000_000, sum)
        });
        let (sent, received, answered, answer) = tokio::join!(up, sum(service_in), down, sum(client_in));
        assert_eq!((sent.unwrap(), answered.unwrap()), (received, answer));
        assert_eq!(carrying.await.unwrap().unwrap(), (3000 * 77_777, 50_000_000));
    }

    #[tokio::test]
    async fn a_reset_goes_through_in_both_directions() {
        let (client, mut service, carrying) = connection(false).await;
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(carrying.await.unwrap().is_err());
        assert_eq!(service.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let (_client, service, carrying) = connection(false).await;
        service.set_zero_linger().unwrap();
        drop(service);
        assert_eq!(carrying.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_service_that_is_not_there_is_an_error() {
        let outside = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = outside.local_addr().unwrap();
        let _client = TcpStream::connect(at).await.unwrap();
        let (mut accepted, from) = outside.accept().await.unwrap();
        drop(outside);
        let error = carry(&mut accepted, (from, at), Target { port: at.port(), proxy: false }).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn the_service_is_told_who_connects() {
        let (mut client, mut service, _carrying) = connection(true).await;
        client.write_all(b"GET").await.unwrap();
        let mut head = [0; 28 + 3];
        service.read_exact(&mut head).await.unwrap();
        assert_eq!(&head[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
        assert_eq!(&head[16..24], [127, 0, 0, 1, 127, 0, 0, 1]);
        let ports =
            [client.local_addr().unwrap().port().to_be_bytes(), client.peer_addr().unwrap().port().to_be_bytes()];
        assert_eq!((&head[24..28], &head[28..]), (ports.concat().as_slice(), &b"GET"[..]));
    }

    #[test]
    fn addresses_of_both_families_have_their_header() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let wide = header(address("[2001:db8::7]:4000"), address("[2001:db8::1]:443"));
        assert_eq!((wide.len(), &wide[12..16]), (16 + 36, &b"\x21\x21\0\x24"[..]));
        assert_eq!(&wide[48..], [0x0f, 0xa0, 0x01, 0xbb]);
        // What a socket of both families shows of a client by IPv4.
        let narrow = header(address("[::ffff:192.0.2.1]:1"), address("[::ffff:192.0.2.2]:2"));
        assert_eq!(narrow[16..], [192, 0, 2, 1, 192, 0, 2, 2, 0, 1, 0, 2]);
    }
}
