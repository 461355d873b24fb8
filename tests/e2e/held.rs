//! One TLS connection to one node that was in use before the fault, without the conveniences of an HTTP client: no second
//! connection, no retry, and every byte that comes back is seen.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::CertificateDer};
use twistlock_ha::dev::ClusterFile;

/// How long an answer, or the end of a connection that nobody may answer, can take.
const LIMIT: Duration = Duration::from_secs(20);

/// An open connection over which a request was answered.
pub struct Held {
    stream: StreamOwned<ClientConnection, TcpStream>,
    /// `ADDRESS:PORT`.
    host: String,
    authorization: String,
    /// What of the request has been given to the kernel.
    request: Vec<u8>,
    sent: usize,
}

impl Held {
    /// Connects to the node, which must be PRIMARY, and reads the tags once.
    pub fn open(cluster: &ClusterFile, node: usize, authorization: &str) -> Self {
        let host = cluster.nodes[node].console_url.trim_start_matches("https://").to_owned();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&cluster.ca).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = cluster.nodes[node].address.clone().try_into().unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = TcpStream::connect(&host).expect("the primary's port is open");
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.set_nodelay(true).unwrap();
        let stream = StreamOwned::new(connection, socket);
        let authorization = authorization.to_owned();
        let mut held = Self { stream, host, authorization, request: Vec::new(), sent: 0 };
        held.prepare("GET", "");
        held.send_rest().expect("the primary reads");
        held.read_answer();
        held
    }

    /// Writes the next request into this side's memory: reads the tags, or makes one if there is a body.
    pub fn prepare(&mut self, method: &str, body: &str) {
        let Self { host, authorization, .. } = self;
        let length = body.len();
        let head = format!(
            "{method} /api/v1/tags?limit=1 HTTP/1.1\r\nhost: {host}\r\nauthorization: {authorization}\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        (self.request, self.sent) = (head.into_bytes(), 0);
    }

    /// Sends the first half of what was prepared.
    pub fn send_half(&mut self) -> io::Result<()> {
        self.send_until(self.request.len() / 2)
    }

    /// Sends what is left of what was prepared.
    pub fn send_rest(&mut self) -> io::Result<()> {
        self.send_until(self.request.len())
    }

    fn send_until(&mut self, end: usize) -> io::Result<()> {
        let bytes = self.sent..end;
        self.sent = end;
        self.stream.write_all(&self.request[bytes])?;
        self.stream.flush()
    }

    /// Reads one answer, which must be a 200, to its last byte.
    pub fn read_answer(&mut self) {
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let read = self.stream.read(&mut buffer).expect("an answer of the primary");
            assert!(read > 0, "the primary closed the connection");
            text.extend_from_slice(&buffer[..read]);
            let Some(head) = text.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
            let lower = String::from_utf8_lossy(&text[..head]).to_lowercase();
            assert!(lower.starts_with("http/1.1 200"), "{lower}");
            let length = lower.lines().find_map(|line| line.strip_prefix("content-length:"));
            let length: usize = length.expect("a length").trim().parse().expect("a number");
            if text.len() == head + 4 + length {
                return;
            }
        }
    }

    /// Waits for the end of the connection. The test fails if a single byte comes back before it, of TLS even. Returns how
    /// it ended: `reset` or `closed`.
    pub fn wait_end(mut self) -> &'static str {
        let mut bytes = [0; 4096];
        match self.stream.sock.read(&mut bytes) {
            Ok(0) => "closed",
            Ok(count) => {
                let text = self.decrypt(&bytes[..count]);
                panic!(
                    "{} answered {count} bytes:
{text}",
                    self.host
                )
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("{} keeps a connection of its former term open", self.host)
            }
            Err(_) => "reset",
        }
    }

    /// What the bytes say, for the message of a test that fails.
    fn decrypt(&mut self, mut bytes: &[u8]) -> String {
        let mut text = [0; 4096];
        let connection = &mut self.stream.conn;
        let read = connection.read_tls(&mut bytes).and_then(|_| {
            connection.process_new_packets().map_err(io::Error::other)?;
            connection.reader().read(&mut text)
        });
        match read {
            Ok(count) => String::from_utf8_lossy(&text[..count]).into_owned(),
            Err(error) => format!("(no text: {error})"),
        }
    }
}
