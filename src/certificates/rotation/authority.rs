//! The certificate authority: follows whom to trust, and shows certificates of the one that signs. Must never show a
//! certificate of an authority that a member may not trust yet, or touch one that an administrator has brought.

use std::fs;

use anyhow::{Context, Result};
use tracing::info;

use super::{Rotation, all};
use crate::{
    certificates::renewal,
    clock::unix_time,
    cluster::{Change, Membership, NodeId, trust::KeyId},
    node::Status,
    pki::{self, CA_CERTIFICATE, CONSOLE_CERTIFICATE, NODE_CERTIFICATE, NodeTls},
};

/// The newest authority that members are to trust.
pub(super) fn newest(membership: &Membership) -> Result<KeyId> {
    let coming = membership.shared.coming.as_ref().map(|coming| &coming.authority);
    let newest = coming.or(membership.shared.authority.as_ref()).context("there is no authority")?;
    Ok(pki::authority_id(&newest.certificate)?)
}

impl Rotation {
    fn read(&self, name: &str) -> Result<String> {
        let path = self.parts.certificates.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Uses what is in the files from now on. Until that has succeeded it is tried again at each look, and nothing is
    /// reported.
    fn reload(&mut self) -> Result<()> {
        let tls = NodeTls::load(&self.parts.certificates).context("load the new certificates")?;
        self.parts.tls.send_replace(std::sync::Arc::new(tls));
        self.stale = false;
        Ok(())
    }

    /// Trusts whom the membership names, and nobody else.
    pub(super) fn follow_trust(&mut self, membership: &Membership) -> Result<()> {
        let (bundle, known) = (membership.shared.trust_bundle(), self.read(CA_CERTIFICATE)?);
        if known.split_whitespace().eq(bundle.split_whitespace()) {
            return if self.stale { self.reload() } else { Ok(()) };
        }
        self.stale = true;
        pki::store_pem(&self.parts.certificates, CA_CERTIFICATE, &bundle, false)?;
        self.reload()?;
        info!(authorities = membership.shared.trusted().count(), "this node trusts other authorities from now on");
        Ok(())
    }

    /// Makes this node's certificate anew if another authority signed it. Returns which one signed what it shows now,
    /// the Console's own certificate included; nothing while the two differ.
    pub(super) fn follow_certificates(&mut self, membership: &Membership, node: NodeId) -> Result<KeyId> {
        let Some(sealed) = &membership.shared.authority else { return Ok(KeyId::default()) };
        let signs = pki::authority_id(&sealed.certificate)?;
        let Some(retired) = &membership.shared.retired else { return Ok(signs) };
        if !pki::is_signed_by(&self.read(NODE_CERTIFICATE)?, &sealed.certificate)? {
            self.stale = true;
            renewal::renew(&self.parts.certificates, membership, node)?;
            self.reload()?;
            info!("the certificate of this node is made anew by the authority that signs from now on");
        }
        // That of the Console is made anew by whoever looks after what the Console serves
        // ([`crate::certificates::console_tls`]).
        let waits = pki::is_signed_by(&self.read(CONSOLE_CERTIFICATE)?, &retired.certificate)?;
        Ok(if waits { KeyId::default() } else { signs })
    }

    /// Lets the new authority sign when all members trust it, and drops the old one when nothing of it is shown any
    /// more.
    pub(super) async fn lead_authority(&mut self, membership: &Membership, status: &Status) -> Result<()> {
        let now = unix_time();
        if let Some(coming) = &membership.shared.coming {
            let newest = newest(membership)?;
            // Clients learn of it while the old one still signs: no member shows them anything that they do not know.
            let from = pki::authority_made_at(&coming.authority.certificate)?.saturating_add(coming.overlap);
            let free = now >= from && !membership.has_newcomers(now);
            if free && all(membership, status, |holds| holds.trusts == newest) {
                let done =
                    "all members trust the new authority: it signs from now on, and join scripts of the old one end";
                self.change(Change::SwitchAuthority { at: now }, done).await?;
            }
        } else if membership.shared.retired.is_some() {
            let signs = newest(membership)?;
            // At once: whoever was removed may know its key, and could pass for a member.
            if all(membership, status, |holds| holds.shows == signs) {
                self.change(Change::DropAuthority, "the old authority is not trusted any more").await?;
            }
        }
        Ok(())
    }
}
