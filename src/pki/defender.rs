//! Certificates of Defenders and the TLS settings of both ends. A Defender's certificate is for clients alone, does not
//! have the name that members have, and names the Defender in a URI: `twistlock://<cluster id>/defender/<id>`. Must
//! never let one pass for a member's, nor a member's for one of a Defender.

use std::sync::Arc;

use rcgen::{ExtendedKeyUsagePurpose, SanType};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    pki_types::ServerName,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};

use super::{
    Authority, CONSOLE_NAME, LEAF_DAYS, Pair, PkiError, SigningRequest, Tickets, holder, params::params, pem, provider,
};
use crate::cluster::ClusterId;

/// Tickets that a Defender gets with each connection. One is good for one attempt: when thousands come back at once,
/// some attempts come to nothing, and must not lead to handshakes in full.
const TICKETS: usize = 4;
/// Tickets that a Defender keeps: all members have the same name.
const SESSIONS: usize = 8;
/// Digits of an id.
const ID: usize = 32;

/// Which Defender of which cluster a certificate (DER) was made for. Says nothing about who signed it: TLS checks that.
///
/// # Errors
/// [`PkiError::Identity`] when the certificate cannot be parsed, or does not name exactly one Defender.
pub fn defender_identity(certificate: &[u8]) -> Result<(ClusterId, String), PkiError> {
    holder(certificate, parse_identity, "the certificate is not one of a Defender")
}

fn parse_identity(uri: &str) -> Option<(ClusterId, String)> {
    let (cluster, id) = uri.strip_prefix("twistlock://")?.split_once("/defender/")?;
    Some((cluster.parse().ok()?, id.to_owned())).filter(|_| is_id(id))
}

