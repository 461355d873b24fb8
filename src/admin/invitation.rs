//! Invitations: who may ask to join. Keeps only hashes of secrets; must never let a token through that has expired or
//! is of another cluster.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use tracing::info;

use super::{AdminError, Invited, Operations};
use crate::{
    clock::unix_time,
    cluster::{Change, Membership, roster::place, shared::Invitation},
    join::Token,
    mutex::locked,
    pki,
};

/// How long an invitation may be good.
const VALID: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(7 * 86_400);
/// Longest name of the one who invites that is kept, in characters.
const MAX_BY: usize = 64;

impl Operations {
    /// Makes a join token that is good for `valid`. When too many are open, the one that ends first is closed.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` for another span than one second to seven days, or without an authority;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn invite(&self, valid: Duration, by: &str) -> Result<Invited, AdminError> {
        self.primary()?;
        if !VALID.contains(&valid) {
            return Err(AdminError::Refused("an invitation is good for one second to seven days".to_owned()));
        }
        let _one = self.changing.lock().await;
        let ca_pem = authority(&self.membership())?;
        let token = Token::new(&der(&ca_pem)?);
        let at = unix_time();
        let until = at + valid.as_secs();
        let by: String = by.chars().take(MAX_BY).collect();
        let invitation = Invitation { hash: token.secret_hash(), at, until, by: by.clone() };
        let id = invitation.id();
        let before = self.membership();
        let membership = self.change(Change::Invite { invitation }).await?;
        info!(by, until, "hosts are invited to join");
        for gone in before
            .shared
            .invitations
            .iter()
            .filter(|open| open.in_force(at) && !membership.shared.invitations.contains(open))
        {
            let (made_by, until) = (&gone.by, gone.until);
            info!(made_by, until, "too many invitations are open: this one, which would end first, is closed");
        }
        let primary = self.status().node;
        let addresses = addresses(&membership, primary, self.config.https_port);
        Ok(Invited { id, token: token.to_string(), ca_pem, until, addresses })
    }

    /// Closes all invitations: no token is good any more.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn uninvite(&self, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let open = self.membership().shared.invitations.len();
        if open > 0 {
            self.change(Change::Uninvite).await?;
        }
        info!(by, open, "all invitations are closed");
        Ok(())
    }

    /// Refuses a join token that is not good (any more), and says no more than that to addresses that have tried too
    /// many of them. A good one is good wherever it comes from: others behind the same address must not keep a host
    /// away.
    ///
    /// # Errors
    /// [`AdminError::Denied`], [`AdminError::TooMany`] or [`AdminError::NotPrimary`].
    pub(super) fn check_token(&self, token: &str, from: IpAddr) -> Result<(), AdminError> {
        self.primary()?;
        let checked = check(&self.membership(), token, unix_time());
        if let Err(AdminError::Denied(why)) = &checked {
            let mut attempts = locked(&self.attempts);
            if !attempts.may_try(from, Instant::now()) {
                return Err(AdminError::TooMany("too many attempts with bad join tokens: wait a minute".to_owned()));
            }
            attempts.failed(from, Instant::now());
            info!(%from, why, "a join token is refused");
        }
        checked
    }
}

/// The authority's certificate, PEM.
pub(super) fn authority(membership: &Membership) -> Result<String, AdminError> {
    let none = || {
        let why = "this cluster was set up without its certificate authority: no host can be admitted to it";
        AdminError::Refused(why.to_owned())
    };
    membership.shared.authority.as_ref().map(|authority| authority.certificate.clone()).ok_or_else(none)
}

fn der(pem: &str) -> Result<Vec<u8>, AdminError> {
    let der = pki::certificate_der(pem).map_err(|error| AdminError::Refused(error.to_string()))?;
    Ok(der.to_vec())
}

/// Looks a token up among the invitations.
fn check(membership: &Membership, text: &str, now: u64) -> Result<(), AdminError> {
    let denied = |why: &str| Err(AdminError::Denied(why.to_owned()));
    let token: Token = match text.parse() {
        Ok(token) => token,
        Err(why) => return denied(why),
    };
    if !token.trusts(&der(&authority(membership)?)?) {
        return denied("the join token is one of another cluster");
    }
    // All are compared, so that the time says nothing about where the right one stands.
    let mut found = None;
    for open in &membership.shared.invitations {
        if token.has_hash(&open.hash) {
            found = Some(open.in_force(now));
        }
    }
    match found {
        Some(true) => Ok(()),
        Some(false) => denied("the join token has expired: get a new join script from the PRIMARY"),
        None => denied("the join token is not good (any more): get a new join script from the PRIMARY"),
    }
}

/// `host:port` of all Consoles, the primary's first.
pub(super) fn addresses(membership: &Membership, primary: u64, port: Option<u16>) -> Vec<String> {
    let mut members: Vec<_> = membership.roster.members.iter().collect();
    members.sort_by_key(|member| (member.id != primary, member.rank));
    let places = port.into_iter().flat_map(|port| members.iter().map(move |member| place(&member.address, port)));
    places.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{ClusterId, Member},
        pki::{Authority, ClusterKey},
    };

    fn membership() -> Membership {
        let cluster = ClusterId(7);
        let member = |id| Member::founder(id, &format!("node{id}"), &format!("192.0.2.{id}"), 8086);
        let mut membership = Membership::founded(cluster, vec![member(1), member(2)]);
        let authority = Authority::create(cluster).unwrap();
        membership.shared.authority = Some(authority.seal(&ClusterKey::generate()).unwrap());
        membership
    }

    fn invited(membership: &mut Membership, at: u64, until: u64) -> String {
        let token = Token::new(&der(&authority(membership).unwrap()).unwrap());
        membership.shared.invitations.push(Invitation { hash: token.secret_hash(), at, until, by: "admin".to_owned() });
        token.to_string()
    }

    fn denied(membership: &Membership, token: &str, now: u64) -> String {
        match check(membership, token, now) {
            Err(AdminError::Denied(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_token_is_good_until_it_expires_is_revoked_or_belongs_elsewhere() {
        let mut here = membership();
        let (first, second) = (invited(&mut here, 10, 20), invited(&mut here, 10, 30));
        for token in [&first, &second] {
            assert_eq!(check(&here, token, 19), Ok(()));
        }
        assert!(denied(&here, &first, 20).contains("expired"));
        assert_eq!(check(&here, &second, 20), Ok(()));
        let guess = Token::new(&der(&authority(&here).unwrap()).unwrap()).to_string();
        assert!(denied(&here, &guess, 10).contains("not good"));
        assert!(denied(&here, "nonsense", 10).contains("not a join token"));
        let mut elsewhere = membership();
        let foreign = invited(&mut elsewhere, 10, 20);
        assert!(denied(&here, &foreign, 10).contains("another cluster"));
        here.shared.invitations.clear();
        assert!(denied(&here, &second, 20).contains("any more"));
        here.shared.authority = None;
        assert!(matches!(check(&here, &second, 20), Err(AdminError::Refused(_))));
    }

    #[test]
    fn the_primary_is_asked_first() {
        let mut membership = membership();
        membership.roster.members[0].address = "2001:db8::1".to_owned();
        assert_eq!(addresses(&membership, 2, Some(8083)), ["192.0.2.2:8083", "[2001:db8::1]:8083"]);
        assert_eq!(addresses(&membership, 2, None), Vec::<String>::new());
    }
}
