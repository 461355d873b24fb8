//! Meetings over real TLS: what is proven, and everything that is refused.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{Arc, Mutex},
};

use tempfile::TempDir;
use tokio::io::{AsyncWriteExt, DuplexStream, copy_bidirectional, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{
    wire::{NONCE, PROTOCOL, STEP, Word, hear, read, say, written},
    *,
};
use crate::{
    cluster::{ClusterId, feature_level, program_version},
    join::{Candidate, Host, JoinFile, Token},
    pki::{self, Authority, NodeTls},
};

const CLUSTER: ClusterId = ClusterId(7);
const ADDRESS: &str = "192.0.2.2";
const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

fn secret(text: &[u8]) -> Option<Secret> {
    Some(Secret::new(text).unwrap())
}

/// A member of a pool that may call.
fn caller(folder: &Path, secret: Option<Secret>) -> Caller {
    let authority = Authority::create(CLUSTER).unwrap();
    authority.issue_node(1, "one", &["192.0.2.1"]).unwrap().save_node(folder).unwrap();
    let offer = Offer {
        cluster: CLUSTER,
        authority: authority.certificate_pem().to_owned(),
        by: "one".to_owned(),
        version: program_version().to_owned(),
        level: feature_level(),
        address: String::new(),
    };
    Caller { tls: pki::calling_tls(folder).unwrap(), secret, from: None, offer }
}

fn host(folder: &Path, secret: Option<Secret>) -> Waiting {
    let (name, version) = ("two".to_owned(), program_version().to_owned());
    let host = Host { name, address: None, port: 8086, version, console_names: vec!["two".to_owned()] };
    Waiting::new(Candidate::prepare(&folder.join("waits"), host).unwrap(), secret, Desk::default()).unwrap()
}

/// A member and a host, with these secrets.
struct Site {
    folder: TempDir,
    caller: Caller,
    host: Waiting,
    kept: Mutex<Vec<String>>,
}

/// What the caller learnt, or why not; and how it ended for the host.
type Ends = (Result<(String, bool), MeetingError>, Result<Option<Offer>, MeetingError>);

impl Site {
    fn new(of_caller: Option<Secret>, of_host: Option<Secret>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (caller, host) = (caller(folder.path(), of_caller), host(folder.path(), of_host));
        Self { folder, caller, host, kept: Mutex::default() }
    }

    fn fingerprint(&self) -> String {
        self.host.candidate().fingerprint().to_owned()
    }

    async fn receive(&self, stream: DuplexStream) -> Result<Option<Offer>, MeetingError> {
        let keep = |_: &JoinFile, id: &str| {
            self.kept.lock().unwrap().push(id.to_owned());
            Ok(())
        };
        self.host.receive(stream, FROM, keep).await
    }

    /// The caller looks, and goes.
    async fn look(&self, expected: Option<&str>) -> Ends {
        let (here, there) = duplex(1 << 16);
        let meet = async {
            let met = self.caller.meet_on(here, ADDRESS, expected).await;
            met.map(|met| (met.fingerprint.clone(), met.proven))
        };
        let ends = tokio::join!(meet, self.receive(there));
        assert!(self.kept.lock().unwrap().is_empty() && self.host_is_free(), "nothing was changed");
        ends
    }

    fn host_is_free(&self) -> bool {
        self.host.desk().take().is_some()
    }

    fn file(&self) -> JoinFile {
        let ca = self.caller.offer.authority.clone();
        let token = Token::new(&pki::certificate_der(&ca).unwrap()).to_string();
        JoinFile { token, addresses: vec!["192.0.2.1:8083".to_owned()], ca, adopted: true }
    }
}

#[tokio::test]
async fn a_pool_that_has_looked_takes_the_host_in() {
    for with in [None, secret(SECRET)] {
        let site = Site::new(with.clone(), with.clone());
        let (seen, left) = site.look(None).await;
        assert_eq!((seen, left), (Ok((site.fingerprint(), with.is_some())), Ok(None)));
        let fingerprint = site.fingerprint();
        assert_eq!(site.look(Some(&fingerprint)).await.0, Ok((fingerprint, with.is_some())));

        let (here, there) = duplex(1 << 16);
        let adopt = async {
            let mut met = site.caller.meet_on(here, ADDRESS, None).await.unwrap();
            assert_eq!((met.request.name.as_str(), met.request.address.as_str()), ("two", ADDRESS));
            met.reserve().await.unwrap();
            assert!(!site.host_is_free(), "nobody signs up meanwhile");
            met.adopt(site.file(), "id".to_owned()).await
        };
        let (told, taken) = tokio::join!(adopt, site.receive(there));
        assert_eq!(told, Ok(()));
        assert_eq!(taken.unwrap().unwrap().cluster, CLUSTER);
        assert_eq!(*site.kept.lock().unwrap(), ["id"]);
        assert!(!site.host_is_free(), "it is decided");
    }
}

#[tokio::test]
async fn who_does_not_know_the_secret_is_refused_and_told_why() {
    let other = b"fedcba9876543210fedcba9876543210";
    let site = Site::new(secret(SECRET), secret(other));
    assert_eq!(site.look(None).await, (Err(MeetingError::WrongSecret), Err(MeetingError::WrongSecret)));
    // Not even with the right fingerprint.
    let fingerprint = site.fingerprint();
    assert_eq!(site.look(Some(&fingerprint)).await.0, Err(MeetingError::WrongSecret));
    let site = Site::new(None, secret(SECRET));
    let expected = (Err(MeetingError::SecretMissingHere), Err(MeetingError::SecretMissingThere));
    assert_eq!(site.look(None).await, expected);
    let site = Site::new(secret(SECRET), None);
    let expected = (Err(MeetingError::SecretMissingThere), Err(MeetingError::SecretMissingHere));
    assert_eq!(site.look(None).await, expected);
}

#[tokio::test]
async fn members_that_call_for_something_else_do_not_keep_the_pool_away() {
    let site = Site::new(None, None);
    let mut link = rustls::ClientConfig::clone(&site.caller.tls);
    link.alpn_protocols = vec![b"something else".to_vec()];
    let link = TlsConnector::from(Arc::new(link));
    for _ in 0..30 {
        let (here, there) = duplex(1 << 16);
        let (linked, left) = tokio::join!(link.connect(pki::waiting_name(), here), site.receive(there));
        assert!(linked.is_err() && matches!(left, Err(MeetingError::Unreachable(_))), "{left:?}");
    }
    assert_eq!(site.look(None).await.0, Ok((site.fingerprint(), false)));
}

#[tokio::test]
async fn another_host_at_the_address_is_told_nothing() {
    let site = Site::new(None, None);
    let expected = ["AB"; 32].join(":");
    let (seen, left) = site.look(Some(&expected)).await;
    assert_eq!(seen, Err(MeetingError::Fingerprint { found: site.fingerprint(), expected }));
    assert!(matches!(left, Err(MeetingError::Refused(why)) if why.contains(&site.fingerprint())));
}

/// Somebody between the two, with keys of his own and all that TLS needs, who passes on every word.
async fn between(folder: &Path, from_caller: DuplexStream, to_host: DuplexStream) {
    let folder = folder.join("between");
    std::fs::create_dir_all(&folder).unwrap();
    let own = caller(&folder, None);
    let acceptor = TlsAcceptor::from(pki::waiting_tls(&pki::new_key().unwrap()).unwrap());
    let (mut left, mut right) = tokio::join!(async { acceptor.accept(from_caller).await.unwrap() }, async {
        TlsConnector::from(own.tls).connect(pki::waiting_name(), to_host).await.unwrap()
    });
    let _ = copy_bidirectional(&mut left, &mut right).await;
}

#[tokio::test]
async fn whoever_stands_between_gets_nothing() {
    // With the secret, neither end believes the other; without one, the fingerprint tells.
    let with = Site::new(secret(SECRET), secret(SECRET));
    let without = Site::new(None, None);
    let expected = without.fingerprint();
    for (site, expected) in [(&with, None), (&without, Some(expected.as_str()))] {
        let ((here, left), (right, there)) = (duplex(1 << 16), duplex(1 << 16));
        let meet = async {
            let met = site.caller.meet_on(here, ADDRESS, expected).await;
            met.map(|met| met.fingerprint.clone()).unwrap_err()
        };
        let passes = async { between(site.folder.path(), left, right).await };
        let (why, (), got) = tokio::join!(meet, passes, site.receive(there));
        match expected {
            None => assert_eq!((why, got), (MeetingError::WrongSecret, Err(MeetingError::WrongSecret))),
            Some(_) => assert!(matches!(why, MeetingError::Fingerprint { .. }), "{why:?}"),
        }
        assert!(site.kept.lock().unwrap().is_empty() && site.host_is_free());
    }
    // Nobody compares anything, and somebody passes everything on: the host sees that the pool is not his.
    let ((here, left), (right, there)) = (duplex(1 << 16), duplex(1 << 16));
    let meet = async { without.caller.meet_on(here, ADDRESS, None).await.map(|met| met.fingerprint.clone()) };
    let passes = async { between(without.folder.path(), left, right).await };
    let (seen, (), got) = tokio::join!(meet, passes, without.receive(there));
    assert!(matches!(got, Err(MeetingError::Stranger(_))), "{got:?}");
    assert!(seen.is_err(), "{seen:?}");
}

/// Calls the host with words of one's own.
async fn own_words(site: &Site, words: Vec<Word>) -> (Vec<Word>, Result<Option<Offer>, MeetingError>) {
    let (here, there) = duplex(1 << 16);
    let talk = async {
        let connector = TlsConnector::from(Arc::clone(&site.caller.tls));
        let mut stream = connector.connect(pki::waiting_name(), here).await.unwrap();
        let mut heard = Vec::new();
        for word in words {
            say(&mut stream, &word).await.unwrap();
            match hear(&mut stream, STEP).await {
                Ok(word) => heard.push(word),
                Err(_) => break,
            }
        }
        heard
    };
    tokio::join!(talk, site.receive(there))
}

fn greeting(nonce: &[u8; NONCE]) -> Word {
    Word::Greeting { protocol: PROTOCOL, nonce: written(nonce), secret: true }
}

#[tokio::test]
async fn a_proof_is_good_for_one_connection_and_one_role() {
    let site = Site::new(secret(SECRET), secret(SECRET));
    let nonce = [7; NONCE];
    // A proof of an earlier meeting, which somebody who knows the secret made there.
    let (here, there) = duplex(1 << 16);
    let earlier = async {
        let connector = TlsConnector::from(Arc::clone(&site.caller.tls));
        let mut stream = connector.connect(pki::waiting_name(), here).await.unwrap();
        say(&mut stream, &greeting(&nonce)).await.unwrap();
        let Word::Greeting { nonce: host, .. } = hear(&mut stream, STEP).await.unwrap() else { panic!("no greeting") };
        let material = stream.get_ref().1.export_keying_material([0; 32], caller::MATERIAL, None).unwrap();
        let (host, fingerprint) = (read(&host).unwrap(), site.fingerprint());
        let bond = secret::Bond { material, caller: nonce, host, fingerprint };
        let proof = site.caller.secret.as_ref().unwrap().prove(secret::Side::Caller, &bond);
        say(&mut stream, &Word::Proof { proof: proof.clone() }).await.unwrap();
        let Word::Proof { proof: of_host } = hear(&mut stream, STEP).await.unwrap() else { panic!("no proof") };
        assert_ne!(proof, of_host);
        (proof, of_host)
    };
    let ((proof, of_host), _) = tokio::join!(earlier, site.receive(there));
    for proof in [proof, of_host, String::new(), "zz".to_owned()] {
        let (heard, got) = own_words(&site, vec![greeting(&nonce), Word::Proof { proof }]).await;
        assert_eq!((heard.len(), got), (1, Err(MeetingError::WrongSecret)), "the host gives no proof of its own");
    }
    // Without any proof it tells nothing.
    let offer = Word::Offer { offer: site.caller.offer.clone() };
    let (heard, got) = own_words(&site, vec![greeting(&nonce), offer]).await;
    assert!(heard.len() == 1 && matches!(got, Err(MeetingError::Broken(_))), "{got:?}");
    assert!(site.host_is_free() && site.kept.lock().unwrap().is_empty());
}

/// A host with words of its own.
async fn rogue(
    site: &Site,
    answer: impl AsyncFnOnce(&mut tokio_rustls::server::TlsStream<DuplexStream>),
) -> MeetingError {
    let (here, there) = duplex(1 << 16);
    let serve = async {
        let acceptor = TlsAcceptor::from(pki::waiting_tls(&pki::new_key().unwrap()).unwrap());
        let mut stream = acceptor.accept(there).await.unwrap();
        answer(&mut stream).await;
    };
    let (met, ()) = tokio::join!(site.caller.meet_on(here, ADDRESS, None), serve);
    met.map(|met| met.fingerprint.clone()).unwrap_err()
}

#[tokio::test]
async fn a_host_that_only_repeats_what_it_hears_proves_nothing() {
    let site = Site::new(secret(SECRET), secret(SECRET));
    let why = rogue(&site, async |stream| {
        for _ in 0..2 {
            let word = hear(stream, STEP).await.unwrap();
            say(stream, &word).await.unwrap();
        }
        let _ = hear(stream, STEP).await;
    });
    assert_eq!(why.await, MeetingError::WrongSecret);
}

#[tokio::test]
async fn another_version_of_the_meeting_is_named() {
    let site = Site::new(None, None);
    let newer = || Word::Greeting { protocol: PROTOCOL + 1, nonce: written(&[1; NONCE]), secret: false };
    let (heard, got) = own_words(&site, vec![newer()]).await;
    let expected = MeetingError::Protocol { theirs: PROTOCOL + 1, ours: PROTOCOL };
    assert!(heard.is_empty());
    assert_eq!(got, Err(expected.clone()));
    let why = rogue(&site, async |stream| {
        drop(hear(stream, STEP).await);
        say(stream, &newer()).await.unwrap();
        let _ = hear(stream, STEP).await;
    });
    assert_eq!(why.await, expected);
}

#[tokio::test]
async fn what_does_not_wait_is_told_from_what_does() {
    let site = Site::new(None, None);
    // A member, removed or not, knows only its own protocol.
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(ClusterId(9)).unwrap();
    authority.save_certificate(folder.path()).unwrap();
    authority.issue_node(1, "x", &[]).unwrap().save_node(folder.path()).unwrap();
    let member = TlsAcceptor::from(NodeTls::load(folder.path()).unwrap().server);
    let (here, there) = duplex(1 << 16);
    let (met, _) = tokio::join!(site.caller.meet_on(here, ADDRESS, None), member.accept(there));
    assert_eq!(met.map(|_| ()).unwrap_err(), MeetingError::NotWaiting);
    // Something that is no TLS at all.
    let (here, mut there) = duplex(1 << 16);
    let web = async { there.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap() };
    let (met, ()) = tokio::join!(site.caller.meet_on(here, ADDRESS, None), web);
    assert_eq!(met.map(|_| ()).unwrap_err(), MeetingError::NotWaiting);
}

#[tokio::test]
async fn a_pool_must_be_what_it_says() {
    let mut site = Site::new(None, None);
    let honest = site.caller.offer.clone();
    let another = Authority::create(CLUSTER).unwrap().certificate_pem().to_owned();
    let offers = [
        (Offer { authority: another, ..honest.clone() }, "not one of the authority"),
        (Offer { authority: "no PEM".to_owned(), ..honest.clone() }, "cannot be a member"),
        (Offer { cluster: ClusterId(8), ..honest.clone() }, "it offers"),
        (Offer { level: feature_level() + 1, ..honest.clone() }, "feature level"),
    ];
    for (offer, expected) in offers {
        site.caller.offer = offer;
        let (seen, left) = site.look(None).await;
        assert!(matches!(&seen, Err(MeetingError::Refused(why)) if why.contains(expected)), "{seen:?}");
        assert!(left.is_err());
    }
    site.caller.offer = honest;
    let (here, there) = duplex(1 << 16);
    let adopt = async {
        let mut met = site.caller.meet_on(here, ADDRESS, None).await.unwrap();
        met.reserve().await.unwrap();
        let ca = Authority::create(CLUSTER).unwrap().certificate_pem().to_owned();
        met.adopt(JoinFile { ca, ..site.file() }, "id".to_owned()).await
    };
    let (told, taken) = tokio::join!(adopt, site.receive(there));
    assert!(matches!(told, Err(MeetingError::Refused(_))) && matches!(taken, Err(MeetingError::Stranger(_))));
    assert!(site.kept.lock().unwrap().is_empty() && site.host_is_free());
}

#[tokio::test]
async fn one_at_a_time_decides() {
    let site = Site::new(None, None);
    let signing_up = site.host.desk().take().unwrap();
    let (here, there) = duplex(1 << 16);
    let reserve = async { site.caller.meet_on(here, ADDRESS, None).await.unwrap().reserve().await };
    let ends = tokio::join!(reserve, site.receive(there));
    assert_eq!(ends, (Err(MeetingError::Busy), Err(MeetingError::Busy)));
    drop(signing_up);
    // A pool that goes away after it has reserved the host leaves it free.
    let (here, there) = duplex(1 << 16);
    let reserve = async { site.caller.meet_on(here, ADDRESS, None).await.unwrap().reserve().await };
    let (reserved, left) = tokio::join!(reserve, site.receive(there));
    assert!(reserved.is_ok() && left.is_err() && site.host_is_free());
}

#[test]
fn a_secret_has_limits_and_no_line_feed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Secret::read(&path)
    };
    let bond = || secret::Bond { material: [1; 32], caller: [2; 32], host: [3; 32], fingerprint: "AB".to_owned() };
    let proof = |secret: Secret| secret.prove(secret::Side::Host, &bond());
    let plain = proof(read(SECRET).unwrap());
    assert_eq!(proof(read(&[SECRET, b"\r\n"].concat()).unwrap()), plain);
    assert_ne!(proof(read(&[SECRET, b" "].concat()).unwrap()), plain);
    for bad in [&b""[..], &SECRET[1..], &[b'x'; 1025], b"\n"] {
        let why = read(bad).unwrap_err();
        assert!(why.contains("CLUSTERED_DB_SECRET_FILE") && why.contains("32 to 1024"), "{why}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(Secret::read(&path).unwrap_err().contains("cannot be used"));
    assert_eq!(format!("{:?}", Secret::new(SECRET)), "Some(Secret(..))");
}
