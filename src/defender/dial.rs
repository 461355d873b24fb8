//! How a Defender gets to a Console: it tries every address of every name until one answers, and draws a pause before
//! it tries again. Must never let many Defenders that lost the same Console come back at the same moment.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use rustls::ClientConfig;
use tokio::{
    net::{TcpSocket, TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{WebSocketStream, client_async_with_config, tungstenite::protocol::WebSocketConfig};

use super::{
    shown::is_refused,
    wire::{ANSWER, PATH},
};
use crate::pki::{self, CONSOLE_NAME};

/// How long one address may take to accept a connection, and how long TLS and the upgrade may take then.
const CONNECT: Duration = Duration::from_secs(1);
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long names may take to be resolved.
const RESOLVE: Duration = Duration::from_secs(5);
/// Shortest and longest span that a pause is drawn from.
const SPANS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Addresses that are tried in one round.
const ADDRESSES: usize = 64;
/// Bytes that are read from the socket at once.
const BUFFER: usize = 4 << 10;

/// A connection to a Console.
pub type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// The pause before the next round of one who has been `without` a Console for so long; `draw` is a random number from
/// 0 to 1. Those who lost the same Console come to the next one within as much time as there was none: the longer that
/// took, the more of them there are that knock.
pub fn pause(without: Duration, draw: f64) -> Duration {
    without.clamp(SPANS.0, SPANS.1).mul_f64(draw)
}

/// Connects to the first address that answers as a Console, beginning with the one that did so `last`. `from` is the
/// address to come from, if that matters.
///
/// # Errors
/// Why the last address did not do.
pub async fn dial(
    consoles: &[String],
    last: Option<SocketAddr>,
    from: Option<IpAddr>,
    tls: &Arc<ClientConfig>,
) -> Result<(Socket, SocketAddr)> {
    let mut addresses: Vec<SocketAddr> = last.into_iter().collect();
    let mut why = anyhow!("no address is known");
    for console in consoles {
        match timeout(RESOLVE, lookup_host(console)).await {
            Ok(Ok(found)) => addresses.extend(found),
            Ok(Err(error)) => why = anyhow!(error).context(format!("resolve {console}")),
            Err(_) => why = anyhow!("resolve {console}: it takes too long"),
        }
    }
    let mut tried = Vec::new();
    for address in addresses {
        if tried.contains(&address) || tried.len() >= ADDRESSES {
            continue;
        }
        tried.push(address);
        match connect(address, from, Arc::clone(tls)).await {
            Ok(socket) => return Ok((socket, address)),
            // That a Console refuses says more than that other addresses do not answer.
            Err(error) if !is_refused(&why) => why = error.context(address.to_string()),
            Err(_) => {}
        }
    }
    Err(why)
}

async fn connect(address: SocketAddr, from: Option<IpAddr>, tls: Arc<ClientConfig>) -> Result<Socket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(from) = from {
        socket.bind(SocketAddr::new(from, 0)).with_context(|| format!("come from {from}"))?;
    }
    let stream = timeout(CONNECT, socket.connect(address)).await.context("it does not accept connections")??;
    stream.set_nodelay(true)?;
    let greeting = async {
        let stream = TlsConnector::from(tls).connect(pki::console_name(), stream).await?;
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER)
            .max_message_size(Some(ANSWER))
            .max_frame_size(Some(ANSWER));
        let at = format!("ws://{CONSOLE_NAME}{PATH}");
        let (socket, _) = client_async_with_config(at, stream, Some(config)).await?;
        Ok(socket)
    };
    timeout(HANDSHAKE, greeting).await.context("it says nothing")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_at_most_as_long_as_there_was_no_console() {
        let secs = Duration::from_secs;
        assert_eq!(pause(secs(0), 1.0), secs(1), "it has just been lost: not all at once");
        assert_eq!(pause(secs(4), 0.5), secs(2));
        assert_eq!(pause(secs(3600), 1.0), secs(30));
        assert_eq!(pause(secs(4), 0.0), secs(0));
    }
}
