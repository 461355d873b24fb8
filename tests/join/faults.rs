//! Faults while the members change: disks that are gone, a primary that dies in the middle of APPLY or of a removal, a data
//! folder that lives twice, tokens that came too late, hosts that moved.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use twistlock_ha::{cluster::Role, control::Call};

use super::{
    host::{self, Founder, Host, wait_until},
    site::{Site, Writer},
};

/// The longest time without an acknowledged write that is no outage, on a busy machine.
const HICCUP: Duration = Duration::from_secs(3);
/// From a fault in a change of the members until all is well again.
const SETTLED: Duration = Duration::from_secs(60);

fn apply() -> Call {
    Call::post("high-availability/apply")
}

fn remove(host: &Host) -> Call {
    Call::delete(format!("high-availability/members/{}?force=false", host.name.clone()))
}

/// Polls as fast as it makes sense: what is waited for may last for milliseconds only.
fn catch(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < SETTLED, "waited too long until {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// The original primary's disk is gone, and a fourth host takes its place: one takeover, and nothing is lost.
#[test]
fn a_new_host_replaces_the_original_primary_whose_disk_is_gone() {
    let mut site = Site::complete();
    let mut fourth = site.founder.host(4);
    let writer = Writer::start(&site, &[&fourth]);
    site.host(0).wipe();
    writer.wait_more();
    let after = site.primary();
    assert_ne!(after, 0);
    let gone = remove(site.host(0));
    // The new primary may not have heard the other one yet, without which it must not remove anybody.
    wait_until("the removal is taken", || site.operate::<Value>(gone.clone()).is_ok());
    fourth.run_line(&site.line(), "");
    site.operate::<Value>(apply()).unwrap();
    site.joined.push(fourth);
    wait_until("the new host is SECONDARY", || site.joined[2].role() == Some(Role::Secondary));
    wait_until("three votes", || site.votes_and_requests() == Some((3, 0)));
    writer.wait_more();
    let account = writer.finish();
    println!("  takeover {:?}, longest pauses {:?}, {} writes", account.takeovers, account.pauses, account.tags.len());
    assert_eq!(account.hosts, [0, after], "more than one takeover: {:?}", account.takeovers);
    assert!(account.pauses[0] < HICCUP, "{:?}", account.pauses);
    let there = site.wait_whole();
    assert!(account.tags.iter().all(|tag| there.binary_search(tag).is_ok()), "an acknowledged write is lost");
}

/// When the primary dies, seen from the administrator who typed APPLY.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    /// The request is on its way.
    Sent,
    /// The newcomers are members without a vote.
    Learners,
    /// A newcomer knows that it is admitted and fetches the database.
    Fetching,
    /// The newcomers have just got their votes: several of them by a joint configuration, which may still be in force.
    Votes,
}

/// Has the primary die at this moment of an APPLY, starts it again, and waits until the cluster is whole. `newcomer` is one of
/// the hosts that ask.
fn kill_in_apply(site: &mut Site, newcomer: usize, moment: Moment) {
    let primary = site.primary();
    let before = site.host(primary).said().len();
    let sent = site.host(primary).send(apply());
    match moment {
        Moment::Sent => {}
        Moment::Learners => catch("there are learners", || {
            site.host(primary).status().is_some_and(|status| status.members.iter().any(|member| !member.voter))
        }),
        Moment::Fetching => {
            catch("the newcomer fetches", || site.host(newcomer).role() == Some(Role::Startup2));
        }
        Moment::Votes => catch("the newcomers vote", || {
            let said = site.host(primary).said();
            let mut changes = said[before..].lines().filter(|line| line.contains("the voters change"));
            changes.any(|line| line.ends_with("learners=[]"))
        }),
    }
    site.host(primary).kill();
    drop(sent);
    let begin = Instant::now();
    site.host(primary).start();
    let (mut seen, mut again) = (None, 0);
    catch("three votes", || {
        let now = site.votes_and_requests();
        seen = seen.or(now);
        match now {
            Some((3, 0)) => true,
            // It did not come about, and can be done once more.
            Some((_, 1..)) => {
                again += u32::from(site.operate::<Value>(apply()).is_ok());
                false
            }
            _ => false,
        }
    });
    site.wait_whole();
    println!(
        "  killed at {moment:?}: then votes and requests {seen:?}, {again} more APPLY, whole after {:?}",
        begin.elapsed()
    );
    assert!(again <= 1);
    assert!(moment == Moment::Sent || again == 0, "an admission that others have seen was forgotten");
}

