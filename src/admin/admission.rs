//! From a request to join to a member. Owns the checks of both sides of APPLY; must never sign a name that nobody has
//! checked, or admit some of the hosts only.

use std::{collections::VecDeque, net::IpAddr};

use subtle::ConstantTimeEq;
use tracing::{info, warn};

use super::{AdminError, Operations, audit::Record, invitation::authority};
use crate::{
    clock::{unix_time, unix_time_ms},
    cluster::{
        Change, Membership, Newcomer, NodeId,
        level::{FIRST_LEVEL, outdated},
        limits::MAX_CONSOLE_NAMES,
        roster::check_host,
        shared::Request,
    },
    join::{JoinRequest, RequestState, Token},
    mutex::locked,
    pki::{self, Authority, SigningRequest},
};

/// How long a request waits for an answer, in seconds.
pub(super) const EXPIRES: u64 = 86_400;
/// Difference of two clocks with which certificates, times of expiry and logs still make sense, in milliseconds.
const MAX_CLOCK_MS: i64 = 1_000;
/// A clock that has moved by less than this since the last request is not noted again.
const CLOCK_STEP_MS: i64 = 250;
/// Rejections that are remembered.
const REMEMBERED: usize = 32;

/// Requests that were turned down lately by this node: their hosts are told so, for as long as they come with a token
/// that was made before. With a new join script a host may ask again.
#[derive(Debug, Default)]
pub(super) struct Rejections(VecDeque<Rejected>);

#[derive(Debug)]
struct Rejected {
    id: String,
    fingerprint: String,
    /// Hashes of the tokens that were good at that time.
    tokens: Vec<String>,
    by: String,
}

impl Rejections {
    fn add(&mut self, request: &Request, tokens: Vec<String>, by: &str) {
        if self.0.len() >= REMEMBERED {
            self.0.pop_front();
        }
        let (id, fingerprint) = (request.id.clone(), request.fingerprint.clone());
        self.0.push_back(Rejected { id, fingerprint, tokens, by: by.to_owned() });
    }

    fn forget(&mut self, id: &str) {
        self.0.retain(|rejected| rejected.id != id);
    }

    fn find(&self, which: impl Fn(&Rejected) -> bool) -> Option<RequestState> {
        let rejected = self.0.iter().rev().find(|rejected| which(rejected))?;
        let reason = format!("{} has turned the request down", rejected.by);
        Some(RequestState::Rejected { reason })
    }
}

impl Operations {
    /// A host asks to join; asking again with the same key gives the same answer. `begin` is called before anything is
    /// changed; what it gives comes back.
    pub(super) async fn request(
        &self,
        token: &str,
        from: IpAddr,
        request: JoinRequest,
        begin: impl AsyncFnOnce() -> Record,
    ) -> (Option<Record>, Result<RequestState, AdminError>) {
        let mut record = None;
        let result = self.ask(token, from, request, async || record = Some(begin().await)).await;
        (record, result)
    }

    async fn ask(
        &self,
        token: &str,
        from: IpAddr,
        request: JoinRequest,
        begin: impl AsyncFnOnce(),
    ) -> Result<RequestState, AdminError> {
        // Before anything that may wait: the time that another change takes is no difference of the clocks.
        let (at, clock_ms) = (unix_time(), clock_ms(request.time_ms));
        if let Err(error) = self.check_token(token, from) {
            // APPLY closes the invitations. A host that has lost its answer to a crash proves itself by its key.
            let known = matches!(error, AdminError::Denied(_)).then(|| sound(&request).ok()).flatten();
            let state = known.and_then(|fingerprint| admitted_with(&self.membership(), &fingerprint));
            return state.ok_or(error);
        }
        let fingerprint = sound(&request).map_err(AdminError::Refused)?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        if let Some(state) = admitted_with(&membership, &fingerprint) {
            return Ok(state);
        }
        let token: Token = token.parse().map_err(|why: &str| AdminError::Denied(why.to_owned()))?;
        let same =
            |old: &Rejected| old.fingerprint == fingerprint && old.tokens.iter().any(|hash| token.has_hash(hash));
        if let Some(state) = locked(&self.rejections).find(same) {
            return Ok(state);
        }
        let old = membership.shared.requests.iter().find(|old| old.fingerprint == fingerprint && old.in_force(at));
        let wanted = Request {
            id: old.map_or_else(|| format!("{:032x}", rand::random::<u128>()), |old| old.id.clone()),
            name: request.name,
            address: request.address,
            port: request.port,
            version: request.version,
            level: request.level.max(FIRST_LEVEL),
            fingerprint,
            csr: request.csr,
            console_csr: request.console_csr,
            console_names: request.console_names,
            clock_ms,
            at,
            until: at + EXPIRES,
        };
        if let Some(old) = old.filter(|old| says_the_same(old, &wanted)) {
            return Ok(pending(old));
        }
        let state = pending(&wanted);
        let Request { name, address, port, version, fingerprint, .. } = wanted.clone();
        begin().await;
        self.change(Change::Request { request: wanted }).await?;
        info!(%from, name, address, port, version, fingerprint, clock_ms, "a host asks to join");
        Ok(state)
    }

