//! The checks behind `/readyz`. Pure but for the node's certificate, which is read from its file. Must never name a
//! member or show anything that helps to become one.

use std::{fs, path::Path};

use serde::Serialize;

use super::Sources;
use crate::{
    clock::unix_time,
    cluster::Role,
    node::{CertificateStatus, Status},
    pki::{self, NODE_CERTIFICATE},
};

/// The loop turns once per tick; one that has not turned for this long does no work.
const TURNED_MS: u64 = 1_000;
/// Raft entries that a database may be behind: what a busy cluster commits in some seconds.
const LAG: u64 = 5_000;

/// One check and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub name: &'static str,
    pub ok: bool,
    pub detail: String,
}

fn check(name: &'static str, ok: bool, detail: String) -> Check {
    Check { name, ok, detail }
}

/// All checks, in the order in which a reader looks for the cause.
pub(super) fn all(sources: &Sources) -> Vec<Check> {
    let status = sources.status();
    let turned = sources.turned().map(|age| age.as_millis() as u64);
    let now = unix_time();
    let detail = turned.map_or("the node does not run yet".to_owned(), |ms| format!("turned {ms} ms ago"));
    let mut checks = vec![check("loop", turned.is_some_and(|ms| ms <= TURNED_MS), detail)];
    checks.extend(of_status(&status, sources.serves().is_some()));
    checks.extend(of_certificates(&sources.settings.certificates, &status, now));
    checks
}

/// What the status says. `serves`: the lease is valid and the Console's ports are open.
fn of_status(status: &Status, serves: bool) -> Vec<Check> {
    let role = match (status.role, status.primary) {
        (role @ (Role::Primary | Role::Secondary), Some(_)) => check("role", true, role.to_string()),
        (role, Some(_)) => check("role", false, format!("{role}: {}", status.reason)),
        (role, None) => check("role", false, format!("{role}, and no primary is known here")),
    };
    let mut checks = vec![role];
    if status.role == Role::Primary {
        let detail = if serves { "open" } else { "no valid lease, or the ports are not open" };
        checks.push(check("console", serves, detail.to_owned()));
    }
    let behind = status.committed.saturating_sub(status.applied);
    let own = status.members.iter().find(|member| member.id == status.node);
    let full = own.is_some_and(|member| member.full);
    let up = |state: Role| !matches!(state, Role::Down | Role::Unknown);
    let voters = status.members.iter().filter(|member| member.voter).count();
    let heard = status.members.iter().filter(|member| member.voter && up(member.state)).count();
    checks.push(check("database", behind <= LAG, format!("{behind} entries behind (allowed: {LAG})")));
    checks.push(check("disk", !full, if full { "full" } else { "not full" }.to_owned()));
    let needed = voters / 2 + 1;
    checks.push(check("peers", heard >= needed, format!("{heard} of {voters} voters heard, {needed} needed")));
    checks
}

/// Puts what is wrong with the disk into the checks: the status may not know it yet.
pub(super) fn with_disk(mut checks: Vec<Check>, trouble: Option<String>) -> Vec<Check> {
    if let Some(trouble) = trouble {
        checks.retain(|check| check.name != "disk");
        checks.push(check("disk", false, trouble));
    }
    checks
}