fn kill_in_first_apply(moment: Moment) {
    let mut site = Site::asking();
    kill_in_apply(&mut site, 1, moment);
}

#[test]
fn a_founder_that_dies_when_apply_was_sent() {
    kill_in_first_apply(Moment::Sent);
}

#[test]
fn a_founder_that_dies_when_it_has_learners() {
    kill_in_first_apply(Moment::Learners);
}

#[test]
fn a_founder_that_dies_while_the_newcomers_fetch() {
    kill_in_first_apply(Moment::Fetching);
}

#[test]
fn a_founder_that_dies_when_the_newcomers_get_their_votes() {
    kill_in_first_apply(Moment::Votes);
}

/// One of the two that have joined, not the PRIMARY.
fn leaver(site: &Site) -> usize {
    if site.primary() == 2 { 1 } else { 2 }
}

/// A member is replaced, and the primary dies at every step of the APPLY for it.
#[test]
fn a_primary_that_dies_while_a_member_is_replaced() {
    let mut site = Site::complete();
    for moment in [Moment::Sent, Moment::Learners, Moment::Fetching, Moment::Votes] {
        let leaver = leaver(&site);
        let gone = remove(site.host(leaver));
        site.operate::<Value>(gone).unwrap();
        wait_until("the removed host knows it", || site.host(leaver).role() == Some(Role::Removed));
        let line = site.line();
        site.host(leaver).run_line(&line, "");
        kill_in_apply(&mut site, leaver, moment);
    }
}

/// The primary dies when a removal was sent, or when it is in force: the member is gone or there, and a second removal works.
#[test]
fn a_primary_that_dies_while_a_member_is_removed() {
    let mut site = Site::complete();
    for in_force in [false, true] {
        let (primary, leaver) = (site.primary(), leaver(&site));
        let gone = remove(site.host(leaver));
        let sent = site.host(primary).send(gone.clone());
        if in_force {
            catch("the removal is in force", || {
                site.host(primary).status().is_some_and(|status| status.membership.roster.members.len() == 2)
            });
        }
        site.host(primary).kill();
        drop(sent);
        site.host(primary).start();
        let rest = site.host(3 - leaver).name.clone();
        let (begin, mut again) = (Instant::now(), 0);
        catch("the member is removed", || {
            if site.primary() == leaver {
                // It has taken over: the removal was never heard of.
                let away = Call::post("high-availability/switchover").with(json!({ "to": rest.clone() }));
                let _ = site.operate::<Value>(away);
                return false;
            }
            match site.operate::<Value>(gone.clone()) {
                Ok(_) => again += 1,
                Err(why) => return why.contains("there is no member"),
            }
            false
        });
        println!("  killed with the removal in force: {in_force}; removed with {again} more in {:?}", begin.elapsed());
        assert!(again <= 1 && (again == 0 || !in_force), "a removal in force was forgotten");
        is_kept_out(&mut site, leaver);
        let line = site.line();
        site.host(leaver).run_line(&line, "");
        site.operate::<Value>(apply()).unwrap();
        site.wait_whole();
    }
}

/// The host that was removed says so and why, also after a start, and nobody lets it in.
fn is_kept_out(site: &mut Site, leaver: usize) {
    for restart in [false, true] {
        if restart {
            site.host(leaver).kill();
            site.host(leaver).start();
        }
        wait_until("the host shows REMOVED", || site.host(leaver).role() == Some(Role::Removed));
        let status = site.host(leaver).status().unwrap();
        assert!(status.reason.contains("removed from the cluster"), "{}", status.reason);
        assert!(status.reason.contains("run the join script"), "{}", status.reason);
    }
    let id = site.host(leaver).status().unwrap().node;
    let refusal = format!("node {id} ({}) was removed from the cluster at", site.host(leaver).name);
    wait_until("a member refuses it", || {
        let others = (0..3).filter(|index| *index != leaver);
        others.into_iter().any(|index| site.host(index).said().contains(&refusal))
    });
}

