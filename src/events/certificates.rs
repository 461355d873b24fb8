//! What the history says about certificates: which ones end, which ones of this node have changed, and what the whole
//! cluster was given or replaces. Must never report the same end twice, or anything of a key.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use jiff::Timestamp;

use super::{Event, Kind, Scope, Severity};
use crate::{
    cluster::shared::Shared,
    node::{CertificateSource, CertificateStatus, Status},
};

/// What is compared of a picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Certificates {
    /// Those that this node uses.
    own: Vec<CertificateStatus>,
    /// What the Consoles were given: who gave it, and a digest of it.
    given: Option<(String, u64)>,
    /// What their certificates are good for beside the names of their hosts.
    names: Vec<String>,
    /// Digest of the authority that signs.
    signs: Option<u64>,
    /// Another one is trusted already, and signs soon.
    coming: bool,
    /// An old one is trusted at least until then.
    retired: Option<u64>,
    /// The cluster key is being replaced.
    rekey: bool,
}

impl Certificates {
    pub fn of(status: &Status) -> Self {
        let digest = |text: &String| {
            let mut hasher = DefaultHasher::new();
            text.hash(&mut hasher);
            hasher.finish()
        };
        let Shared { custom_certificate, console_names, authority, coming, retired, rekey, .. } =
            &status.membership.shared;
        Self {
            own: status.certificates.clone(),
            given: custom_certificate.as_ref().map(|given| (given.by.clone(), digest(&given.chain))),
            names: console_names.clone(),
            signs: authority.as_ref().map(|authority| digest(&authority.certificate)),
            coming: coming.is_some(),
            retired: retired.as_ref().map(|retired| retired.until),
            rekey: rekey.is_some(),
        }
    }
}

/// What is different now, as the node called `name` sees it.
pub(super) fn changes(name: &str, before: &Certificates, after: &Certificates) -> Vec<Event> {
    let mut events: Vec<Event> = sentences(before, after).into_iter().map(|text| info(text, Scope::Cluster)).collect();
    for certificate in after.own.iter().filter(|certificate| certificate.of != "ca") {
        let Some(was) = before.own.iter().find(|was| was.of == certificate.of) else { continue };
        if was.info.fingerprint != certificate.info.fingerprint {
            events.push(replaced(name, was, certificate));
        }
    }
    events
}

/// What concerns the whole cluster.
fn sentences(before: &Certificates, after: &Certificates) -> Vec<String> {
    let mut told = Vec::new();
    if before.given != after.given {
        told.push(match &after.given {
            Some((by, _)) => format!("a certificate was given to all Consoles by {by}"),
            None => "the Consoles go back to certificates of the cluster's authority".to_owned(),
        });
    }
    if before.names != after.names {
        let names = if after.names.is_empty() { "no further names".to_owned() } else { after.names.join(", ") };
        told.push(format!("the Consoles' certificates are made for other names: beside those of each host {names}"));
    }
    if before.signs.is_some() && before.signs != after.signs {
        told.push("a new certificate authority signs from now on".to_owned());
    } else if after.coming && !before.coming {
        told.push("the certificate authority is to be replaced: the members begin to trust another one".to_owned());
    } else if before.coming && !after.coming {
        told.push("the certificate authority is not replaced: begin again when the removal is over".to_owned());
    }
    if before.retired.is_some() && after.retired.is_none() {
        told.push("the certificate authority is replaced: the old one is not trusted any more".to_owned());
    }
    match (before.rekey, after.rekey) {
        (false, true) => told.push("the cluster key is to be replaced".to_owned()),
        (true, false) => told.push("the cluster key is replaced".to_owned()),
        _ => {}
    }
    told
}

