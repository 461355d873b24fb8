//! What every certificate and signing request of ours begins with: its common name, its time, and how a name is written
//! into it.

use std::{net::IpAddr, time::Duration};

use rcgen::{CertificateParams, DnType, SanType};

use super::PkiError;
use crate::clock::since_1970;

const DAY: Duration = Duration::from_secs(86_400);
/// Certificates are valid a little before they are made: clocks of hosts differ.
pub(super) const BACKDATE: Duration = Duration::from_secs(3600);
/// Longest common name that X.509 allows, in characters.
const MAX_COMMON_NAME: usize = 64;

/// The parameters of a certificate that is valid from now on.
pub(super) fn params(common_name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let common_name: String = common_name.chars().take(MAX_COMMON_NAME).collect();
    params.distinguished_name.push(DnType::CommonName, common_name);
    // A clock before 1970 gives a certificate that is not valid yet, which is what such a clock deserves.
    let now = since_1970();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + DAY * days;
    params
}

/// An address or a host name, as a certificate lists it.
pub(super) fn alternative_name(name: &str) -> Result<SanType, PkiError> {
    Ok(match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(name.try_into()?),
    })
}
