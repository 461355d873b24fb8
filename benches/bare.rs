//! What a request over HTTPS costs at least here: a server of hyper and rustls that has its answers in memory, and does nothing else.
//! `scripts/bench/reads.sh` gives it what a Console has answered, and measures it beside that Console. Must never be faster than an
//! honest server: it reads whole requests, and sends the same bytes with the same headers.
//!
//! Takes `ADDRESS:PORT`, and on standard input a JSON object: a path with its query, and `[[[HEADER, VALUE], ...], BODY]` for each.

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, sync::Arc};

use anyhow::{Context, Result};
use axum::{body::Bytes, http::HeaderMap};
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

type Answers = HashMap<String, (HeaderMap, Bytes)>;

fn main() -> Result<()> {
    let address = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let address: SocketAddr = address.context("ADDRESS:PORT is missing")?.parse()?;
    let answers: HashMap<String, (Vec<(String, String)>, String)> = serde_json::from_reader(std::io::stdin())?;
    let answers = answers.into_iter().map(|(path, (headers, body))| Ok((path, (parse(headers)?, Bytes::from(body)))));
    let answers = Arc::new(answers.collect::<Result<Answers>>()?);
    let tls = TlsAcceptor::from(Arc::new(tls(&address)?));
    // As many threads as the daemon's.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await?;
        println!("ready");
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(serve(stream, tls.clone(), Arc::clone(&answers)));
        }
    })
}

fn parse(headers: Vec<(String, String)>) -> Result<HeaderMap> {
    headers.into_iter().map(|(name, value)| Ok((name.parse()?, value.parse()?))).collect()
}

/// As a Console's: the same versions and ciphers, and a key of the same kind.
fn tls(address: &SocketAddr) -> Result<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(vec![address.ip().to_string()])?;
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?;
    Ok(config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key)?)
}

async fn serve(stream: TcpStream, tls: TlsAcceptor, answers: Arc<Answers>) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let path = request.uri().path_and_query().map_or("", |path| path.as_str());
        let found = answers.get(path).cloned();
        async move {
            let (headers, body) = found.unwrap_or_default();
            let mut response = Response::new(Full::new(body));
            *response.headers_mut() = headers;
            Ok::<_, Infallible>(response)
        }
    });
    let served = async {
        stream.set_nodelay(true)?;
        let stream = tls.accept(stream).await?;
        http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await?;
        anyhow::Ok(())
    };
    if let Err(error) = served.await {
        eprintln!("a connection ended: {error}");
    }
}
