//! Hosts that wait are taken into the pool: all that are named, or none. Owns the checks before it and the calls to the
//! hosts; must never take in a host that has neither proven that it knows the secret nor the fingerprint that somebody
//! has compared.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::{task::JoinSet, time::timeout};
use tracing::{info, warn};

use super::{PoolSize, in_pool, up};
use crate::{
    admin::{
        AdminError, Operations,
        admission::{EXPIRES, admission_of, clock_ms, clock_objection, sound},
        invitation,
    },
    clock::unix_time,
    cluster::{
        Change, Membership, NodeId,
        level::{FIRST_LEVEL, outdated},
        membership::Adoption,
        roster::{MOST, check_host},
        shared::Request,
    },
    join::{JoinFile, JoinRequest, Token},
    meeting::{Caller, MeetingError, Met, Offer, Secret},
    pki,
};

/// Longest time for the call to a host: a request of the API takes 30 s at most.
const CALL: Duration = Duration::from_secs(15);

/// A host that is to be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewMember {
    /// Host name or IP address by which all members reach it; with a port if that is not the one of this member.
    pub address: String,
    /// SHA-256 of its key, as it shows it itself; without it, both sides must have the pool's secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// A host that waits, as it was met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolCandidate {
    /// As it was named.
    pub address: String,
    pub name: String,
    /// Of its program.
    pub version: String,
    /// SHA-256 of its key.
    pub fingerprint: String,
    /// True if it has proven that it knows the pool's secret.
    pub proven: bool,
}

/// A host that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddedMember {
    /// As it was named.
    pub address: String,
    pub name: String,
    /// Its id.
    pub node: u64,
    /// True if it was a member before: an earlier request was interrupted.
    pub before: bool,
    /// Why it could not be told that it is a member; the same request tells it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What has become of a request to add members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolAddition {
    /// Those that were named.
    pub members: Vec<AddedMember>,
    /// The pool with them. They count for what is tolerated once they have their votes.
    #[serde(flatten)]
    pub size: PoolSize,
}

/// Whom to call.
struct Call {
    /// As it was named.
    named: String,
    host: String,
    port: u16,
    /// The fingerprint that somebody has compared.
    expected: Option<String>,
}

/// Who has answered, and by how many milliseconds its clock is ahead.
struct Answered {
    met: Met,
    clock_ms: i64,
}

/// What a host is to the pool.
enum Guest {
    New {
        call: Call,
        met: Met,
        request: Box<Request>,
    },
    /// It is a member already, and was never told.
    Again {
        call: Call,
        met: Met,
    },
    /// It is a member, and knows it; or it could not be met, and was never heard of: then why.
    Member {
        call: Call,
        node: NodeId,
        missed: Option<String>,
    },
}

impl Operations {
    /// Meets the hosts, and changes nothing on either side.
    ///
    /// # Errors
    /// As those of [`crate::admin::Admin::look_at_hosts`].
    pub(in crate::admin) async fn look_at_hosts(&self, wanted: &[NewMember]) -> Result<Vec<PoolCandidate>, AdminError> {
        self.primary()?;
        let membership = self.membership();
        let guests = self.guests(&membership, wanted).await?;
        let seen = guests.into_iter().filter_map(|guest| match guest {
            Guest::New { call, met, .. } | Guest::Again { call, met, .. } => Some(PoolCandidate {
                address: call.named,
                name: met.request.name.clone(),
                version: met.request.version.clone(),
                fingerprint: met.fingerprint.clone(),
                proven: met.proven,
            }),
            Guest::Member { .. } => None,
        });
        Ok(seen.collect())
    }

    /// Takes all of these hosts in, as members without a vote.
    ///
    /// # Errors
    /// As those of [`crate::admin::Admin::add_to_pool`].
    pub(in crate::admin) async fn add_to_pool(
        &self,
        wanted: &[NewMember],
        by: &str,
    ) -> Result<PoolAddition, AdminError> {
        self.primary()?;
        let _one = self.changing.lock().await;
        let membership = self.membership();
        let mut guests = self.guests(&membership, wanted).await?;
        let unknown: Vec<String> = guests.iter().filter_map(unproven).collect();
        if !unknown.is_empty() {
            return Err(AdminError::Refused(unknown.join("; ")));
        }
        let requests: Vec<&Request> = guests.iter().filter_map(Guest::request).collect();
        let hosts = self.adoptions(&membership, &requests)?;
        if !hosts.is_empty() {
            // As the change itself would be refused, before a host keeps itself free for it.
            let possible = membership.changed(&Change::Adopt { hosts: hosts.clone() }, self.status().node);
            possible.map_err(|why| AdminError::Refused(why.to_string()))?;
        }
        reserve(&mut guests).await?;
        if !hosts.is_empty() {
            self.change(Change::Adopt { hosts: hosts.clone() }).await?;
        }
        let membership = self.membership();
        let mut members = Vec::new();
        for guest in guests {
            members.push(self.tell(&membership, guest, by).await?);
        }
        let size = PoolSize::of(&membership, up(&membership, &self.status()));
        Ok(PoolAddition { members, size })
    }

