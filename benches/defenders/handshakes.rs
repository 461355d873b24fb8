//! What a TLS handshake of a Defender costs, in full and resumed, at either end: both are in this thread, and no network is between
//! them. Must never count as resumed what was not.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection};
use serde::Serialize;
use twistlock_ha::{
    cluster::ClusterId,
    pki::{
        Authority, ClusterKey, Pair, Tickets, console_name, defender_client_tls, defender_port_tls, new_key,
        request_with,
    },
};

/// Microseconds of a processor for one handshake.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    console_us: f64,
    defender_us: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Costs {
    handshakes: usize,
    full: Cost,
    resumed: Cost,
}

impl Costs {
    /// Measures so many of each.
    pub fn measure(count: usize) -> Result<Self> {
        ensure!(count > 0, "at least one handshake of each kind is needed");
        let authority = Authority::create(ClusterId(1))?;
        let console = authority.issue_console(&["console.example"])?;
        let own = Pair::parse(&console.cert_pem, &console.key_pem)?;
        let (ca, key) = (authority.certificate_pem(), ClusterKey::generate());
        // One member after the other, as it is after a takeover.
        let members: Vec<_> = (0..2)
            .map(|_| defender_port_tls(&own, [ca].into_iter(), Some(Tickets::new(&key, ClusterId(1), ca))))
            .collect::<Result<Option<Vec<_>>, _>>()?
            .context("there is an authority")?;
        let defender = new_key()?;
        let csr = request_with(&defender, "host", &[])?;
        let certificate = authority.sign_defender_request(&csr, "00112233445566778899aabbccddeeff", "host")?;
        let client = || defender_client_tls(ca, &certificate, &defender);
        let known = client()?;
        let cost = |kind, spent: (Duration, Duration)| -> Result<Cost> {
            let each = |spent: Duration| (spent.as_secs_f64() * 1e7 / count as f64).round() / 10.0;
            ensure!(!spent.0.is_zero(), "{kind:?}: nothing was measured");
            Ok(Cost { console_us: each(spent.0), defender_us: each(spent.1) })
        };
        let mut full = (Duration::ZERO, Duration::ZERO);
        for number in 0..count {
            add(&mut full, shake(&client()?, &members[number % 2], HandshakeKind::Full)?);
        }
        shake(&known, &members[0], HandshakeKind::Full)?;
        let mut resumed = (Duration::ZERO, Duration::ZERO);
        for number in 0..count {
            add(&mut resumed, shake(&known, &members[number % 2], HandshakeKind::Resumed)?);
        }
        let (full, resumed) = (cost(HandshakeKind::Full, full)?, cost(HandshakeKind::Resumed, resumed)?);
        Ok(Self { handshakes: count, full, resumed })
    }

    /// Prints a table.
    pub fn print(&self) {
        println!("{:<32} {:>12} {:>12}", "microseconds of a processor", "Console", "Defender");
        for (kind, Cost { console_us, defender_us }) in [("in full", &self.full), ("resumed", &self.resumed)] {
            println!("{:<32} {console_us:>12.1} {defender_us:>12.1}", format!("a handshake {kind}"));
        }
    }
}

fn add(sum: &mut (Duration, Duration), spent: (Duration, Duration)) {
    *sum = (sum.0 + spent.0, sum.1 + spent.1);
}

/// Does both ends of a handshake. Returns the time that each has taken.
fn shake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, kind: HandshakeKind) -> Result<(Duration, Duration)> {
    let (mut console, mut defender) = (Duration::ZERO, Duration::ZERO);
    let begin = Instant::now();
    let mut client = ClientConnection::new(Arc::clone(client), console_name())?;
    defender += begin.elapsed();
    let begin = Instant::now();
    let mut server = ServerConnection::new(Arc::clone(server))?;
    console += begin.elapsed();
    let (mut up, mut down) = (Vec::new(), Vec::new());
    while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
        let begin = Instant::now();
        while client.wants_write() {
            client.write_tls(&mut up)?;
        }
        defender += begin.elapsed();
        let begin = Instant::now();
        let mut from = &up[..];
        while !from.is_empty() {
            server.read_tls(&mut from)?;
            server.process_new_packets()?;
        }
        up.clear();
        while server.wants_write() {
            server.write_tls(&mut down)?;
        }
        console += begin.elapsed();
        let begin = Instant::now();
        let mut from = &down[..];
        while !from.is_empty() {
            client.read_tls(&mut from)?;
            client.process_new_packets()?;
        }
        down.clear();
        defender += begin.elapsed();
    }
    ensure!(server.handshake_kind() == Some(kind), "{:?} instead of {kind:?}", server.handshake_kind());
    Ok((console, defender))
}