/// A certificate of this node took the place of another one.
fn replaced(name: &str, was: &CertificateStatus, now: &CertificateStatus) -> Event {
    let (subject, until) = (&now.info.subject, date(now.info.not_after));
    let own = (was.source, now.source) == (CertificateSource::Cluster, CertificateSource::Cluster);
    let what = match (was.info.issuer == now.info.issuer, was.info.names == now.info.names) {
        (true, true) => "renewed",
        _ => "made anew",
    };
    let sentence = match (now.of.as_str(), own) {
        ("console", false) => {
            format!("the Console of {name} serves {subject} from now on ({}), good until {until}", now.source.word())
        }
        ("console", true) => format!("the Console's certificate of {name} was {what}, good until {until}"),
        _ => format!("the certificate of {name} was {what}, good until {until}"),
    };
    // What all were given is reported once for all.
    let given = [was.source, now.source].contains(&CertificateSource::Upload);
    let event = info(sentence, if given { Scope::Local } else { Scope::Node });
    event.field("of", now.of.clone()).field("fingerprint", now.info.fingerprint.clone()).field("until", until)
}

/// The ends of certificates that were told: by certificate its fingerprint and the last step.
#[derive(Debug, Default)]
pub(super) struct Ends(BTreeMap<String, (String, u64)>);

impl Ends {
    /// Events for what has come nearer to its end since the last call; `now` in seconds since 1970.
    pub fn new_events(&mut self, name: &str, seen: &Certificates, now: u64) -> Vec<Event> {
        let mut events = Vec::new();
        for certificate in &seen.own {
            let info = &certificate.info;
            let Some(step) = info.expiry_step(now) else { continue };
            let said = (info.fingerprint.clone(), step);
            if self.0.insert(certificate.of.clone(), said.clone()).as_ref() == Some(&said) {
                continue;
            }
            // The PRIMARY reports those of all.
            let all = certificate.of == "ca" || certificate.source == CertificateSource::Upload;
            let whose = match (certificate.of.as_str(), all) {
                ("ca", _) => "the cluster's authority".to_owned(),
                (_, true) => "all Consoles".to_owned(),
                ("console", _) => format!("the Console of {name}"),
                _ => name.to_owned(),
            };
            let end = if step == 0 { "has expired on" } else { "expires on" };
            let sentence = format!("the certificate of {whose} ({}) {end} {}", info.subject, date(info.not_after));
            let severity = if step <= 1 { Severity::Critical } else { Severity::Warning };
            let event = Event::new(Kind::Certificate, severity, sentence);
            let event = event.scope(if all { Scope::Cluster } else { Scope::Node });
            let left = info.not_after.saturating_sub(now);
            events.push(event.field("of", certificate.of.clone()).field("daysLeft", left / 86_400));
        }
        events
    }
}

fn info(sentence: String, scope: Scope) -> Event {
    Event::new(Kind::Certificate, Severity::Info, sentence).scope(scope)
}