    /// Where a request stands; none if nobody made it or it has expired. Works on every member.
    pub(super) fn request_state(&self, id: &str) -> Option<RequestState> {
        let membership = self.membership();
        let open =
            membership.shared.requests.iter().find(|open| same_secret(&open.id, id) && open.in_force(unix_time()));
        let member = |member: &&_| admission_is(member, |request| same_secret(request, id));
        open.map(pending)
            .or_else(|| {
                membership.roster.members.iter().find(member).and_then(|member| admitted(&membership, member.id))
            })
            .or_else(|| locked(&self.rejections).find(|rejected| same_secret(&rejected.id, id)))
    }

    /// APPLY: takes all hosts that ask in. Returns their ids. With the fingerprints that somebody has `compared`: only
    /// if those are the hosts that ask.
    ///
    /// # Errors
    /// [`AdminError`]; `Refused` names everything that is in the way.
    pub(super) async fn apply(&self, compared: Option<Vec<String>>, by: &str) -> Result<Vec<NodeId>, AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        if compared.is_some_and(|compared| !are_those_who_ask(&membership, compared)) {
            let why =
                "the hosts that ask to join are not those that you have looked at: compare the fingerprints again";
            return Err(AdminError::Refused(why.to_owned()));
        }
        let objections = objections(&membership, unix_time());
        if !objections.is_empty() {
            return Err(AdminError::Refused(objections.join("; ")));
        }
        let requests: Vec<&Request> = membership.shared.requests.iter().collect();
        let hosts = self.sign(&membership, &requests)?;
        let admitted: Vec<(NodeId, Request)> =
            hosts.iter().map(|host| host.id).zip(membership.shared.requests.iter().cloned()).collect();
        self.change(Change::Admit { hosts }).await?;
        for (node, Request { name, address, port, fingerprint, .. }) in &admitted {
            info!(
                by,
                node, name, address, port, fingerprint, "a host is admitted: it has a vote once it has caught up"
            );
        }
        Ok(admitted.into_iter().map(|(node, _)| node).collect())
    }

    /// Turns a request down, by the name of its host, its fingerprint (or the beginning of it) or its id.
    ///
    /// # Errors
    /// [`AdminError::NotPrimary`]; `Refused` when no request is meant, or more than one;
    /// `Unknown` if the role was lost before it was known whether it is in force.
    pub(super) async fn reject(&self, request: &str, by: &str) -> Result<(), AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        let found = find(&membership.shared.requests, request).map_err(AdminError::Refused)?;
        let tokens = membership.shared.invitations.iter().map(|invitation| invitation.hash.clone()).collect();
        // Before the request is gone: its host asks at any time, and must not take the rejection for an expired
        // request.
        locked(&self.rejections).add(found, tokens, by);
        if let Err(error) = self.change(Change::Reject { request: found.id.clone() }).await {
            locked(&self.rejections).forget(&found.id);
            return Err(error);
        }
        info!(by, name = found.name, fingerprint = found.fingerprint, "a request to join is turned down");
        Ok(())
    }

    /// Signs for hosts that are to be members, with the next ids.
    pub(super) fn sign(&self, membership: &Membership, requests: &[&Request]) -> Result<Vec<Newcomer>, AdminError> {
        authority(membership)?;
        let Some(sealed) = &membership.shared.authority else { return Ok(Vec::new()) };
        let failed = |error: pki::PkiError| AdminError::Refused(error.to_string());
        let authority = Authority::open(membership.cluster, sealed, &self.config.certificates).map_err(failed)?;
        let sign = |(id, request): (NodeId, &&Request)| {
            let names: Vec<&str> = request.console_names.iter().map(String::as_str).collect();
            let certificate = authority.sign_request(&request.csr, id, &request.name, &[&request.address]);
            let of_host = |error: pki::PkiError| AdminError::Refused(format!("{}: {error}", request.name));
            Ok(Newcomer {
                id,
                request: request.id.clone(),
                certificate: certificate.map_err(of_host)?,
                console_certificate: authority.sign_console_request(&request.console_csr, &names).map_err(of_host)?,
            })
        };
        (membership.roster.next_id..).zip(requests).map(sign).collect()
    }
}

