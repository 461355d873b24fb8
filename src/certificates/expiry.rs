//! What is told about certificates: the entries of the status, their metrics, and the warnings before they end. Must
//! never change a certificate, nor say the same in the log twice.

use std::{collections::BTreeMap, fs, path::Path};

use tracing::warn;

use crate::{
    node::{CertificateSource, CertificateStatus},
    pki::{self, CA_CERTIFICATE, CertificateInfo, NODE_CERTIFICATE},
    telemetry,
};

const DAY: u64 = 86_400;

/// What was said already: by certificate its fingerprint and the last [step](CertificateInfo::expiry_step).
#[derive(Debug, Default)]
pub(super) struct Told(BTreeMap<String, (String, u64)>);

impl Told {
    /// Sets the metrics, says in the log what has not been said yet, and returns what is to be shown all the time.
    pub fn tell(&mut self, certificates: &[CertificateStatus], now: u64) -> Vec<String> {
        let mut sentences = Vec::new();
        for certificate in certificates {
            let left = certificate.info.not_after.saturating_sub(now);
            metrics::gauge!(telemetry::CERTIFICATE_EXPIRY, "of" => certificate.of.clone()).set(left as f64);
            let Some(step) = certificate.info.expiry_step(now) else { continue };
            let sentence = sentence(certificate, left);
            if self.is_new(certificate, step) {
                warn!(of = certificate.of, subject = certificate.info.subject, "{sentence}");
            }
            sentences.push(sentence);
        }
        sentences
    }

    fn is_new(&mut self, certificate: &CertificateStatus, step: u64) -> bool {
        let said = (certificate.info.fingerprint.clone(), step);
        self.0.insert(certificate.of.clone(), said.clone()).as_ref() != Some(&said)
    }
}

fn sentence(certificate: &CertificateStatus, left: u64) -> String {
    let when = match left {
        0 => "has expired".to_owned(),
        1..DAY => format!("expires in {} hours", left.div_ceil(3600)),
        _ => format!("expires in {} days", left / DAY),
    };
    let CertificateInfo { subject, .. } = &certificate.info;
    let what = match (certificate.of.as_str(), certificate.source) {
        ("ca", _) => "nodes then refuse each other: the cluster needs a new authority",
        (_, CertificateSource::Cluster | CertificateSource::Other) => {
            "it should have been renewed by itself: look into the log for the reason"
        }
        (_, CertificateSource::Upload) => {
            "upload a new one, or remove it: twistcli certs upload, twistcli certs remove"
        }
        (_, CertificateSource::Folder) => "put a new one into custom-certificates/ of the data folder",
    };
    let of = if certificate.of == "ca" { "certificate authority" } else { &certificate.of };
    format!("the {of} certificate ({subject}) {when}: {what}")
}

/// The entries for the node and the authority, as their files are.
pub(super) fn node_and_ca(certificates: &Path) -> Vec<CertificateStatus> {
    let read = |(of, file): (&str, &str)| {
        // Whoever needs the file says what is wrong with it.
        let pem = fs::read_to_string(certificates.join(file)).ok()?;
        let info = pki::certificate_der(&pem).and_then(|der| CertificateInfo::read(&der)).ok()?;
        Some(CertificateStatus { of: of.to_owned(), source: CertificateSource::Cluster, missing: Vec::new(), info })
    };
    [("node", NODE_CERTIFICATE), ("ca", CA_CERTIFICATE)].into_iter().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cluster::ClusterId, pki::Authority};

    #[test]
    fn the_administrator_is_told_in_time_and_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(ClusterId(7)).unwrap();
        authority.save_certificate(dir.path()).unwrap();
        authority.issue_node(1, "a", &[]).unwrap().save_node(dir.path()).unwrap();
        let all = node_and_ca(dir.path());
        let end = all[0].info.not_after;
        let mut told = Told::default();
        assert_eq!(told.tell(&all, end - 31 * DAY), Vec::<String>::new());
        let sentences = told.tell(&all, end - 20 * DAY);
        assert_eq!(sentences.len(), 1, "that of the authority is good for ten years: {sentences:?}");
        assert!(sentences[0].contains("node certificate") && sentences[0].contains("in 20 days"), "{sentences:?}");
        for (left, new) in [(30 * DAY, false), (8 * DAY, false), (7 * DAY, true), (DAY, true), (5, false), (0, true)] {
            let step = all[0].info.expiry_step(end - left).unwrap();
            let before = told.0["node"].1;
            assert_eq!(told.is_new(&all[0], step), new, "{left}");
            assert_eq!(before != step, new);
        }
        let renewed = CertificateStatus { info: all[1].info.clone(), ..all[0].clone() };
        assert!(told.is_new(&renewed, 0), "another certificate is another matter");
        assert!(sentence(&all[0], 5).contains("in 1 hours") && sentence(&all[0], 0).contains("has expired"));
        let upload = CertificateStatus { source: CertificateSource::Upload, ..all[0].clone() };
        assert!(sentence(&upload, DAY).contains("twistcli certs upload"));
    }
}
