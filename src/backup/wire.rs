//! HTTP as the object store's client wants it: one connection for each request, with the TLS of this program and the
//! authorities that the host trusts. Must never speak plain HTTP unless that was allowed, use a proxy, or wait without
//! end.

use std::{fmt, future::Future, io, pin::Pin, sync::Arc, time::Duration};

use http_body_util::BodyExt;
use hyper::{Uri, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use object_store::{
    ClientConfigKey, ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    },
};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// Longest time until a connection is there, its TLS included.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest time from the first byte of a request to the head of its answer. A request carries some megabytes at most.
const ANSWER: Duration = Duration::from_secs(120);

/// Makes the clients of object stores.
pub(super) struct Connector(Arc<ClientConfig>);

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl Connector {
    /// Reads the list of authorities: it may have changed since it was read last.
    ///
    /// # Errors
    /// When the cryptography that this program was built with has no TLS version that is safe.
    pub fn new() -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Self::trusting(roots)
    }

    fn trusting(roots: RootCertStore) -> Result<Self, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(Self(Arc::new(config.with_root_certificates(roots).with_no_client_auth())))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        Ok(HttpClient::new(Client { tls: TlsConnector::from(Arc::clone(&self.0)), plain }))
    }
}

/// An HTTP client for an object store.
struct Client {
    tls: TlsConnector,
    plain: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("plain", &self.plain).finish_non_exhaustive()
    }
}

impl HttpService for Client {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(self.exchange(request))
    }
}

fn late(what: &'static str) -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, io::Error::new(io::ErrorKind::TimedOut, what))
}

fn failed(kind: HttpErrorKind) -> impl Fn(io::Error) -> HttpError {
    move |error| HttpError::new(kind, error)
}

/// A request that broke off may be sent again: however often it is sent, it writes the same.
fn broken(error: hyper::Error) -> HttpError {
    HttpError::new(HttpErrorKind::Request, error)
}

impl Client {
    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (host, port, secure) = place(request.uri()).map_err(failed(HttpErrorKind::Unknown))?;
        if !secure && !self.plain {
            let why = "plain HTTP is only used with AWS_ALLOW_HTTP=true";
            return Err(failed(HttpErrorKind::Unknown)(io::Error::new(io::ErrorKind::PermissionDenied, why)));
        }
        let dialled = timeout(CONNECT, TcpStream::connect((host.as_str(), port))).await;
        let stream =
            dialled.map_err(|_| late("nobody answers at its address"))?.map_err(failed(HttpErrorKind::Connect))?;
        if !secure {
            return send(stream, request).await;
        }
        let name = ServerName::try_from(host)
            .map_err(|error| failed(HttpErrorKind::Unknown)(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let greeted = timeout(CONNECT, self.tls.connect(name, stream)).await;
        // A certificate that does not verify today will not do so in a second.
        let stream =
            greeted.map_err(|_| late("it does not answer with TLS"))?.map_err(failed(HttpErrorKind::Unknown))?;
        send(stream, request).await
    }
}

/// Host, port, and whether it is HTTPS.
fn place(uri: &Uri) -> io::Result<(String, u16, bool)> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "the endpoint is not an http or https URL");
    let secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong()),
    };
    let host = uri.host().ok_or_else(wrong)?.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok((host, uri.port_u16().unwrap_or(if secure { 443 } else { 80 }), secure))
}

async fn send<S>(stream: S, mut request: HttpRequest) -> Result<HttpResponse, HttpError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Its errors come out of the request, too.
    let driving = tokio::spawn(async move { connection.await.is_ok() });
    let authority = request.uri().authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
    if let Ok(host) = header::HeaderValue::from_str(&authority) {
        request.headers_mut().entry(header::HOST).or_insert(host);
    }
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).parse::<Uri>();
    *request.uri_mut() = path.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
    match timeout(ANSWER, sender.send_request(request)).await {
        Ok(answer) => Ok(answer.map_err(broken)?.map(|body| HttpResponseBody::new(body.map_err(broken)))),
        Err(_) => {
            driving.abort();
            Err(late("it does not answer the request"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_taken_apart() {
        let of = |text: &str| place(&text.parse().unwrap()).ok();
        assert_eq!(of("https://s3.example:9000/b/c"), Some(("s3.example".into(), 9000, true)));
        assert_eq!(of("http://[::1]/b"), Some(("::1".into(), 80, false)));
        assert_eq!(of("ftp://a/b"), None);
        assert_eq!(of("/b"), None);
    }

    fn request(url: &str) -> HttpRequest {
        let mut request = HttpRequest::new(object_store::client::HttpRequestBody::empty());
        *request.uri_mut() = url.parse().unwrap();
        request
    }

    #[tokio::test]
    async fn a_server_has_to_prove_its_name() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let server = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, acceptor) =
            (listener.local_addr().unwrap().port(), tokio_rustls::TlsAcceptor::from(Arc::new(server)));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut head = vec![0; 4096];
                let count = stream.read(&mut head).await.unwrap();
                // What it was sent comes back.
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {count}\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.write_all(&head[..count]).await.unwrap();
            }
        });
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let client = |connector: Connector| Client { tls: TlsConnector::from(connector.0), plain: false };
        let trusting = client(Connector::trusting(roots).unwrap());
        let answer = trusting.exchange(request(&format!("https://localhost:{port}/a%20b?c=d"))).await.unwrap();
        let head = String::from_utf8(answer.into_body().bytes().await.unwrap().to_vec()).unwrap();
        assert!(head.starts_with("GET /a%20b?c=d HTTP/1.1\r\n"), "{head}");
        assert!(head.contains(&format!("host: localhost:{port}\r\n")), "{head}");
        assert!(trusting.exchange(request(&format!("https://127.0.0.1:{port}/"))).await.is_err(), "another name");
        let other = client(Connector::new().unwrap());
        assert!(other.exchange(request(&format!("https://localhost:{port}/"))).await.is_err(), "nobody knows it");
    }

    #[tokio::test]
    async fn plain_http_has_to_be_allowed() {
        let client = Client { tls: TlsConnector::from(Connector::new().unwrap().0), plain: false };
        let error = client.exchange(request("http://127.0.0.1:1/a")).await.unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("AWS_ALLOW_HTTP"), "{error}");
    }
}