/// Checks everything that a host says about itself; returns the fingerprint of its key.
pub(super) fn sound(request: &JoinRequest) -> Result<String, String> {
    check_host(&request.name, &request.address, request.port).map_err(|error| error.to_string())?;
    let version = &request.version;
    let readable = |c: char| c.is_ascii_alphanumeric() || "-.+_".contains(c);
    if version.is_empty() || version.len() > 64 || !version.chars().all(readable) {
        return Err("the version of the program is not readable".to_owned());
    }
    if request.console_names.is_empty() || request.console_names.len() > MAX_CONSOLE_NAMES {
        return Err(format!("a Console certificate has 1 to {MAX_CONSOLE_NAMES} names"));
    }
    for name in &request.console_names {
        let plain = name.strip_prefix("*.").unwrap_or(name);
        check_host("name", plain, 1).map_err(|_| format!("{name:?} cannot be in a Console certificate"))?;
    }
    let of = |what: &str, csr: &str| {
        let request = SigningRequest::parse(csr).map_err(|error| format!("{what}: {error}"))?;
        Ok::<_, String>(request.fingerprint().to_owned())
    };
    let fingerprint = of("the node's certificate", &request.csr)?;
    if of("the Console's certificate", &request.console_csr)? == fingerprint {
        return Err("the Console needs a key of its own".to_owned());
    }
    Ok(fingerprint)
}

/// A host must not be admitted whose fingerprint nobody has compared.
fn are_those_who_ask(membership: &Membership, mut compared: Vec<String>) -> bool {
    let mut asking: Vec<&str> = membership.shared.requests.iter().map(|request| request.fingerprint.as_str()).collect();
    asking.sort_unstable();
    compared.sort_unstable();
    asking == compared
}

/// Everything that is in the way of APPLY, in sentences.
fn objections(membership: &Membership, now: u64) -> Vec<String> {
    let mut found = Vec::new();
    let (members, requests) = (membership.roster.members.len(), membership.shared.requests.len());
    let size = membership.roster.size;
    if requests == 0 && members >= size.most {
        return vec![format!("the cluster is complete: it has {} members", size.most)];
    }
    if !size.permits(members + requests) {
        let missing = size.missing(members + requests);
        found.push(format!(
            "{members} of {size} members and {requests} that ask to join: run the join script on {missing} more"
        ));
    } else if requests == 0 {
        found.push("no host asks to join".to_owned());
    }
    for request in &membership.shared.requests {
        let Request { name, clock_ms, .. } = request;
        if request.level < membership.shared.level {
            let theirs = (request.version.as_str(), request.level);
            let needed = (membership.shared.level_version.as_str(), membership.shared.level);
            found.push(format!("{}; or run the join script there again", outdated(name, theirs, needed)));
        }
        found.extend(clock_objection(name, *clock_ms));
        if !request.in_force(now) {
            found.push(format!("the request of {name} has expired: run the join script there again, or reject it"));
        }
    }
    for node in membership.learners() {
        found.push(format!("{} is still being brought up to date: wait until it is SECONDARY", membership.name(node)));
    }
    found
}