/// `certificates` and `clock`: a clock that is before the beginning of this node's certificate is wrong. For the
/// Console, the certificate that it serves is judged, wherever it is from.
fn of_certificates(folder: &Path, status: &Status, now: u64) -> [Check; 2] {
    let pem = fs::read_to_string(folder.join(NODE_CERTIFICATE)).ok();
    let node = pem.and_then(|pem| pki::certificate_validity(&pem).ok());
    let console = status.certificates.iter().find(|certificate| certificate.of == "console");
    let judge = |name: String, until: u64| match until.checked_sub(now) {
        Some(left @ 1..) => (true, format!("{name} is good for {} days", left / 86_400)),
        _ => (false, format!("{name} has expired")),
    };
    let judged = [
        match node {
            Some((_, until)) => judge(NODE_CERTIFICATE.to_owned(), until),
            None => (false, format!("{NODE_CERTIFICATE} cannot be read")),
        },
        match console {
            Some(CertificateStatus { source, info, .. }) => {
                judge(format!("what the Console serves ({})", source.word()), info.not_after)
            }
            None => (false, "what the Console serves is not known yet".to_owned()),
        },
    ];
    let clock = node.is_none_or(|(from, _)| now >= from);
    let told = if clock { "not before this node's certificate" } else { "before this node's certificate was made" };
    let good = judged.iter().all(|(good, _)| *good);
    let sentences = judged.map(|(_, sentence)| sentence).join(", ");
    [check("certificates", good, sentences), check("clock", clock, told.to_owned())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ClusterId;
    use crate::{node::CertificateSource, pki::Authority};

    fn status() -> Status {
        let member = |id, state| crate::node::MemberStatus {
            id,
            name: format!("secret-name-{id}"),
            address: format!("192.0.2.{id}:8086"),
            state,
            epoch: 3,
            applied: 120,
            lag: 0,
            lease_ms: None,
            last_contact_ms: Some(0),
            version: "0.1.0".into(),
            voter: true,
            sync: None,
            full: false,
            free: None,
            lag_bytes: None,
            level: 1,
            holds: Default::default(),
        };
        Status {
            cluster: ClusterId(1),
            node: 2,
            name: "secret-name-2".into(),
            version: "0.1.0".into(),
            role: Role::Secondary,
            reason: "follows".into(),
            epoch: 3,
            primary: Some(1),
            applied: 120,
            committed: 120,
            lease_ms: None,
            members: vec![member(1, Role::Primary), member(2, Role::Secondary), member(3, Role::Secondary)],
            membership: crate::cluster::Membership::founded(ClusterId(1), Vec::new()),
            warnings: Vec::new(),
            certificates: Vec::new(),
            serving: false,
            waiting: None,
            recent: Default::default(),
        }
    }

    fn failed(status: &Status, serves: bool) -> Vec<&'static str> {
        of_status(status, serves).into_iter().filter(|check| !check.ok).map(|check| check.name).collect()
    }

    #[test]
    fn each_trouble_fails_its_check_and_no_other() {
        let harm = |change: fn(&mut Status)| {
            let mut status = status();
            change(&mut status);
            failed(&status, false)
        };
        assert_eq!(harm(|_| ()), [""; 0]);
        assert_eq!(harm(|status| status.primary = None), ["role"]);
        assert_eq!(harm(|status| status.role = Role::Recovering), ["role"]);
        assert_eq!(harm(|status| status.committed += LAG + 1), ["database"]);
        assert_eq!(harm(|status| status.members[1].full = true), ["disk"]);
        assert_eq!(harm(|status| status.members[2].full = true), [""; 0], "the disk of another member");
        assert_eq!(harm(|status| status.members[2].state = Role::Down), [""; 0], "two of three are a majority");
        let alone = harm(|status| [0, 2].iter().for_each(|at| status.members[*at].state = Role::Down));
        assert_eq!(alone, ["peers"]);
        assert_eq!(harm(|status| status.role = Role::Primary), ["console"]);
        let primary = Status { role: Role::Primary, ..status() };
        assert_eq!(failed(&primary, true), [""; 0]);
    }

    #[test]
    fn a_disk_in_trouble_is_told_of_whatever_the_status_says() {
        let checks = with_disk(of_status(&status(), true), Some("it fails".to_owned()));
        let failed: Vec<_> = checks.iter().filter(|check| !check.ok).map(|check| &*check.detail).collect();
        assert_eq!(failed, ["it fails"]);
        assert_eq!(with_disk(of_status(&status(), true), None).len(), checks.len());
    }

    #[test]
    fn nothing_tells_who_the_members_are() {
        let text = serde_json::to_string(&of_status(&status(), true)).unwrap();
        assert!(!text.contains("secret-name") && !text.contains("192.0.2"), "{text}");
    }

    #[test]
    fn certificates_and_the_clock_are_judged_by_what_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let now = unix_time();
        let mut status = status();
        let judge = |status: &Status, now| of_certificates(folder.path(), status, now).map(|check| check.ok);
        assert_eq!(judge(&status, now), [false, true], "no certificates");
        let authority = Authority::create(ClusterId(1)).unwrap();
        authority.issue_node(2, "b", &[]).unwrap().save_node(folder.path()).unwrap();
        assert_eq!(judge(&status, now), [false, true], "nobody has looked at the Console's");
        let der = pki::certificate_der(&authority.issue_console(&["b.example"]).unwrap().cert_pem).unwrap();
        let info = pki::CertificateInfo::read(&der).unwrap();
        let served = CertificateStatus {
            of: "console".to_owned(),
            source: CertificateSource::Upload,
            missing: Vec::new(),
            info: pki::CertificateInfo { not_after: now + 9 * 86_400, ..info },
        };
        status.certificates = vec![served];
        assert_eq!(judge(&status, now), [true, true]);
        let [certificates, _] = of_certificates(folder.path(), &status, now + 8 * 86_400);
        assert!(
            certificates.detail.ends_with("what the Console serves (upload) is good for 1 days"),
            "{certificates:?}"
        );
        assert_eq!(
            judge(&status, now + 9 * 86_400),
            [false, true],
            "the node's own one is good, the served one is not"
        );
        assert_eq!(judge(&status, now + 20 * 365 * 86_400), [false, true]);
        assert_eq!(judge(&status, 0), [true, false]);
    }
}
