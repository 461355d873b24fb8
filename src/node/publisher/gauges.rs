//! The gauges that follow from a status. Must never hold the loop up.

use std::{collections::BTreeSet, sync::Mutex};

use crate::{cluster::Role, mutex::locked, node::Status, telemetry};

/// Sets the gauges that follow from this status.
pub(super) fn show(status: &Status) {
    metrics::gauge!(telemetry::EPOCH).set(status.epoch as f64);
    metrics::gauge!(telemetry::APPLIED_INDEX).set(status.applied as f64);
    metrics::gauge!(telemetry::COMMITTED_INDEX).set(status.committed as f64);
    metrics::gauge!(telemetry::PRIMARY).set(flag(status.role == Role::Primary));
    metrics::gauge!(telemetry::LEASE_REMAINING).set(status.lease_ms.unwrap_or(0) as f64 / 1e3);
    metrics::gauge!(telemetry::WARNINGS).set(status.warnings.len() as f64);
    metrics::gauge!(telemetry::BUILD_INFO, "version" => status.version.clone()).set(1.0);
    for word in telemetry::ROLES {
        metrics::gauge!(telemetry::ROLE, "role" => *word).set(flag(status.role.to_string() == *word));
    }
    forget_the_gone(status);
    for member in &status.members {
        let name = || member.name.clone();
        metrics::gauge!(telemetry::MEMBER_LAG, "member" => name()).set(member.lag as f64);
        if let Some(bytes) = member.lag_bytes {
            metrics::gauge!(telemetry::MEMBER_LAG_BYTES, "member" => name()).set(bytes as f64);
        }
        let up = !matches!(member.state, Role::Down | Role::Unknown);
        metrics::gauge!(telemetry::MEMBER_UP, "member" => name()).set(flag(up));
        if let Some(ms) = member.last_contact_ms {
            metrics::gauge!(telemetry::MEMBER_CONTACT, "member" => name()).set(ms as f64 / 1e3);
        }
    }
}

/// A gauge stays once it was set. Those of a member that is gone are set to NaN, which raises no alert.
fn forget_the_gone(status: &Status) {
    static SHOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut shown = locked(&SHOWN);
    let now: BTreeSet<String> = status.members.iter().map(|member| member.name.clone()).collect();
    for gone in shown.difference(&now) {
        for name in [
            telemetry::MEMBER_LAG,
            telemetry::MEMBER_LAG_BYTES,
            telemetry::MEMBER_UP,
            telemetry::MEMBER_CONTACT,
            telemetry::PEER_DATAGRAMS_UNHEARD,
        ] {
            metrics::gauge!(name, "member" => gone.clone()).set(f64::NAN);
        }
    }
    *shown = now;
}

/// A condition as the value of a gauge: 1 while it holds, otherwise 0.
pub(in crate::node) fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_is_a_state_set_of_all_words() {
        use Role::{
            Down, Primary, Recovering, Removed, RequestJoin, Rollback, Secondary, Startup, Startup2, Unknown, Waiting,
        };
        let all =
            [Waiting, RequestJoin, Startup, Startup2, Recovering, Secondary, Primary, Rollback, Down, Unknown, Removed];
        assert_eq!(all.map(|role| role.to_string()).as_slice(), telemetry::ROLES);
    }
}
