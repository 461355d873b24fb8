//! What the cluster does step by step, as lines below the table: an upgrade, a new cluster key, a new authority.
//! Pure.

use super::quantity::date;
use crate::{
    node::{MemberStatus, Status},
    pki,
};

/// One line for each that is under way.
pub(super) fn lines(status: &Status) -> Vec<String> {
    upgrade(status).into_iter().chain(renewal(status)).collect()
}

/// The members run different programs, or programs that can do more than the cluster relies on.
fn upgrade(status: &Status) -> Option<String> {
    let known: Vec<&MemberStatus> = status.members.iter().filter(|member| !member.version.is_empty()).collect();
    let newest = known.iter().max_by_key(|member| (member.level, version(&member.version)))?;
    let all = status.members.len();
    let count = known.iter().filter(|member| member.version == newest.version).count();
    let level = status.membership.shared.level;
    let common = known.iter().map(|member| member.level).min()?;
    if count == known.len() && common <= level {
        return None;
    }
    let next = if newest.level > level {
        format!("{} when all members have it: until then a member may go back", newest.level)
    } else {
        "unchanged by it".to_owned()
    };
    Some(format!(
        "upgrade in progress: {count} of {all} members on version {}; feature level {level}, {next}",
        newest.version
    ))
}

/// Numbers are compared as numbers, so that 0.10.0 is above 0.9.0.
fn version(text: &str) -> Vec<(u64, String)> {
    text.split(['.', '-', '+']).map(|part| (part.parse().unwrap_or(0), part.to_owned())).collect()
}

fn renewal(status: &Status) -> Option<String> {
    let count = |ready: &dyn Fn(&MemberStatus) -> bool| {
        let ready = status.members.iter().filter(|member| ready(member)).count();
        format!("{ready} of {} members", status.members.len())
    };
    let membership = &status.membership;
    if let Some(rekey) = membership.shared.rekey {
        let have = match rekey.next {
            Some(id) => format!("{} have the new one", count(&|member| member.holds.key == id)),
            None => "the PRIMARY makes a new one".to_owned(),
        };
        return Some(format!("the cluster key is being replaced: {have}"));
    }
    if let Some(coming) = &membership.shared.coming {
        let id = pki::authority_id(&coming.authority.certificate).ok()?;
        let trust = count(&|member| member.holds.trusts == id);
        let from = pki::authority_made_at(&coming.authority.certificate).ok()?.saturating_add(coming.overlap);
        let from = date(from);
        return Some(format!(
            "the certificate authority is being replaced: {trust} trust the new one, which signs from {from} on"
        ));
    }
    membership.shared.retired.as_ref()?;
    let text = "the certificate authority is being replaced: the new one signs, and the old one is trusted until all members show \
                certificates of the new one";
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{shared::authority::KeyExchange, trust::KeyId},
        node::verdict::tests::healthy,
    };

    #[test]
    fn an_upgrade_is_shown_from_the_first_member_to_the_last() {
        let mut status = healthy();
        let level = status.membership.shared.level;
        assert_eq!(lines(&status), Vec::<String>::new());
        (status.members[1].version, status.members[1].level) = ("0.10.0".into(), level + 1);
        status.members[2].version = "0.9.0".into();
        let text = lines(&status).join("\n");
        let next = level + 1;
        let expected =
            format!("upgrade in progress: 1 of 3 members on version 0.10.0; feature level {level}, {next} when all");
        assert!(text.starts_with(&expected), "{text}");
        status.members.iter_mut().for_each(|member| (member.version, member.level) = ("0.10.0".into(), level + 1));
        assert!(lines(&status)[0].contains("3 of 3 members on version 0.10.0"), "the level is still to rise");
        status.membership.shared.level = level + 1;
        assert_eq!(lines(&status), Vec::<String>::new());
        status.members[0].version = "0.10.1".into();
        assert!(lines(&status)[0].ends_with(&format!("feature level {next}, unchanged by it")));
    }

    #[test]
    fn a_new_key_is_counted_member_by_member() {
        let mut status = healthy();
        status.membership.shared.rekey = Some(KeyExchange { next: None });
        assert!(lines(&status)[0].contains("makes a new one"));
        status.membership.shared.rekey = Some(KeyExchange { next: Some(KeyId(7)) });
        status.members[1].holds.key = KeyId(7);
        assert!(lines(&status)[0].contains("1 of 3 members have the new one"));
    }
}