    /// Calls all hosts, and makes sure that each of them can be added.
    async fn guests(&self, membership: &Membership, wanted: &[NewMember]) -> Result<Vec<Guest>, AdminError> {
        in_pool(membership)?;
        let own = membership.get(self.status().node).map_or(8086, |member| member.port);
        let calls = calls(wanted, own).map_err(AdminError::Refused)?;
        let caller = self.caller(membership)?;
        let (mut guests, mut objections) = (Vec::new(), Vec::new());
        for (call, answer) in call_all(&caller, calls).await {
            match guest(membership, call, answer, unix_time()) {
                // Whoever was heard of as a member knows that it is one.
                Ok(Guest::Member { call, node, missed: Some(_) }) if self.has_heard_of(node) => {
                    guests.push(Guest::Member { call, node, missed: None });
                }
                Ok(guest) => guests.push(guest),
                Err(why) => objections.push(why),
            }
        }
        objections.extend(objections_to_all(membership, &guests));
        if objections.is_empty() { Ok(guests) } else { Err(AdminError::Refused(objections.join("; "))) }
    }

    fn has_heard_of(&self, node: NodeId) -> bool {
        self.status().members.iter().any(|member| member.id == node && member.last_contact_ms.is_some())
    }

    /// Who calls for this pool.
    fn caller(&self, membership: &Membership) -> Result<Caller, AdminError> {
        invitation::authority(membership)?;
        if self.config.https_port.is_none() {
            let why = "MANAGEMENT_PORT_HTTPS is off: hosts that are added fetch their certificates there";
            return Err(AdminError::Refused(why.to_owned()));
        }
        let secret = self.config.pool_secret_file.as_deref().map(Secret::read);
        let status = self.status();
        let offer = Offer {
            cluster: membership.cluster,
            authority: membership.shared.trust_bundle(),
            by: status.name.clone(),
            version: self.config.version.clone(),
            level: membership.shared.level,
            address: String::new(),
        };
        let tls = pki::calling_tls(&self.config.certificates);
        Ok(Caller {
            tls: tls.map_err(|error| AdminError::Refused(error.to_string()))?,
            secret: secret.transpose().map_err(AdminError::Refused)?,
            from: self.config.bind,
            offer,
        })
    }

    /// Signs for hosts that are not members yet.
    fn adoptions(&self, membership: &Membership, requests: &[&Request]) -> Result<Vec<Adoption>, AdminError> {
        let newcomers = self.sign(membership, requests)?;
        let pairs = requests.iter().zip(newcomers);
        Ok(pairs.map(|(request, newcomer)| Adoption { request: (*request).clone(), newcomer }).collect())
    }

    /// Tells a host that it is a member. From here on the answer is never no: it is one.
    async fn tell(&self, membership: &Membership, guest: Guest, by: &str) -> Result<AddedMember, AdminError> {
        let (call, mut met, before) = match guest {
            Guest::Member { call, node, missed } => {
                let name = membership.name(node);
                return Ok(AddedMember { address: call.named, name, node, before: true, problem: missed });
            }
            Guest::New { call, met, .. } => (call, met, false),
            Guest::Again { call, met, .. } => (call, met, true),
        };
        let (node, id) = admission_of(membership, &met.fingerprint).ok_or_else(|| {
            let why = format!("{} was taken in, and is gone again: look at the status", call.named);
            AdminError::Unknown(why)
        })?;
        let (name, address) = (membership.name(node), call.named);
        let fingerprint = met.fingerprint.clone();
        info!(by, node, name, address, fingerprint, "a host is added to the pool: it has a vote once it has caught up");
        let file = self.file(membership)?;
        let problem = met.adopt(file, id).await.err().map(|error| error.to_string());
        if let Some(problem) = &problem {
            warn!(name, address, problem, "a new member could not be told that it is one: add it again");
        }
        Ok(AddedMember { address, name, node, before, problem })
    }

    /// What a host needs to find the pool's Consoles, and to trust them.
    fn file(&self, membership: &Membership) -> Result<JoinFile, AdminError> {
        let ca = membership.shared.trust_bundle();
        let der = pki::certificate_der(&ca).map_err(|error| AdminError::Refused(error.to_string()))?;
        let addresses = invitation::addresses(membership, self.status().node, self.config.https_port);
        // Nobody may ask with this token: it says which authority to trust.
        Ok(JoinFile { token: Token::new(&der).to_string(), addresses, ca, adopted: true })
    }
}

