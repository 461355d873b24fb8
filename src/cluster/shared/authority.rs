//! What the members trust, and how that is replaced while the cluster runs: the cluster key, which unseals the
//! authority's private key, and the authority itself. Owns the steps and what each needs; must never take a step after
//! which a member could not unseal the authority, or two members would not trust each other.
//!
//! Both go on under whoever is primary, from what the membership says: a primary that dies in the middle leaves a state
//! from which the next one goes on.
//!
//! *Cluster key*: wanted ([`KeyExchange`] without an id, after each removal) -> announced (the primary has made one and keeps it; the
//! others fetch it) -> all members have it on disk: one change seals anew what was sealed with the old one
//! ([`Change::Reseal`](crate::cluster::Change)): the authority, and the certificate that the Consoles were given. Until
//! then everybody keeps the old key, too. A certificate that cannot be unsealed stays as it is
//! ([`Shared::certificate_is_stranded`]).
//!
//! *Authority*: introduced (all members trust it beside the old one) -> all do, no host is on its way in, and the time has passed
//! that the administrator has left clients to learn of it: it signs from now on
//! ([`Change::SwitchAuthority`](crate::cluster::Change)), and all certificates are made anew -> all members show
//! certificates of the new one: the old one is dropped at once, so that whoever knows its key is shut out.

use serde::{Deserialize, Serialize};

use super::{Shared, console_certificate::CustomCertificate};
use crate::cluster::{
    limits::{self, Impossible, in_json},
    trust::KeyId,
};

/// Longest certificate of an authority and longest sealed key, in bytes.
const MAX_AUTHORITY: usize = 2048;
/// Bytes of the authority that signs and of the one that is introduced. None is introduced while another is retired, of
/// which only the certificate is left.
pub(super) const MAX_AUTHORITIES: usize = 4 * in_json(MAX_AUTHORITY) + 512;

/// The cluster's certificate authority, as all members keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedAuthority {
    /// Its certificate, PEM.
    pub certificate: String,
    /// Its private key, encrypted with the key that only members hold; base64.
    pub sealed_key: String,
    /// Names that key; none if it is the one that the cluster was founded with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
}

/// The cluster key is to be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyExchange {
    /// The key that takes its place; none until a primary has made one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<KeyId>,
}

/// An authority that does not sign yet and is trusted already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingAuthority {
    pub authority: SealedAuthority,
    /// How long it is at least trusted before it signs, in seconds: Defenders, load balancers and browsers need its
    /// certificate by then.
    pub overlap: u64,
}

/// An authority that does not sign any more and is still trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetiredAuthority {
    /// Its certificate, PEM.
    pub certificate: String,
    /// When the new one began to sign, in seconds since 1970; until all members show its certificates, both are
    /// trusted.
    pub until: u64,
}

impl Shared {
    /// The certificates of all authorities that members trust, the one that signs first; PEM.
    pub fn trusted(&self) -> impl Iterator<Item = &str> {
        let coming = self.coming.iter().map(|coming| &coming.authority);
        let signs = self.authority.iter().chain(coming).map(|authority| authority.certificate.as_str());
        signs.chain(self.retired.iter().map(|retired| retired.certificate.as_str()))
    }

    /// The file of all that: [`Shared::trusted`] one after the other.
    pub fn trust_bundle(&self) -> String {
        self.trusted().map(|certificate| format!("{}\n", certificate.trim_end())).collect()
    }

    pub(in crate::cluster) fn keep_authority(&mut self, authority: &SealedAuthority) -> Result<(), Impossible> {
        fits(authority)?;
        self.authority = Some(authority.clone());
        Ok(())
    }

    fn signing(&self) -> Result<&SealedAuthority, Impossible> {
        let none = || refuse("this cluster was set up without its certificate authority");
        self.authority.as_ref().ok_or_else(none)
    }

