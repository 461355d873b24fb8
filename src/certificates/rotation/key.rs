//! The cluster key: makes, fetches and keeps it. Must never seal the authority with a key that a member does not have.

use anyhow::{Context, Result, bail};
use tracing::{info, warn};

use super::{Rotation, all, exchange};
use crate::{
    cluster::{Change, Membership, shared::console_certificate::CustomCertificate, trust::KeyId},
    node::Status,
    pki::{self, Authority, ClusterKey, ClusterKeys, PkiError},
    storage::membership::StoredMembership,
};

impl Rotation {
    fn keys(&mut self) -> Result<&mut ClusterKeys> {
        let keys = match self.keys.take() {
            Some(keys) => keys,
            None => {
                let (keys, damaged) = ClusterKeys::load_sound(&self.parts.certificates)?;
                for error in damaged {
                    warn!(%error, "the file is set aside, and its key is fetched from the other members");
                }
                keys
            }
        };
        Ok(self.keys.insert(keys))
    }

    /// The key that the others wait for, if it is here; else the one in use.
    pub(super) fn held_key(&self, membership: &Membership) -> KeyId {
        let Some(keys) = &self.keys else { return KeyId::default() };
        let announced = membership.shared.rekey.and_then(|rekey| rekey.next).filter(|id| keys.find(*id).is_some());
        announced.or(keys.current.as_ref().map(ClusterKey::id)).unwrap_or_default()
    }

    /// Puts the key that seals the authority in its place, and the announced one beside it.
    pub(super) async fn follow_key(&mut self, membership: &Membership) -> Result<()> {
        let dir = self.parts.certificates.clone();
        let sealed_with = membership.shared.authority.as_ref().and_then(|authority| authority.key);
        let has = |key: &Option<ClusterKey>, id| key.as_ref().is_some_and(|key| key.id() == id);
        self.behind = false;
        if let Some(id) = sealed_with
            && !has(&self.keys()?.current, id)
        {
            if !has(&self.keys()?.next, id) {
                // It was away when the others replaced the key, or got its database from one that had not yet.
                let key = self.fetch(membership, id).await?;
                self.keys()?.keep_next(&dir, key)?;
            }
            // The old key is gone then, and a start would begin with the membership that is in the file.
            self.behind = self.keys()?.current.is_some() && !self.is_in_file(id)?;
            if self.behind {
                return Ok(());
            }
            self.keys()?.use_next(&dir)?;
            info!(key = %id, "the new cluster key is in use");
        }
        match membership.shared.rekey {
            Some(rekey) => {
                if let Some(id) = rekey.next
                    && !has(&self.keys()?.next, id)
                {
                    let key = self.fetch(membership, id).await?;
                    self.keys()?.keep_next(&dir, key)?;
                    info!(key = %id, "the announced cluster key is on this disk");
                }
            }
            // It was announced in vain: another one came in its place, or none is wanted any more.
            None if self.keys()?.next.is_some() => self.keys()?.forget_next(&dir)?,
            None => {}
        }
        Ok(())
    }

    /// Whether the membership in its file says that this key seals the authority. It is in force a little earlier.
    fn is_in_file(&self, id: KeyId) -> Result<bool> {
        let kept = StoredMembership::read(&self.parts.data).context("read the membership")?;
        Ok(kept.and_then(|kept| kept.membership.shared.authority).is_some_and(|authority| authority.key == Some(id)))
    }

    /// Asks all other members, the primary first.
    async fn fetch(&self, membership: &Membership, id: KeyId) -> Result<ClusterKey> {
        let status = self.parts.handle.status().borrow().clone();
        let mut others: Vec<_> = membership.roster.members.iter().filter(|member| member.id != status.node).collect();
        others.sort_by_key(|member| status.primary != Some(member.id));
        let mut problems = Vec::new();
        for member in others {
            // At the address that it reports itself.
            let member = self.parts.peers.roster.member(member.id).unwrap_or_else(|| member.clone());
            match exchange::fetch(&self.parts.peers, &member, id).await {
                Ok(key) => return Ok(key),
                Err(error) => problems.push(format!("{}: {error:#}", member.name)),
            }
        }
        bail!("the cluster key {id} could not be fetched ({})", problems.join("; "))
    }

    /// Announces a key if none is, or if the one that made it took it along; seals when all members have it.
    pub(super) async fn lead_key(&mut self, membership: &Membership, status: &Status) -> Result<()> {
        let (Some(rekey), Some(authority)) = (membership.shared.rekey, &membership.shared.authority) else {
            return Ok(());
        };
        let announced = match rekey.next {
            Some(id) => self.keys()?.next.clone().filter(|key| key.id() == id),
            None => None,
        };
        let Some(next) = announced else {
            // This node has just asked for it: no other member has it. Nothing is sealed with it.
            let key = ClusterKey::generate();
            let id = key.id();
            let dir = self.parts.certificates.clone();
            self.keys()?.keep_next(&dir, key)?;
            let done = "a new cluster key is announced: all members fetch it";
            self.change(Change::AnnounceKey { id }, done).await?;
            return Ok(());
        };
        if !all(membership, status, |holds| holds.key == next.id()) {
            return Ok(());
        }
        let opened = Authority::open(membership.cluster, authority, &self.parts.certificates);
        let sealed =
            opened.and_then(|authority| authority.seal(&next)).context("seal the certificate authority anew")?;
        let (certificate, problem) = match &membership.shared.custom_certificate {
            Some(given) => match self.sealed_anew(membership, given, &next)? {
                Ok(certificate) => (Some(certificate), None),
                Err(error) => (Some(given.clone()), Some(error)),
            },
            None => (None, None),
        };
        let done = "all members have the new cluster key: it seals the authority";
        let changed = self.change(Change::Reseal { authority: sealed, certificate }, done).await?;
        if let Some(error) = problem.filter(|_| changed) {
            warn!(
                "the certificate that was given to all Consoles could not be sealed with the new cluster key and stays as it \
                 is: a Console that starts again cannot serve it; upload it again: {error}"
            );
        }
        Ok(())
    }

    /// The certificate that the Consoles were given, for the new key. If it cannot be unsealed now, it never can: the
    /// key in force has just unsealed the authority, nobody keeps another one, and what is damaged here is damaged
    /// everywhere.
    fn sealed_anew(
        &self,
        membership: &Membership,
        given: &CustomCertificate,
        next: &ClusterKey,
    ) -> Result<Result<CustomCertificate, PkiError>> {
        let keys = ClusterKeys::load(&self.parts.certificates)?;
        let old = keys.find(given.key).ok_or(PkiError::Sealed("its key is that of an earlier time"));
        Ok(old.and_then(|old| pki::reseal(membership.cluster, given, old, next)))
    }
}