impl Guest {
    fn request(&self) -> Option<&Request> {
        match self {
            Self::New { request, .. } => Some(request),
            _ => None,
        }
    }

    fn met(&mut self) -> Option<(&Call, &mut Met)> {
        match self {
            Self::New { call, met, .. } | Self::Again { call, met, .. } => Some((&*call, met)),
            Self::Member { .. } => None,
        }
    }
}

/// Has all hosts keep themselves free.
async fn reserve(guests: &mut [Guest]) -> Result<(), AdminError> {
    for (call, met) in guests.iter_mut().filter_map(Guest::met) {
        let reserved = met.reserve().await;
        reserved.map_err(|error| AdminError::Refused(format!("{}: {error}", call.named)))?;
    }
    Ok(())
}

/// What to do about a host that nobody knows.
fn unproven(guest: &Guest) -> Option<String> {
    let (Guest::New { call, met, .. } | Guest::Again { call, met, .. }) = guest else { return None };
    let known = met.proven || call.expected.is_some();
    (!known).then(|| {
        format!(
            "{} ({}): the key there has the fingerprint {}: compare it with the one that the host shows (twistcli \
             clustered-db fingerprint, its log, its status page), and give it with the address",
            call.named, met.request.name, met.fingerprint
        )
    })
}

/// Where all hosts are, each once.
fn calls(wanted: &[NewMember], port: u16) -> Result<Vec<Call>, String> {
    if wanted.is_empty() || wanted.len() >= MOST {
        return Err(format!("name 1 to {} hosts", MOST - 1));
    }
    let mut calls: Vec<Call> = Vec::new();
    for NewMember { address, fingerprint } in wanted {
        let (host, port) = place_of(address, port)?;
        if calls.iter().any(|call| (&call.host, call.port) == (&host, port)) {
            return Err(format!("{address} is named twice"));
        }
        let expected = fingerprint.as_ref().map(|text| text.trim().to_ascii_uppercase());
        if let Some(text) = &expected
            && !is_fingerprint(text)
        {
            return Err(format!(
                "{text:.100} is no fingerprint: 32 pairs of hexadecimal digits with colons between them"
            ));
        }
        calls.push(Call { named: address.clone(), host, port, expected });
    }
    Ok(calls)
}

fn is_fingerprint(text: &str) -> bool {
    let pair = |pair: &str| pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
    text.split(':').count() == 32 && text.split(':').all(pair)
}

/// A host, with or without a port; an address of IPv6 that has one stands in brackets.
fn place_of(text: &str, usual: u16) -> Result<(String, u16), String> {
    let wrong = || format!("{text:.300} is no address: HOST, HOST:PORT or [IPv6]:PORT are allowed");
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(wrong)?)),
        None if text.matches(':').count() == 1 => {
            text.split_once(':').map(|(host, port)| (host, Some(port))).ok_or_else(wrong)?
        }
        None => (text, None),
    };
    let port = port.map_or(Ok(usual), |port| port.parse().map_err(|_| wrong()))?;
    check_host("host", host, port).map_err(|_| wrong())?;
    Ok((host.to_owned(), port))
}

/// Calls all hosts at once. The answers come in the order of the calls.
async fn call_all(caller: &Caller, calls: Vec<Call>) -> Vec<(Call, Result<Answered, MeetingError>)> {
    let mut under_way = JoinSet::new();
    for (place, call) in calls.into_iter().enumerate() {
        let caller = caller.clone();
        under_way.spawn(async move {
            let meeting = caller.meet(&call.host, call.port, call.expected.as_deref());
            let slow = || MeetingError::Unreachable("it takes too long to answer".to_owned());
            let met = timeout(CALL, meeting).await.unwrap_or_else(|_| Err(slow()));
            // At once: the time that others take is no difference of the clocks.
            let answered = met.map(|met| Answered { clock_ms: clock_ms(met.request.time_ms), met });
            (place, call, answered)
        });
    }
    let mut answers = under_way.join_all().await;
    answers.sort_by_key(|(place, ..)| *place);
    answers.into_iter().map(|(_, call, answered)| (call, answered)).collect()
}