    pub(in crate::cluster) fn rekey(&mut self) -> Result<(), Impossible> {
        self.signing()?;
        if self.coming.is_some() {
            return Err(refuse("the certificate authority is being replaced: wait until that is done"));
        }
        match self.rekey {
            Some(_) => Err(refuse("the cluster key is being replaced already")),
            None => {
                self.rekey = Some(KeyExchange { next: None });
                Ok(())
            }
        }
    }

    /// After a removal: the host that is gone knows the key, and perhaps the one that was to follow.
    pub(in crate::cluster) fn distrust(&mut self) {
        if self.authority.is_some() && self.level >= 2 {
            // Its key is sealed with a key that the host has: a rotation that began before the removal has to begin
            // again.
            self.coming = None;
            self.rekey = Some(KeyExchange { next: None });
        }
    }

    pub(in crate::cluster) fn announce_key(&mut self, id: KeyId) -> Result<(), Impossible> {
        let rekey = self.rekey.as_mut().ok_or_else(|| refuse("no cluster key is wanted"))?;
        rekey.next = Some(id);
        Ok(())
    }

    pub(in crate::cluster) fn reseal(
        &mut self,
        authority: &SealedAuthority,
        certificate: Option<&CustomCertificate>,
    ) -> Result<(), Impossible> {
        let announced = self.rekey.and_then(|rekey| rekey.next);
        if announced.is_none() || authority.key != announced {
            return Err(refuse("the authority was not sealed with the key that was announced"));
        }
        if self.signing()?.certificate != authority.certificate {
            return Err(refuse("this is not the authority that signs"));
        }
        fits(authority)?;
        // One that came or went while this change was made would be lost, or stay sealed with a key that nobody keeps.
        let (known, sealed) = (self.custom_certificate.as_ref(), certificate);
        let same =
            |(known, new): (&CustomCertificate, &CustomCertificate)| known.chain == new.chain && known.at == new.at;
        if known.is_some() != sealed.is_some() || !known.zip(sealed).is_none_or(same) {
            return Err(refuse("another certificate was given to the Consoles meanwhile"));
        }
        // One that the primary cannot unseal stays as it is: it must not keep a removed host's key in use.
        let stays = known == sealed;
        if !stays && sealed.is_some_and(|certificate| Some(certificate.key) != announced) {
            return Err(refuse("the Consoles' certificate was not sealed with the key that was announced"));
        }
        self.authority = Some(authority.clone());
        if !stays {
            self.custom_certificate = self.sound_certificate(certificate.cloned())?;
        }
        self.rekey = None;
        Ok(())
    }

    pub(in crate::cluster) fn introduce_authority(&mut self, coming: &IncomingAuthority) -> Result<(), Impossible> {
        self.signing()?;
        if self.rekey.is_some() {
            return Err(refuse("the cluster key is being replaced: wait until that is done"));
        }
        if self.coming.is_some() || self.retired.is_some() {
            return Err(refuse(
                "the certificate authority is being replaced already: twistcli ha status shows how far it is",
            ));
        }
        fits(&coming.authority)?;
        self.coming = Some(coming.clone());
        Ok(())
    }

    /// No host may be on its way in. Join tokens carry the digest of the authority: those of the old one end.
    pub(in crate::cluster) fn switch_authority(&mut self, at: u64) -> Result<(), Impossible> {
        self.requests.clear();
        let coming = self.coming.take().ok_or_else(|| refuse("no certificate authority was introduced"))?;
        let before = self.authority.replace(coming.authority);
        self.retired = before.map(|before| RetiredAuthority { certificate: before.certificate, until: at });
        self.invitations.clear();
        Ok(())
    }

    pub(in crate::cluster) fn drop_authority(&mut self) -> Result<(), Impossible> {
        self.retired.take().map(|_| ()).ok_or_else(|| refuse("there is no old certificate authority"))
    }
}

fn refuse(why: &str) -> Impossible {
    Impossible(why.to_owned())
}

