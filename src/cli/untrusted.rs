//! What to do about a Console whose certificate does not verify, and how to get its authority's certificate the first
//! time. Must never send a credential: anybody may answer here.

use std::time::Duration;

use super::{
    place::Place,
    stop::{EX_UNAVAILABLE, Stop},
};
use crate::{
    https::{self, Distrust, Limits},
    pki,
};

/// Short: nobody waits long for a hint.
const LIMITS: Limits = Limits { connect: Duration::from_secs(2), request: Duration::from_secs(5) };
/// Longest certificate that is read.
const LONGEST: u64 = 64 << 10;

/// An authority's certificate that nobody has vouched for.
pub(super) struct Claimed {
    pub pem: String,
    pub fingerprint: String,
}

/// Fetches what whoever answers there claims to be the certificate of its cluster's authority.
///
/// # Errors
/// When there is none.
pub(super) fn authority(place: &Place) -> Result<Claimed, Stop> {
    let url = format!("{place}/api/v1/certs/ca.pem");
    let failed = |why: String| Stop::tell(EX_UNAVAILABLE, &format!("{url}: {why}"));
    let mut response = https::credulous_client(LIMITS).get(&url).call().map_err(|error| failed(error.to_string()))?;
    if !response.status().is_success() {
        return Err(failed(https::refusal(&mut response)));
    }
    let text = response.body_mut().with_config().limit(LONGEST).read_to_string();
    claimed(&text.map_err(|error| failed(error.to_string()))?).map_err(failed)
}

/// The first certificate of a PEM text, and nothing else of it.
pub(super) fn claimed(text: &str) -> Result<Claimed, String> {
    let begin = text.find("-----BEGIN CERTIFICATE-----").ok_or("the answer is no certificate")?;
    const END: &str = "-----END CERTIFICATE-----";
    let end = text[begin..].find(END).ok_or("the answer is no certificate")?;
    let pem = format!("{}\n", &text[begin..begin + end + END.len()]);
    let der = pki::certificate_der(&pem).map_err(|error| error.to_string())?;
    if !pem.bytes().all(|byte| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\n' | b'\r')) {
        return Err("the answer is no certificate".to_owned());
    }
    Ok(Claimed { fingerprint: pki::fingerprint(&der), pem })
}

/// Says why nothing was sent to this Console, and what to do.
pub(super) fn explain(place: &Place, why: Distrust, error: &str) -> String {
    let head = format!("{place}: its certificate is not trusted, so nothing was sent: {error}");
    let hint = match why {
        Distrust::Issuer => {
            let print = match authority(place) {
                Ok(claimed) => format!("\n  It names an authority with the fingerprint\n    {}", claimed.fingerprint),
                Err(_) => String::new(),
            };
            format!(
                "This host does not know the authority that signed it.{print}\n  Compare that with what `sudo twistcli certs ca` shows \
                 on a member. If it is the same:\n    twistcli certs ca --address {place} > ca.pem\n  and name it with --tlscacert \
                 ca.pem, or TWISTLOCK_CACERT=ca.pem.\n  A Console with a certificate of your own needs the authority of that one."
            )
        }
        Distrust::Name => {
            "Ask for it by a name that the certificate has, or add this one: twistcli certs set-names --help".to_owned()
        }
        Distrust::Time => "Are the clocks here and there right? If so, renew it: twistcli certs --help".to_owned(),
        Distrust::Other => "See: twistcli certs --help".to_owned(),
    };
    format!("{head}\n  {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_certificate_is_taken_from_a_stranger() {
        let rcgen::CertifiedKey { cert, .. } = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
        let found = claimed(&format!("\x1b[2Jhello\n{}\n{}", cert.pem(), cert.pem())).unwrap();
        assert_eq!(found.pem.matches("BEGIN").count(), 1);
        assert!(!found.pem.contains('\x1b'));
        assert_eq!(found.fingerprint, pki::fingerprint(cert.der()));
        assert!(claimed("hello").is_err() && claimed("-----BEGIN CERTIFICATE-----\nAA").is_err());
    }
}
