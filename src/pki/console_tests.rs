//! Tests of what a Console shows: chains as administrators bring them, good and bad, and what a real client sees.

use std::{io::Write, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_ED25519, date_time_ymd,
};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection, pki_types::ServerName};

use super::*;
use crate::pki::{Authority, certificate_der};

const CLUSTER: ClusterId = ClusterId(7);
/// 2026-01-01 as seconds since 1970.
const NOW: u64 = 1_767_225_600;

/// A certificate and the key to it.
struct Made {
    params: CertificateParams,
    pem: String,
    key: KeyPair,
}

fn params(name: &str, names: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (date_time_ymd(2025, 1, 1), date_time_ymd(2027, 1, 1));
    params
}

fn ca(name: &str, issuer: Option<&Made>) -> Made {
    let mut params = params(name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    signed(params, issuer, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap())
}

fn signed(params: CertificateParams, issuer: Option<&Made>, key: KeyPair) -> Made {
    let made = match issuer {
        Some(issuer) => params.signed_by(&key, &Issuer::from_params(&issuer.params, &issuer.key)).unwrap(),
        None => params.self_signed(&key).unwrap(),
    };
    Made { pem: made.pem(), params, key }
}

fn leaf(issuer: &Made, edit: impl FnOnce(&mut CertificateParams)) -> Made {
    let mut params = params("leaf", &["console.example.com", "192.0.2.1"]);
    edit(&mut params);
    signed(params, Some(issuer), KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap())
}

fn refused(text: &str) -> String {
    let pair = Pair::parse(text, text).and_then(|pair| pair.check(NOW));
    pair.expect_err("refused").to_string()
}

#[test]
fn a_chain_that_ends_before_its_issuer_names_it() {
    let root = ca("root", None);
    let middle = ca("middle", Some(&root));
    let leaf = leaf(&middle, |_| {});
    let missing = |chain: &[&Made], known: &[&Made]| {
        let pem: String = chain.iter().map(|made| made.pem.as_str()).collect();
        let pair = Pair::parse(&pem, &leaf.key.serialize_pem()).unwrap();
        pair.missing_issuer(known.iter().map(|made| made.pem.as_str())).unwrap()
    };
    assert_eq!(missing(&[&leaf], &[]).as_deref(), Some("CN=middle"));
    assert_eq!(missing(&[&leaf], &[&root]).as_deref(), Some("CN=middle"));
    assert_eq!(missing(&[&leaf, &middle], &[]).as_deref(), Some("CN=root"));
    assert_eq!(missing(&[&leaf, &middle, &root], &[]), None);
    assert_eq!(missing(&[&leaf, &middle], &[&ca("root", None), &root]), None, "another one of the same name");
}

#[test]
fn a_chain_in_order_is_taken_and_keeps_its_content() {
    let root = ca("root", None);
    let middle = ca("middle", Some(&root));
    let leaf = leaf(&middle, |_| {});
    let text = [&leaf.key.serialize_pem(), "some words\n", &leaf.pem, &middle.pem, &root.pem].concat();
    let pair = Pair::parse(&text, &text).unwrap();
    pair.check(NOW).unwrap();
    let info = pair.info();
    assert_eq!(info.names, ["console.example.com", "192.0.2.1"]);
    assert!(info.subject.contains("leaf") && info.issuer.contains("middle"), "{info:?}");
    let key = ClusterKey::generate();
    let sealed = pair.seal(&key, CLUSTER, "admin", 5).unwrap();
    assert!(!format!("{sealed:?}{pair:?}").contains("PRIVATE"));
    assert!(Pair::unseal(CLUSTER, &sealed, &key).unwrap().is_same(&pair));
    assert!(Pair::unseal(CLUSTER, &sealed, &ClusterKey::generate()).is_err());
    assert!(Pair::unseal(ClusterId(8), &sealed, &key).is_err());
    let next = ClusterKey::generate();
    let again = reseal(CLUSTER, &sealed, &key, &next).unwrap();
    assert!(Pair::unseal(CLUSTER, &again, &next).unwrap().is_same(&pair));
    // A certificate without its chain and one that signed itself are an administrator's choice.
    for text in [[leaf.key.serialize_pem(), leaf.pem].concat(), [root.key.serialize_pem(), root.pem].concat()] {
        Pair::parse(&text, &text).unwrap().check(NOW).unwrap();
    }
}

#[test]
fn what_cannot_be_served_is_refused_with_its_reason() {
    let root = ca("root", None);
    let middle = ca("middle", Some(&root));
    let good = leaf(&middle, |_| {});
    let key = good.key.serialize_pem();
    let with_key = |certificate: &Made, rest: &str| [&certificate.key.serialize_pem(), &certificate.pem, rest].concat();
    assert!(refused(&good.pem).contains("no private key"));
    assert!(refused(&key).contains("no certificate"));
    assert!(refused("").contains("PEM"));
    let other = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap().serialize_pem();
    assert!(refused(&[&*other, &good.pem].concat()).contains("does not belong to the first certificate"));
    let backwards = [&*key, &middle.pem, &good.pem].concat();
    assert!(refused(&backwards).contains("begins with its own certificate"));
    let without = with_key(&good, &root.pem);
    assert!(refused(&without).contains("issued by CN=middle, but CN=root comes next"), "{}", refused(&without));
    // The name is right, the signature is not.
    let impostor = ca("middle", None);
    assert!(refused(&with_key(&good, &impostor.pem)).contains("not in order"));
    let old = leaf(&middle, |params| params.not_after = date_time_ymd(2025, 12, 31));
    assert!(refused(&with_key(&old, "")).contains("has expired on 2025-12-31"));
    let early = leaf(&middle, |params| params.not_before = date_time_ymd(2026, 2, 1));
    assert!(refused(&with_key(&early, "")).contains("not valid before 2026-02-01"));
    let client = leaf(&middle, |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    assert!(refused(&with_key(&client, "")).contains("not for servers"));
    let odd = signed(params("odd", &["a"]), Some(&root), KeyPair::generate_for(&PKCS_ED25519).unwrap());
    assert!(refused(&with_key(&odd, "")).contains("Ed25519"));
    assert!(refused(&with_key(&good, &middle.pem.repeat(MAX_CERTIFICATES))).contains("more than 8"));
    let damaged = with_key(&good, "").replace("MII", "!!!");
    assert!(refused(&damaged).contains("refused"));
}

/// The libraries that the tests use do not make RSA keys: the certificate is a fixed one, its key is not looked at.
#[test]
fn a_small_rsa_key_is_refused() {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap().serialize_pem();
    let why = refused(&[include_str!("rsa1024_test.pem"), &key].concat());
    assert!(why.contains("1024 bits"), "{why}");
}

/// What a client is shown that asks for this name.
fn shown(server: &Arc<ServerConfig>, name: &str, trusted: &str) -> Result<String, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate_der(trusted).unwrap()).unwrap();
    let client = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(client), ServerName::try_from(name.to_owned()).unwrap()).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    while client.is_handshaking() {
        let (mut there, mut back) = (Vec::new(), Vec::new());
        client.write_tls(&mut there as &mut dyn Write).unwrap();
        server.read_tls(&mut there.as_slice()).unwrap();
        server.process_new_packets()?;
        server.write_tls(&mut back).unwrap();
        client.read_tls(&mut back.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    Ok(fingerprint(&client.peer_certificates().unwrap()[0]))
}

#[test]
fn hosts_that_join_see_the_clusters_own_certificate_and_nobody_else_does() {
    let authority = Authority::create(CLUSTER).unwrap();
    let issued = authority.issue_console(&["192.0.2.1", "console.example.com"]).unwrap();
    let own = Pair::parse(&issued.cert_pem, &issued.key_pem).unwrap();
    let mut root = params("root", &[]);
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.not_after = date_time_ymd(2099, 1, 1);
    let root = signed(root, None, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap());
    let given = leaf(&root, |params| params.not_after = date_time_ymd(2099, 1, 1));
    let given = Pair::parse(&given.pem, &given.key.serialize_pem()).unwrap();
    let ca = authority.certificate_pem();
    let settings = console_tls(&given, &own).unwrap();
    assert_eq!(shown(&settings, CONSOLE_NAME, ca).unwrap(), own.info().fingerprint);
    for name in ["console.example.com", "192.0.2.1"] {
        assert_eq!(shown(&settings, name, &root.pem).unwrap(), given.info().fingerprint);
        assert!(shown(&settings, name, ca).is_err());
    }
    assert!(shown(&settings, CONSOLE_NAME, &root.pem).is_err());
    let settings = console_tls(&own, &own).unwrap();
    assert_eq!(shown(&settings, "192.0.2.1", ca).unwrap(), own.info().fingerprint);
}