/// Refuses an authority that is too long to be kept.
fn fits(authority: &SealedAuthority) -> Result<(), Impossible> {
    match authority.certificate.len().max(authority.sealed_key.len()) {
        0..=MAX_AUTHORITY => limits::fits("the certificate authority", authority, 2 * in_json(MAX_AUTHORITY) + 100),
        length => Err(Impossible(format!("the certificate authority is too long: {length} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Change, ClusterId, Member, Membership, shared::Invitation};

    fn authority(name: &str, key: Option<KeyId>) -> SealedAuthority {
        SealedAuthority { certificate: format!("{name}\n"), sealed_key: "sealed".to_owned(), key }
    }

    fn three() -> Membership {
        let member = |id| Member::founder(id, &format!("host{id}"), &format!("127.0.0.{id}"), 8086);
        let mut membership = Membership::founded(ClusterId(7), (1..=3).map(member).collect());
        membership.shared.authority = Some(authority("old", None));
        membership
    }

    fn sealed_anew(name: &str, key: Option<KeyId>, certificate: Option<CustomCertificate>) -> Change {
        Change::Reseal { authority: authority(name, key), certificate }
    }

    fn change(membership: &Membership, change: Change) -> Result<Membership, String> {
        membership.changed(&change, 1).map_err(|error| error.to_string())
    }

    #[test]
    fn after_a_removal_another_key_is_wanted_and_only_the_announced_one_seals() {
        let removed = change(&three(), Change::Remove { node: 3, at: 9, force: false }).unwrap();
        assert_eq!(removed.shared.rekey, Some(KeyExchange { next: None }));
        let reseal = |membership: &Membership, key| change(membership, sealed_anew("old", key, None));
        assert!(reseal(&removed, None).unwrap_err().contains("announced"));
        let announced = change(&removed, Change::AnnounceKey { id: KeyId(5) }).unwrap();
        assert!(reseal(&announced, Some(KeyId(6))).unwrap_err().contains("announced"));
        // The primary that had it is gone: the next one makes another.
        let again = change(&announced, Change::AnnounceKey { id: KeyId(6) }).unwrap();
        let done = reseal(&again, Some(KeyId(6))).unwrap();
        assert_eq!((done.shared.rekey, done.shared.authority.unwrap().key), (None, Some(KeyId(6))));
        let other = sealed_anew("other", Some(KeyId(6)), None);
        assert!(change(&again, other).unwrap_err().contains("not the authority"));
        // The host that is removed now may have the announced key.
        let less = change(&announced, Change::Remove { node: 2, at: 9, force: false }).unwrap();
        assert_eq!(less.shared.rekey, Some(KeyExchange { next: None }));
        assert!(change(&three(), Change::AnnounceKey { id: KeyId(5) }).unwrap_err().contains("wanted"));
        assert!(change(&removed, Change::Rekey).unwrap_err().contains("already"));
    }

    #[test]
    fn the_certificate_of_the_consoles_is_sealed_anew_in_the_same_change() {
        let given = |chain: &str, key| {
            let (chain, sealed_key) = (chain.to_owned(), format!("sealed with {key}"));
            CustomCertificate { chain, sealed_key, key: KeyId(key), by: "admin".to_owned(), at: 1 }
        };
        let give = |membership: &Membership, certificate| {
            change(membership, Change::CustomCertificate { certificate: Some(certificate) })
        };
        let with = give(&three(), given("a", 1)).unwrap();
        let announced = change(&change(&with, Change::Rekey).unwrap(), Change::AnnounceKey { id: KeyId(5) }).unwrap();
        let seal = |certificate| change(&announced, sealed_anew("old", Some(KeyId(5)), certificate));
        for other in [None, Some(given("b", 5))] {
            assert!(seal(other).unwrap_err().contains("meanwhile"));
        }
        assert!(seal(Some(given("a", 2))).unwrap_err().contains("not sealed with the key"));
        // Nobody could unseal it: the key is replaced all the same, and it stays until another one is given.
        let stranded = seal(Some(given("a", 1))).unwrap();
        assert_eq!((stranded.shared.custom_certificate.as_ref(), stranded.shared.rekey), (Some(&given("a", 1)), None));
        assert!(stranded.shared.certificate_is_stranded() && !announced.shared.certificate_is_stranded());
        let other = give(&stranded, given("b", 5)).unwrap();
        assert!(!other.shared.certificate_is_stranded(), "given anew");
        let done = seal(Some(given("a", 5))).unwrap();
        assert_eq!((done.shared.custom_certificate.as_ref(), done.shared.rekey), (Some(&given("a", 5)), None));
        // An upload that was sealed a moment too early.
        assert!(give(&done, given("c", 1)).unwrap_err().contains("try again"));
        assert_eq!(give(&done, given("c", 5)).unwrap().shared.custom_certificate, Some(given("c", 5)));
        let without = change(&done, Change::CustomCertificate { certificate: None }).unwrap();
        let again = change(&change(&without, Change::Rekey).unwrap(), Change::AnnounceKey { id: KeyId(6) }).unwrap();
        let late = change(&again, sealed_anew("old", Some(KeyId(6)), Some(given("a", 6))));
        assert!(late.unwrap_err().contains("meanwhile"), "it was removed");
    }

    #[test]
    fn a_cluster_of_older_programs_keeps_its_key() {
        let mut old = three();
        (old.shared.level, old.shared.level_version) = (1, String::new());
        let removed = change(&old, Change::Remove { node: 3, at: 9, force: false }).unwrap();
        assert_eq!(removed.shared.rekey, None);
        let text = String::from_utf8(removed.encode()).unwrap();
        assert!(!text.contains("level") && !text.contains("rekey"), "an older program knows nothing of it: {text}");
        let raised = change(&removed, Change::Raise { level: 2, version: "2".to_owned() }).unwrap();
        assert_eq!(raised.shared.rekey, Some(KeyExchange { next: None }), "made up for");
        let raised = change(&old, Change::Raise { level: 2, version: "2".to_owned() }).unwrap();
        assert_eq!(raised.shared.rekey, None, "nobody was removed");
    }

    #[test]
    fn an_authority_is_trusted_before_it_signs_and_after() {
        let coming = IncomingAuthority { authority: authority("new", Some(KeyId(1))), overlap: 60 };
        let introduce = Change::IntroduceAuthority { coming };
        let both = change(&three(), introduce.clone()).unwrap();
        assert_eq!(both.shared.trust_bundle(), "old\nnew\n");
        assert!(change(&both, introduce.clone()).unwrap_err().contains("already"));
        assert!(change(&both, Change::Rekey).unwrap_err().contains("authority is being replaced"));
        assert!(change(&three(), Change::SwitchAuthority { at: 5 }).unwrap_err().contains("introduced"));
        let invitation = Invitation { hash: "a".to_owned(), at: 1, until: 9, by: "b".to_owned() };
        let invited = change(&both, Change::Invite { invitation }).unwrap();
        let switched = change(&invited, Change::SwitchAuthority { at: 5 }).unwrap();
        assert_eq!((switched.shared.trust_bundle().as_str(), switched.shared.invitations.len()), ("new\nold\n", 0));
        assert_eq!(switched.shared.retired.as_ref().unwrap().until, 5);
        let mut joining = both.clone();
        joining.roster.members[2].voter = false;
        assert!(change(&joining, Change::SwitchAuthority { at: 5 }).unwrap_err().contains("on their way"));
        assert!(change(&switched, introduce.clone()).unwrap_err().contains("already"));
        let done = change(&switched, Change::DropAuthority).unwrap();
        assert_eq!(done.shared.trust_bundle(), "new\n");
        assert!(change(&done, Change::DropAuthority).unwrap_err().contains("no old"));
        // Sealed with a key that the removed host has.
        let gone = change(&both, Change::Remove { node: 3, at: 9, force: false }).unwrap();
        assert_eq!(
            (gone.shared.trust_bundle().as_str(), gone.shared.rekey),
            ("old\n", Some(KeyExchange { next: None }))
        );
        assert!(change(&gone, introduce).unwrap_err().contains("key is being replaced"));
    }
}
