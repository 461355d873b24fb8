//! Feature levels: what the programs of a cluster can do together. Owns the level of this program and the rule for each
//! change; must never let an older program serve a cluster whose members rely on what it does not have.
//!
//! The level in force is part of the membership ([`Shared::level`](super::shared::Shared::level)). Whoever is primary
//! raises it when the programs of all members have the next one; it is never lowered. Until then a member may go back
//! to the older program; afterwards it may not: it would not understand what the others write, and as a primary it
//! would drop it.
//!
//! | level | what depends on it |
//! |---|---|
//! | 1 | everything before levels were introduced |
//! | 2 | the cluster key and the certificate authority are replaced ([`super::shared::authority`]); webhooks; names and certificate of the Consoles |
//! | 3 | what pools share ([`super::shared::pool`]): the load balancer's address, the version of the database; memberships of more than 32 KiB ([`super::limits::LONG_MEMBERSHIPS`]) |
//! | 4 | databases of a service, and the catalogue of them ([`SERVICES`]) |
//!
//! A new level is needed for everything that an older program would misread or drop: another field of the membership,
//! another kind of entry, another purpose of a connection that something hangs on. What is only shown to people needs
//! none.
//!
//! A second database is such a thing: a member of level 3 takes an entry that names one for that of a newer program. It
//! applies nothing more then and serves nothing (`storage::databases`). A primary must not write one before its level
//! is in force.

use std::{env, sync::LazyLock};

const FEATURE_LEVEL: u32 = 4;
const PROGRAM_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Set in the environment, it makes this program claim to be a version and a level ahead of itself, but only one with
/// debug assertions: the test of a rolling upgrade needs such a program, and building another takes minutes.
pub const CLAIM_NEXT: &str = "TWISTLOCK_CLAIM_NEXT_VERSION";

/// What this program can do.
pub fn feature_level() -> u32 {
    FEATURE_LEVEL + u32::from(claims_next())
}

/// Version of this program, as people see it.
pub fn program_version() -> &'static str {
    static NEXT_VERSION: LazyLock<String> = LazyLock::new(|| {
        let [major, minor, patch] = numbers(PROGRAM_VERSION).unwrap_or_default();
        format!("{major}.{minor}.{}", patch + 1)
    });
    if claims_next() { &NEXT_VERSION } else { PROGRAM_VERSION }
}

/// True if a version `x.y.z` is older than another one; what follows the third number does not count. Nothing is older
/// than a text that is no version, and such a text is never older.
pub fn is_older(version: &str, than: &str) -> bool {
    numbers(version).zip(numbers(than)).is_some_and(|(version, than)| version < than)
}

fn numbers(version: &str) -> Option<[u64; 3]> {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    let mut parts = version[..end].trim_end_matches('.').split('.').map(|part| part.parse().ok());
    let numbers = [parts.next()??, parts.next().unwrap_or(Some(0))?, parts.next().unwrap_or(Some(0))?];
    parts.next().is_none().then_some(numbers)
}

fn claims_next() -> bool {
    static CLAIMS: LazyLock<bool> = LazyLock::new(|| cfg!(debug_assertions) && env::var_os(CLAIM_NEXT).is_some());
    *CLAIMS
}

/// Version of the encoding of transactions that this program writes (`storage::transaction`).
pub const FORMAT_VERSION: u8 = 1;
/// The level from which on the members of a pool share what only pools have.
pub const POOLS: u32 = 3;
/// The level from which on a service may have databases.
pub const SERVICES: u32 = 4;
/// The level of a program that does not report one.
pub const FIRST_LEVEL: u32 = 1;

/// What [`super::shared::Shared::level`] is when it is not written: that of clusters before levels were introduced.
pub(super) fn first() -> u32 {
    FIRST_LEVEL
}

pub(super) fn is_first(level: &u32) -> bool {
    *level == FIRST_LEVEL
}

/// Why a member with an older program is not elected in a pool, and what to do: the same words in log, status and
/// refusals.
pub fn behind_pool(who: &str, version: &str, needed: &str) -> String {
    format!(
        "{who} runs version {version}, and version {needed} was PRIMARY of the pool: it replicates and votes, but does not \
         become PRIMARY before version {needed} or newer is installed there"
    )
}

/// Why a service cannot have a database yet, and what to do. `older` names the members whose programs do not have the
/// level, or that are away.
pub fn lacks_services(level: u32, older: &[&str]) -> String {
    let what = match older {
        [] => "all members have it: it is raised within seconds, so try again".to_owned(),
        names => format!("upgrade {} (or start it again, if it is away)", names.join(", ")),
    };
    format!("a database of a service needs feature level {SERVICES}, and the cluster runs level {level}: {what}")
}

/// Why a node with an older program may not take part, and what to do: the same words in log, status and refusals.
pub fn outdated(who: &str, (version, has): (&str, u32), (needed, level): (&str, u32)) -> String {
    format!(
        "{who} runs version {version}, which has feature level {has}, but the cluster runs level {level}: install version \
         {needed} or newer on that host and start it again; its data stay as they are"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_service_up_is_named() {
        let sentence = lacks_services(3, &["host2", "host3"]);
        assert!(sentence.contains("level 3: upgrade host2, host3 (or"), "{sentence}");
        assert!(lacks_services(3, &[]).contains("try again"));
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        for (older, newer) in [("0.1.0", "0.1.1"), ("0.9.9", "0.10.0"), ("0.1.0-rc1", "0.2.0"), ("1.2", "1.2.1")] {
            assert!(is_older(older, newer) && !is_older(newer, older), "{older} {newer}");
        }
        for (one, other) in [("0.1.0", "0.1.0"), ("0.1.0-a", "0.1.0"), ("", "0.1.0"), ("0.1.0", ""), ("x", "1.0.0")] {
            assert!(!is_older(one, other) && !is_older(other, one), "{one:?} {other:?}");
        }
    }
}