/// What a host is to the pool; the error says why it cannot be added.
fn guest(
    membership: &Membership,
    call: Call,
    answer: Result<Answered, MeetingError>,
    now: u64,
) -> Result<Guest, String> {
    let there =
        membership.roster.members.iter().find(|member| (&member.address, member.port) == (&call.host, call.port));
    let Answered { met, clock_ms } = match (answer, there) {
        (Ok(answered), _) => answered,
        (Err(MeetingError::NotWaiting), Some(member)) => {
            return Ok(Guest::Member { node: member.id, call, missed: None });
        }
        (Err(error @ MeetingError::Unreachable(_)), Some(member)) => {
            return Ok(Guest::Member { node: member.id, call, missed: Some(error.to_string()) });
        }
        (Err(error), _) => return Err(format!("{}: {error}", call.named)),
    };
    if admission_of(membership, &met.fingerprint).is_some() {
        return Ok(Guest::Again { call, met });
    }
    if let Some(member) = there {
        return Err(format!(
            "{} is the address of the member {}, but another host waits there: remove that member first",
            call.named, member.name
        ));
    }
    let asked = JoinRequest { address: call.host.clone(), port: call.port, ..met.request.clone() };
    let fingerprint = sound(&asked).map_err(|why| format!("{}: {why}", call.named))?;
    let request = Request {
        id: format!("{:032x}", rand::random::<u128>()),
        name: asked.name,
        address: asked.address,
        port: asked.port,
        version: asked.version,
        level: asked.level.max(FIRST_LEVEL),
        fingerprint,
        csr: asked.csr,
        console_csr: asked.console_csr,
        console_names: asked.console_names,
        clock_ms,
        at: now,
        until: now + EXPIRES,
    };
    Ok(Guest::New { call, met, request: Box::new(request) })
}

/// Everything that is in the way of adding them, in sentences.
fn objections_to_all(membership: &Membership, guests: &[Guest]) -> Vec<String> {
    let (mut found, size) = (Vec::new(), membership.roster.size);
    let members = membership.roster.members.len();
    let new: Vec<&Request> = guests.iter().filter_map(Guest::request).collect();
    if members + new.len() > size.most {
        let (more, most) = (new.len(), size.most);
        found.push(format!("{members} members and {more} more are too many: a pool has {most} at most"));
    }
    for Request { name, version, level, clock_ms, .. } in &new {
        if *level < membership.shared.level {
            let needed = (membership.shared.level_version.as_str(), membership.shared.level);
            found.push(outdated(name, (version.as_str(), *level), needed));
        }
        found.extend(clock_objection(name, *clock_ms));
    }
    if !new.is_empty() {
        let learners = membership.learners().map(|node| membership.name(node));
        found.extend(learners.map(|name| {
            format!("{name} is still being brought up to date: wait until it is SECONDARY, or add it again if it waits")
        }));
    }
    let known = |guest: &Guest| matches!(guest, Guest::Member { missed: None, .. });
    if guests.iter().all(known) {
        let names = guests.iter().filter_map(|guest| match guest {
            Guest::Member { call, node, .. } => {
                Some(format!("{} is the member {} already", call.named, membership.name(*node)))
            }
            _ => None,
        });
        found.extend(names);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(address: &str) -> NewMember {
        NewMember { address: address.to_owned(), fingerprint: None }
    }

    #[test]
    fn a_host_is_named_with_or_without_its_port() {
        let place = |text: &str| place_of(text, 8086).ok();
        for (text, host, port) in [
            ("10.0.0.2", "10.0.0.2", 8086),
            ("host.example:9086", "host.example", 9086),
            ("2001:db8::1", "2001:db8::1", 8086),
            ("[2001:db8::1]", "2001:db8::1", 8086),
            ("[2001:db8::1]:9086", "2001:db8::1", 9086),
        ] {
            assert_eq!(place(text), Some((host.to_owned(), port)), "{text}");
        }
        for bad in ["", "https://a:8083", "a b", "a:0", "a:x", "a:99999", "[::1]x", "a/b", ":8086"] {
            assert_eq!(place(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_request_is_checked_before_anybody_is_called() {
        let why = |wanted: &[NewMember]| calls(wanted, 8086).err().unwrap_or_default();
        assert!(why(&[]).contains("1 to 6"));
        assert!(why(&vec![named("a"); 7]).contains("1 to 6"));
        assert_eq!(why(&[named("a"), named("b"), named("a:8086")]), "a:8086 is named twice");
        let print = ["ab"; 32].join(":");
        let with = |print: &str| NewMember { fingerprint: Some(print.to_owned()), ..named("a") };
        assert_eq!(calls(&[with(&print)], 8086).unwrap()[0].expected, Some(print.to_ascii_uppercase()));
        for bad in [&print[1..], "AB", "", &print.replace("ab", "xy")] {
            assert!(why(&[with(bad)]).contains("is no fingerprint"), "{bad}");
        }
    }
}
