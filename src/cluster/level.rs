//! Feature levels: what the programs of a cluster can do together. Owns the level of this program and the rule for each
//! change; must never let an older program serve a cluster whose members rely on what it does not have.
//!
//! The level in force is part of the membership ([`Shared::level`](super::shared::Shared::level)). Whoever is primary
//! raises it when the programs of all members have the next one; it is never lowered. Until then a member may go back
//! to the older program, afterwards not: it would not understand what the others write, and would forget it as a
//! primary.
//!
//! | level | what hangs on it |
//! |---|---|
//! | 1 | everything before levels were introduced |
//! | 2 | the cluster key and the certificate authority are replaced ([`super::shared::authority`]); webhooks; names and certificate of the Consoles |
//! | 3 | no program has it yet: memberships of more than 32 KiB ([`super::limits::LONG_MEMBERSHIPS`]), which a pool needs; a second database |
//!
//! A new level is needed for everything that an older program would misread or drop: another field of the membership,
//! another kind of entry, another purpose of a connection that something hangs on. What is only shown to people needs
//! none.
//!
//! A second database is such a thing: a member of today's level takes an entry that names one for that of a newer
//! program. It applies nothing more then and serves nothing (`storage::databases`). A primary must not write one before
//! its level is in force.

/// What this program can do.
///
/// The feature `next-version` exists for the test of a rolling upgrade only, which needs a program that is ahead of
/// this one.
pub const FEATURE_LEVEL: u32 = if cfg!(feature = "next-version") { 3 } else { 2 };
/// Version of this program, as people see it.
pub const PROGRAM_VERSION: &str = if cfg!(feature = "next-version") {
    concat!(env!("CARGO_PKG_VERSION"), "-next")
} else {
    env!("CARGO_PKG_VERSION")
};
/// Version of the encoding of transactions that this program writes (`storage::transaction`).
pub const FORMAT_VERSION: u8 = 1;
/// The level of a program that does not say one.
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