/// A data folder that was copied to another host: the cluster says so and goes on; with one of the two stopped all is well.
#[test]
fn a_data_folder_that_lives_twice() {
    let mut site = Site::complete();
    let mut copy = site.founder.host(4);
    let third = leaver(&site);
    site.host(third).end();
    site.host(third).copy_to(&copy);
    site.host(third).start();
    site.wait_whole();
    let (primary, writer) = (site.primary(), Writer::start(&site, &[&copy]));
    let epoch = site.host(primary).status().unwrap().epoch;
    copy.start();
    wait_until("the duplicate identity is seen", || {
        let warnings = |index| site.host(index).status().map(|status| status.warnings).unwrap_or_default();
        [0, 1].into_iter().flat_map(warnings).any(|warning| warning.contains("two processes use the identity of"))
    });
    writer.wait_more();
    let status = site.host(primary).status().unwrap();
    assert_eq!((status.role, status.epoch), (Role::Primary, epoch));
    assert_ne!(copy.role(), Some(Role::Primary));
    copy.kill();
    writer.wait_more();
    let account = writer.finish();
    assert_eq!(account.hosts, [primary]);
    assert!(account.pauses[0] < HICCUP, "{:?}", account.pauses);
    let there = site.wait_whole();
    assert!(account.tags.iter().all(|tag| there.binary_search(tag).is_ok()), "an acknowledged write is lost");
}

/// A token that came too late lets nobody in, whatever it is used for; a new one does.
#[test]
fn a_token_that_has_expired() {
    let founder = Founder::start();
    let invite = |valid| {
        let call = Call::get(format!("high-availability/join-script?validSec={valid}"));
        founder.host.operate::<Value>(call)
    };
    let mut second = founder.host(2);
    assert!(invite(0).unwrap_err().contains("one second"));
    let line = invite(1).unwrap()["line"].as_str().unwrap().to_owned();
    let token = host::token_of(&line);
    wait_until("the token has expired", || founder.get_as(&token, "/scripts/console.sh").0 == 403);
    let refused = founder.post_as(&token, "/high-availability/requests", second.request(), 403);
    assert!(refused["err"].as_str().unwrap().contains("has expired"), "{refused}");
    let said = second.fails_to_run_line(&line);
    assert!(said.contains("has expired") && said.contains("ha join-script") && !second.data().exists(), "{said}");
    let line = founder.line();
    founder.host.operate::<Value>(Call::delete("high-availability/join-script")).unwrap();
    let said = second.fails_to_run_line(&line);
    assert!(said.contains("any more") && !second.data().exists(), "{said}");
    assert_eq!(founder.status()["membership"]["requests"], Value::Null);
    let line = founder.line();
    assert_eq!(founder.get_as(&host::token_of(&line), "/scripts/console.sh").0, 200, "a new one is good at once");
    second.run_line(&line, "");
    assert_eq!(second.role(), Some(Role::RequestJoin));
}

/// A member that is down gets another address, and comes back there.
#[test]
fn a_member_that_comes_back_at_another_address() {
    let mut site = Site::complete();
    let elsewhere = site.founder.host(4).address;
    let mover = leaver(&site);
    site.host(mover).end();
    let node = site.host(mover).name.clone();
    let address = Some(elsewhere.to_string());
    site.operate::<Value>(
        Call::put(format!("high-availability/members/{node}/address")).with(json!({ "address": address })),
    )
    .unwrap();
    site.host(mover).move_to(elsewhere);
    site.host(mover).start();
    wait_until("it is SECONDARY again", || site.host(mover).role() == Some(Role::Secondary));
    site.wait_whole();
    // It can take over there, too: its Console's certificate is good for the new address.
    let to = Some(site.host(mover).name.clone());
    wait_until("the switchover is taken", || {
        site.operate::<Value>(Call::post("high-availability/switchover").with(json!({ "to": to.clone() }))).is_ok()
    });
    wait_until("it is PRIMARY", || site.host(mover).role() == Some(Role::Primary));
    site.wait_whole();
}
