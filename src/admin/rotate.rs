//! The beginning of what [`crate::cluster::shared::authority`] describes: a new cluster key, a new certificate
//! authority. What follows goes on by itself under whoever is primary. Must never let the private key of an authority
//! out of here but in its sealed form.

use std::{ops::RangeInclusive, time::Duration};

use tracing::info;

use super::{AdminError, Operations};
use crate::{
    cluster::{Change, shared::authority::IncomingAuthority, trust::KeyId},
    pki::{Authority, ClusterKeys, PkiError},
};

/// How long an authority may be trusted that does not sign yet.
const OVERLAP: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(90 * 86_400);

impl Operations {
    /// Has the members replace the cluster key. Returns when that has begun.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` while something is being replaced already;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn rotate_cluster_key(&self, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        self.change(Change::Rekey).await?;
        info!(by, "the cluster key is to be replaced");
        Ok(())
    }

    /// Has the members replace the certificate authority; the new one is trusted for so long before it signs. Returns
    /// when that has begun.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for another span than one second to 90 days, without an authority, or
    /// while something is being replaced already; `Unknown` if the role was lost before it was known whether it is in
    /// force.
    pub(super) async fn rotate_authority(&self, overlap: Duration, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        if !OVERLAP.contains(&overlap) {
            return Err(AdminError::Refused(
                "the new authority is trusted for one second to 90 days before it signs".to_owned(),
            ));
        }
        let _one = self.changing.lock().await;
        let membership = self.membership();
        super::invitation::authority(&membership)?;
        let Some(sealed) = &membership.shared.authority else { return Ok(()) };
        let make = || -> Result<IncomingAuthority, PkiError> {
            let keys = ClusterKeys::load(&self.config.certificates)?;
            let authority = Authority::create(membership.cluster)?.seal(keys.for_authority(sealed)?)?;
            Ok(IncomingAuthority { authority, overlap: overlap.as_secs() })
        };
        let coming = make().map_err(|error| AdminError::Refused(error.to_string()))?;
        let key = coming.authority.key.map(|KeyId(id)| format!("{id:032x}"));
        self.change(Change::IntroduceAuthority { coming }).await?;
        info!(by, key, overlap_s = overlap.as_secs(), "the certificate authority is to be replaced");
        Ok(())
    }
}