/// Refuses a host whose clock differs too much, by so many milliseconds.
pub(super) fn clock_objection(name: &str, clock_ms: i64) -> Option<String> {
    let (way, ms) = (if clock_ms > 0 { "ahead" } else { "behind" }, clock_ms.unsigned_abs());
    (ms > MAX_CLOCK_MS.unsigned_abs())
        .then(|| format!("the clock of {name} is {ms} ms {way}: set up time synchronization there"))
}

/// The one request that is meant.
fn find<'a>(requests: &'a [Request], wanted: &str) -> Result<&'a Request, String> {
    let exact = |request: &&Request| request.name == wanted || same_secret(&request.id, wanted);
    let begins = |request: &&Request| wanted.len() >= 5 && request.fingerprint.starts_with(wanted);
    let mut found = requests.iter().filter(exact);
    if let Some(request) = found.next() {
        return Ok(request);
    }
    let mut found = requests.iter().filter(begins);
    match (found.next(), found.next()) {
        (Some(request), None) => Ok(request),
        (Some(_), Some(_)) => Err(format!("{wanted} fits more than one request: write more of the fingerprint")),
        (None, _) if requests.is_empty() => Err("no host asks to join".to_owned()),
        (None, _) => {
            let names: Vec<_> = requests.iter().map(|request| request.name.as_str()).collect();
            Err(format!("there is no request of {wanted:?}: {} ask to join", names.join(" and ")))
        }
    }
}

/// True if nothing but the signatures of the two requests differs, which are new each time.
fn says_the_same(old: &Request, new: &Request) -> bool {
    let key = |csr: &str| SigningRequest::parse(csr).ok().map(|request| request.fingerprint().to_owned());
    let (csr, console_csr) = (new.csr.clone(), new.console_csr.clone());
    let settled = Request { clock_ms: new.clock_ms, at: new.at, until: new.until, csr, console_csr, ..old.clone() };
    let moved = old.clock_ms.abs_diff(new.clock_ms) > CLOCK_STEP_MS.unsigned_abs();
    !moved && settled == *new && key(&old.console_csr) == key(&new.console_csr)
}

/// Milliseconds by which a clock is ahead of ours.
pub(super) fn clock_ms(time_ms: u64) -> i64 {
    let ours = unix_time_ms() as i64;
    i64::try_from(time_ms).unwrap_or(i64::MAX).saturating_sub(ours)
}

fn pending(request: &Request) -> RequestState {
    let Request { id, fingerprint, until, .. } = request.clone();
    RequestState::Pending { id, fingerprint, until }
}

fn admission_is(member: &crate::cluster::Member, which: impl Fn(&str) -> bool) -> bool {
    member.admission.as_ref().is_some_and(|admission| which(&admission.request))
}

/// The answer for the member that was admitted with this key.
fn admitted_with(membership: &Membership, fingerprint: &str) -> Option<RequestState> {
    admission_of(membership, fingerprint).and_then(|(node, _)| admitted(membership, node))
}

/// The member that was admitted with this key and has no vote yet, and the id of its admission.
pub(super) fn admission_of(membership: &Membership, fingerprint: &str) -> Option<(NodeId, String)> {
    membership.roster.members.iter().find_map(|member| {
        let admission = member.admission.as_ref()?;
        let key = pki::certificate_key(&admission.certificate).ok()?;
        (key == fingerprint).then(|| (member.id, admission.request.clone()))
    })
}

fn admitted(membership: &Membership, node: NodeId) -> Option<RequestState> {
    let admission = membership.get(node)?.admission.as_ref()?;
    authority(membership).inspect_err(|error| warn!(%error, "a newcomer cannot be answered")).ok()?;
    let ca = membership.shared.trust_bundle();
    let mut known = membership.public();
    (known.shared.requests, known.shared.invitations, known.shared.coming) = (Vec::new(), Vec::new(), None);
    Some(RequestState::Admitted {
        node,
        certificate: admission.certificate.clone(),
        console_certificate: admission.console_certificate.clone(),
        ca,
        membership: known,
    })
}

/// Compares in the same time wherever they differ.
fn same_secret(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
