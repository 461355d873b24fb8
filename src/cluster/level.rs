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
//! | 3 | no program has it yet: memberships of more than 32 KiB ([`super::limits::LONG_MEMBERSHIPS`]), which a pool needs; a second database, and the catalogue of a service's databases |
//!
//! A new level is needed for everything that an older program would misread or drop: another field of the membership,
//! another kind of entry, another purpose of a connection that something hangs on. What is only shown to people needs
//! none.
//!
//! A second database is such a thing: a member of today's level takes an entry that names one for that of a newer
//! program. It applies nothing more then and serves nothing (`storage::databases`). A primary must not write one before
//! its level is in force.

use std::{env, sync::LazyLock};

const FEATURE_LEVEL: u32 = 2;
const PROGRAM_VERSION: &str = env!("CARGO_PKG_VERSION");
const NEXT_VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-next");

/// Set in the environment, it makes this program claim to be a version and a level ahead of itself, but only one with
/// debug assertions: the test of a rolling upgrade needs such a program, and building another takes minutes.
pub const CLAIM_NEXT: &str = "TWISTLOCK_CLAIM_NEXT_VERSION";

/// What this program can do.
pub fn feature_level() -> u32 {
    FEATURE_LEVEL + u32::from(claims_next())
}

/// Version of this program, as people see it.
pub fn program_version() -> &'static str {
    if claims_next() { NEXT_VERSION } else { PROGRAM_VERSION }
}

fn claims_next() -> bool {
    static CLAIMS: LazyLock<bool> = LazyLock::new(|| cfg!(debug_assertions) && env::var_os(CLAIM_NEXT).is_some());
    *CLAIMS
}

/// Version of the encoding of transactions that this program writes (`storage::transaction`).
pub const FORMAT_VERSION: u8 = 1;
/// The level of a program that does not report one.
pub const FIRST_LEVEL: u32 = 1;

/// What [`super::shared::Shared::level`] is when it is not written: that of clusters before levels were introduced.
pub(super) fn first() -> u32 {
    FIRST_LEVEL
}

pub(super) fn is_first(level: &u32) -> bool {
    *level == FIRST_LEVEL
}

/// Why a node with an older program may not take part, and what to do: the same words in log, status and refusals.
pub fn outdated(who: &str, (version, has): (&str, u32), (needed, level): (&str, u32)) -> String {
    format!(
        "{who} runs version {version}, which has feature level {has}, but the cluster runs level {level}: install version \
         {needed} or newer on that host and start it again; its data stay as they are"
    )
}