/// A day, UTC.
fn date(seconds: u64) -> String {
    let day = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    day.map_or_else(|| seconds.to_string(), |day| day.strftime("%Y-%m-%d").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;

    fn certificate(of: &str, source: CertificateSource, number: u64) -> CertificateStatus {
        let text = serde_json::json!({
            "of": of, "source": source, "subject": format!("CN={of}"), "issuer": "CN=authority", "names": ["a"],
            "not_before": 0, "not_after": 100 * DAY + number, "fingerprint": format!("AB:{number}"),
        });
        serde_json::from_value(text).unwrap()
    }

    fn told(events: &[Event]) -> Vec<(Scope, &str)> {
        assert!(events.iter().all(|event| event.kind == Kind::Certificate));
        events.iter().map(|event| (event.scope, event.sentence.as_str())).collect()
    }

    fn between(before: &Certificates, after: &Certificates) -> Vec<String> {
        changes("node1", before, after).into_iter().map(|event| event.sentence).collect()
    }

    #[test]
    fn what_a_node_uses_is_told_when_it_changes() {
        let of = |all: &[CertificateStatus]| Certificates { own: all.to_vec(), ..Certificates::default() };
        use CertificateSource::{Cluster, Folder, Upload};
        let first =
            of(&[certificate("node", Cluster, 1), certificate("console", Cluster, 2), certificate("ca", Cluster, 3)]);
        assert_eq!(changes("node1", &Certificates::default(), &first), [], "the first look");
        assert_eq!(changes("node1", &first, &first), []);
        let mut reissued = certificate("console", Cluster, 5);
        reissued.info.names.push("b".to_owned());
        let second = of(&[certificate("node", Cluster, 4), reissued.clone(), certificate("ca", Cluster, 6)]);
        assert_eq!(
            told(&changes("node1", &first, &second)),
            [
                (Scope::Node, "the certificate of node1 was renewed, good until 1970-04-11"),
                (Scope::Node, "the Console's certificate of node1 was made anew, good until 1970-04-11"),
            ]
        );
        let served = |source, number| of(&[certificate("console", source, number)]);
        let to = |source, number| changes("node1", &of(&[reissued.clone()]), &served(source, number));
        let upload = "the Console of node1 serves CN=console from now on (upload), good until 1970-04-11";
        assert_eq!(told(&to(Upload, 7)), [(Scope::Local, upload)]);
        assert_eq!(to(Folder, 8)[0].scope, Scope::Node);
    }

    #[test]
    fn what_all_were_given_and_what_is_replaced_is_told() {
        let none = Certificates { signs: Some(1), ..Certificates::default() };
        let given = Certificates { given: Some(("ann".to_owned(), 9)), names: vec!["lb".to_owned()], ..none.clone() };
        let other = Certificates { given: Some(("ann".to_owned(), 8)), ..given.clone() };
        let named = "the Consoles' certificates are made for other names: beside those of each host lb";
        assert_eq!(between(&none, &given), ["a certificate was given to all Consoles by ann", named]);
        assert_eq!(between(&given, &other), ["a certificate was given to all Consoles by ann"]);
        assert!(between(&given, &none)[0].contains("go back"));
        let coming = Certificates { coming: true, ..none.clone() };
        let switched = Certificates { signs: Some(2), retired: Some(DAY), ..none.clone() };
        let done = Certificates { signs: Some(2), ..none.clone() };
        assert!(between(&none, &coming)[0].contains("is to be replaced"));
        let signs = "a new certificate authority signs from now on";
        assert_eq!(between(&coming, &switched), [signs]);
        assert_eq!(
            between(&switched, &done),
            ["the certificate authority is replaced: the old one is not trusted any more"]
        );
        let key = Certificates { rekey: true, ..none.clone() };
        assert_eq!(between(&none, &key), ["the cluster key is to be replaced"]);
        let removal = between(&coming, &key);
        assert!(removal.len() == 2 && removal[0].contains("not replaced"), "{removal:?}");
        assert_eq!(between(&key, &none), ["the cluster key is replaced"]);
        assert!(changes("node1", &none, &given).iter().all(|event| event.scope == Scope::Cluster));
    }

    #[test]
    fn an_end_that_comes_near_is_told_once_a_step() {
        use CertificateSource::{Cluster, Upload};
        let seen = Certificates {
            own: vec![certificate("node", Cluster, 0), certificate("console", Upload, 40 * DAY)],
            ..Certificates::default()
        };
        let mut ends = Ends::default();
        let mut at = |day: u64| ends.new_events("node1", &seen, day * DAY);
        assert_eq!(at(60), []);
        let first = at(70);
        let sentence = "the certificate of node1 (CN=node) expires on 1970-04-11";
        assert_eq!((told(&first), first[0].severity), (vec![(Scope::Node, sentence)], Severity::Warning));
        assert_eq!((at(71), at(92)), (vec![], vec![]));
        assert_eq!((at(93).len(), at(94).len()), (1, 0));
        assert_eq!(at(99)[0].severity, Severity::Critical);
        assert!(at(100)[0].sentence.contains("has expired on"));
        let console = at(110);
        assert_eq!(told(&console)[0].0, Scope::Cluster);
        assert!(console[0].sentence.starts_with("the certificate of all Consoles (CN=console)"), "{console:?}");
    }
}
