//! What the daemons may say while they are harmed. Must never let a panic pass, nor an ERROR that no fault explains.

use std::collections::BTreeSet;

use crate::faults::Kind;

use Kind::*;

const DISKS: &[Kind] = &[DiskFull, DiskError, DiskHang, DiskSlow, DiskFreeze];
const FILES: &[Kind] = &[
    LogRemoved,
    LogEmptied,
    SegmentRemoved,
    OldLog,
    OldData,
    FlipLog,
    FlipDatabase,
    FlipSmall,
    DiskError,
    DiskFull,
    DiskHang,
    DiskFreeze,
];
/// What a frozen or slow process says when it comes back.
const FROZEN: &[Kind] = &[Stop, DiskHang, DiskSlow, DiskFreeze, DiskError];

/// Parts of lines with the level ERROR, and the faults that may cause them.
const EXPECTED: &[(&str, &[Kind])] = &[
    ("the database has fenced itself after a failure of its files on this host", DISKS),
    ("the database cannot be used for writing", DISKS),
    ("the first transaction of the database cannot be made", DISKS),
    ("this copy of the database is not applied to any further", FILES),
    ("the database file of this PRIMARY is damaged", &[FlipDatabase, DiskError]),
    ("the node ends itself: a restart begins from what is durable", FILES),
    ("the Console is not open", DISKS),
    ("the workload did not stop within", FROZEN),
    ("the port guard could not be told", FROZEN),
    ("the port guard process", FROZEN),
    ("cannot start: ", FILES),
    ("raft log", FILES),
    ("this node lost some of its durable memory", FILES),
    ("the disk of this host", DISKS),
    ("this node is REMOVED", &[Rejoin]),
    ("the database does not accept a statement of the Console", DISKS),
];

/// The lines of a log that must not be there after these faults: panics and errors.
pub fn odd_lines(log: &str, done: &BTreeSet<Kind>) -> (Vec<String>, Vec<String>) {
    let (mut panics, mut errors) = (Vec::new(), Vec::new());
    for line in log.lines() {
        if line.contains("panicked at") {
            panics.push(line.to_owned());
        } else if line.contains(" ERROR ") || line.starts_with("<3>") {
            let explains =
                |(part, kinds): &(&str, &[Kind])| line.contains(part) && kinds.iter().any(|kind| done.contains(kind));
            if !EXPECTED.iter().any(explains) {
                errors.push(line.to_owned());
            }
        }
    }
    (panics, errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_always_odd_and_errors_without_their_fault() {
        let log = "2026-01-01T00:00:00Z ERROR node: the Console is not open: x\n\
                   2026-01-01T00:00:00Z  WARN node: something\n\
                   2026-01-01T00:00:00Z ERROR node: something else\n\
                   thread 'consensus' panicked at src/x.rs:1:1:\n";
        let count = |done: &[Kind]| {
            let (panics, errors) = odd_lines(log, &done.iter().copied().collect());
            (panics.len(), errors.len())
        };
        assert_eq!(count(&[]), (1, 2));
        assert_eq!(count(&[Stop]), (1, 2));
        assert_eq!(count(&[DiskFull]), (1, 1));
    }
}
