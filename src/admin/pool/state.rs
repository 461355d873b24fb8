//! The states of a pool's members, from our own: the one place where one becomes the other. Pure.

use crate::cluster::Role;

/// The word that `twistcli clustered-db status` and `stateStr` in the API have for a state.
///
/// | word | what we have then |
/// |---|---|
/// | `STARTUP` | the process starts: it reads its raft log, and does not vote yet; or its host waits to be added |
/// | `PRIMARY` | its Console's ports are open |
/// | `SECONDARY` | it replicates, and its ports are closed |
/// | `RECOVERING` | it brings its database back to a known state: after it was PRIMARY, or with a copy from another member |
/// | `STARTUP2` | it copies the database for the first time, and has no vote yet |
/// | `UNKNOWN` | the member that was asked has not heard of it since it started itself |
/// | `DOWN` | its process is gone, or it has not been heard of for a second |
/// | `ROLLBACK` | it drops transactions that no majority had |
/// | `REMOVED` | it is no longer a member: seen on its own host, and for a moment in the pool |
pub fn pool_state(role: Role) -> &'static str {
    match role {
        // A host that waits is no member yet, and serves nothing.
        Role::Waiting | Role::RequestJoin | Role::Startup => "STARTUP",
        Role::Startup2 => "STARTUP2",
        Role::Recovering => "RECOVERING",
        Role::Secondary => "SECONDARY",
        Role::Primary => "PRIMARY",
        Role::Rollback => "ROLLBACK",
        Role::Down => "DOWN",
        Role::Unknown => "UNKNOWN",
        Role::Removed => "REMOVED",
    }
}

/// True if a member with a vote in this state is one of the majority.
pub(super) fn counts(role: Role) -> bool {
    matches!(role, Role::Primary | Role::Secondary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_of_ours_has_its_word_and_every_word_its_state() {
        const ALL: [Role; 10] = [
            Role::RequestJoin,
            Role::Startup,
            Role::Startup2,
            Role::Recovering,
            Role::Secondary,
            Role::Primary,
            Role::Rollback,
            Role::Down,
            Role::Unknown,
            Role::Removed,
        ];
        let words: std::collections::BTreeSet<_> = ALL.into_iter().map(pool_state).collect();
        let expected =
            ["DOWN", "PRIMARY", "RECOVERING", "REMOVED", "ROLLBACK", "SECONDARY", "STARTUP", "STARTUP2", "UNKNOWN"];
        assert_eq!(words.into_iter().collect::<Vec<_>>(), expected, "those of the interface that we keep");
        for role in ALL {
            let same = pool_state(role) == role.to_string();
            assert!(same || role == Role::RequestJoin, "{role} has another word");
        }
        assert_eq!(ALL.into_iter().filter(|role| counts(*role)).count(), 2);
    }
}