fn is_id(id: &str) -> bool {
    id.len() == ID && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Authority {
    /// Signs the request of a Defender, whose key stays where it is. Of the request only the key counts. `id` has 32
    /// hexadecimal digits; `name` is for people.
    ///
    /// # Errors
    /// [`PkiError::Request`] when the request is not sound, [`PkiError::Identity`] when the id is none, or this host's
    /// clock is before the beginning of the authority, [`PkiError::Generate`] when the certificate cannot be made.
    pub fn sign_defender_request(&self, csr: &str, id: &str, name: &str) -> Result<String, PkiError> {
        let request = SigningRequest::parse(csr)?;
        if !is_id(id) {
            return Err(PkiError::Identity("a Defender's id has 32 hexadecimal digits"));
        }
        let mut params = params(name, LEAF_DAYS);
        let uri = format!("twistlock://{}/defender/{id}", self.cluster());
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.certify(params, request.key())
    }
}

/// TLS for the port of the Defenders: a client must show a certificate of one of these authorities (PEM), and sees the
/// cluster's own certificate of this Console. With `tickets`, a client that was here, or at another member with the
/// same ones, resumes its session, and shows its certificate by that. None without an authority.
///
/// # Errors
/// [`PkiError::Tls`] when one of the certificates cannot be used.
pub fn defender_port_tls<'a>(
    own: &Pair,
    authorities: impl Iterator<Item = &'a str>,
    tickets: Option<Tickets>,
) -> Result<Option<Arc<ServerConfig>>, PkiError> {
    let roots = roots(authorities)?;
    if roots.is_empty() {
        return Ok(None);
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| PkiError::Generate(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(own.resolver());
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // What this member alone remembers would be of no use after a takeover.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    tickets.into_iter().for_each(|tickets| config.ticketer = Arc::new(tickets));
    config.send_tls13_tickets = TICKETS;
    Ok(Some(Arc::new(config)))
}

/// What a Defender shows and whom it trusts: its certificate and key, and the authorities, all PEM.
///
/// # Errors
/// [`PkiError::Custom`] when one of the texts cannot be read, [`PkiError::Tls`] when they cannot be used together.
pub fn defender_client_tls(authorities: &str, certificate: &str, key: &str) -> Result<Arc<ClientConfig>, PkiError> {
    let unreadable = |error: pem::PemError| PkiError::Custom(error.to_string());
    let chain = pem::certificates(certificate).map_err(unreadable)?;
    let key = pem::private_key(key).map_err(unreadable)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_root_certificates(roots(std::iter::once(authorities))?)
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::in_memory_sessions(SESSIONS);
    Ok(Arc::new(config))
}

/// The name that every Console's certificate of the cluster's own authority has, as TLS wants it.
pub fn console_name() -> ServerName<'static> {
    ServerName::try_from(CONSOLE_NAME).expect("CONSOLE_NAME is a DNS name")
}

fn roots<'a>(pems: impl Iterator<Item = &'a str>) -> Result<RootCertStore, PkiError> {
    let mut roots = RootCertStore::empty();
    for pem in pems {
        for der in pem::certificates(pem).map_err(|error| PkiError::Custom(error.to_string()))? {
            roots.add(der)?;
        }
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use rustls::{ClientConnection, HandshakeKind, ServerConnection};

    use super::*;
    use crate::pki::{ClusterKey, NodeTls, certificate_der, node_request, peer_identity};

    const CLUSTER: ClusterId = ClusterId(0xabcd);
    const ID: &str = "00112233445566778899aabbccddeeff";

    /// Does both ends of a handshake in memory; the first error ends it.
    fn shake(
        client: &Arc<ClientConfig>,
        server: &Arc<ServerConfig>,
        name: ServerName<'static>,
    ) -> Result<(HandshakeKind, Option<Vec<u8>>), String> {
        let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
        let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
        let (mut up, mut down) = (Vec::new(), Vec::new());
        while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
            while client.wants_write() {
                client.write_tls(&mut up).unwrap();
            }
            let mut from = &up[..];
            while !from.is_empty() {
                server.read_tls(&mut from).unwrap();
                server.process_new_packets().map_err(|error| format!("the server says: {error}"))?;
            }
            up.clear();
            while server.wants_write() {
                server.write_tls(&mut down).unwrap();
            }
            let mut from = &down[..];
            while !from.is_empty() {
                client.read_tls(&mut from).unwrap();
                client.process_new_packets().map_err(|error| format!("the client says: {error}"))?;
            }
            down.clear();
        }
        let shown = server.peer_certificates().and_then(|chain| chain.first()).map(|der| der.to_vec());
        Ok((client.handshake_kind().unwrap(), shown))
    }

    #[test]
    fn a_defenders_certificate_is_good_for_its_port_and_for_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(CLUSTER).unwrap();
        authority.save_certificate(dir.path()).unwrap();
        let node = authority.issue_node(1, "a", &[]).unwrap();
        node.save_node(dir.path()).unwrap();
        let node_tls = NodeTls::load(dir.path()).unwrap();
        let console = authority.issue_console(&["console.example"]).unwrap();
        let own = Pair::parse(&console.cert_pem, &console.key_pem).unwrap();
        // A host that would like to be node 1.
        let (csr, key) = node_request("node1", &[crate::pki::PEER_NAME]).unwrap();
        let certificate = authority.sign_defender_request(&csr, ID, "host").unwrap();
        let der = certificate_der(&certificate).unwrap();
        assert_eq!(defender_identity(&der).unwrap(), (CLUSTER, ID.to_owned()));
        assert!(peer_identity(&der).is_err(), "no member's");
        assert!(defender_identity(&certificate_der(&node.cert_pem).unwrap()).is_err(), "no Defender's");
        assert!(authority.sign_defender_request(&csr, "../node/1", "host").is_err());

        let ca = authority.certificate_pem();
        let port = defender_port_tls(&own, [ca].into_iter(), None).unwrap().unwrap();
        let client = defender_client_tls(ca, &certificate, &key).unwrap();
        let shown = shake(&client, &port, console_name()).unwrap();
        assert_eq!(shown, (HandshakeKind::Full, Some(der.to_vec())));
        // As a member's server, and to a member's client: its name and its use are others.
        let mut server = ServerConfig::clone(&node_tls.server);
        server.alpn_protocols.clear();
        let as_server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![der], pem::private_key(&key).unwrap())
            .unwrap();
        let error = shake(&node_tls.client, &Arc::new(as_server), NodeTls::peer_name()).unwrap_err();
        assert!(error.contains("invalid peer certificate"), "{error}");
        // Of another cluster, it is worth nothing at all.
        let other = Authority::create(ClusterId(7)).unwrap();
        let foreign = other.sign_defender_request(&csr, ID, "host").unwrap();
        let foreign = defender_client_tls(ca, &foreign, &key).unwrap();
        assert!(shake(&foreign, &port, console_name()).unwrap_err().contains("invalid peer certificate"));
        let mistaken = defender_client_tls(other.certificate_pem(), &certificate, &key).unwrap();
        assert!(shake(&mistaken, &port, console_name()).unwrap_err().starts_with("the client says"));
        assert!(defender_port_tls(&own, [].into_iter(), None).unwrap().is_none());
    }
    #[test]
    fn a_session_goes_on_at_another_member_as_long_as_both_trust_the_same() {
        let authority = Authority::create(CLUSTER).unwrap();
        let (csr, key) = node_request("host", &[]).unwrap();
        let certificate = authority.sign_defender_request(&csr, ID, "host").unwrap();
        let (ca, der) = (authority.certificate_pem(), certificate_der(&certificate).unwrap().to_vec());
        let (shared, other) = (ClusterKey::generate(), ClusterKey::generate());
        // Each member has a certificate and a configuration of its own.
        let member = |key: &ClusterKey, trusted: &str| {
            let console = authority.issue_console(&["console.example"]).unwrap();
            let own = Pair::parse(&console.cert_pem, &console.key_pem).unwrap();
            let tickets = Tickets::new(key, CLUSTER, trusted);
            defender_port_tls(&own, [ca].into_iter(), Some(tickets)).unwrap().unwrap()
        };
        let client = defender_client_tls(ca, &certificate, &key).unwrap();
        let mut kinds = Vec::new();
        for (key, trusted) in [(&shared, "a"), (&shared, "a"), (&shared, "b"), (&shared, "b"), (&other, "b")] {
            let (kind, shown) = shake(&client, &member(key, trusted), console_name()).unwrap();
            assert_eq!(shown.as_ref(), Some(&der), "{kind:?}: the certificate is known in any case");
            kinds.push(kind);
        }
        use HandshakeKind::{Full, Resumed};
        assert_eq!(kinds, [Full, Resumed, Full, Resumed, Full]);
        // An attempt that comes to nothing, as when too many come at once, costs a ticket, and another one is left.
        let member = member(&shared, "c");
        let mut kinds = Vec::new();
        for lost in [0, TICKETS - 1, TICKETS] {
            (0..lost).for_each(|_| drop(ClientConnection::new(Arc::clone(&client), console_name()).unwrap()));
            kinds.push(shake(&client, &member, console_name()).unwrap().0);
        }
        assert_eq!(kinds, [Full, Resumed, Full]);
    }
}
