//! The commands that change the cluster: what they show before, ask, and say afterwards. Each is one operation of the
//! daemon. Must never decide whether something may be done.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

use super::{
    args::{ApplyArgs, JoinScriptArgs, RemoveArgs, RotateCaArgs, SetAddressArgs, SwitchoverArgs},
    catch_up,
    client::ApiClient,
    columns::{self, Paint, print_json, say},
    handover, next,
    quantity::{clock, date, duration},
    remote::segment,
    stop::{EX_TEMPFAIL, Stop, confirm},
};
use crate::{
    admin::SwitchoverReport,
    clock::unix_time,
    cluster::{NodeId, shared::Request},
    console::cluster::{Admitted, Approval, Gone, Overlap, Pause, Paused, Place, Switchover},
    control::Call,
    node::{MemberStatus, Status},
};

/// What is shown of an invitation.
#[derive(Serialize, Deserialize)]
struct JoinScript {
    line: String,
    script: Option<String>,
    until: u64,
}

/// Prints the line, or the script, that makes a host ask for admission.
pub(super) fn join_script(client: &ApiClient, args: &JoinScriptArgs) -> Result<(), Stop> {
    let (valid, script) = (args.valid.as_secs(), if args.script { " --script" } else { "" });
    let span = if valid == 3600 { String::new() } else { format!(" --valid {valid}s") };
    client.primary(&format!("twistcli ha join-script{span}{script}"))?;
    let path = format!("high-availability/join-script?validSec={valid}&script={}", args.script);
    let answer: JoinScript = client.call(&Call::get(path))?;
    if args.json {
        return print_json(&answer);
    }
    let until = date(answer.until);
    match &answer.script {
        Some(script) if args.script => {
            columns::print(script)?;
            eprintln!("Run this script as root on each host that is to join.");
        }
        _ => {
            eprintln!("Run this line on each host that is to join:\n");
            columns::print(&format!("{}\n", answer.line))?;
            eprintln!();
        }
    }
    eprintln!("It is valid until {until}, but only until the hosts are admitted (twistcli ha apply).");
    eprintln!("It carries a secret: whoever has it may ask to join. To take it back: twistcli ha revoke");
    eprintln!("Next, when all hosts show REQUEST_JOIN in `twistcli ha status`: twistcli ha apply");
    Ok(())
}

/// Admits the hosts that ask, and waits until all members are up.
pub(super) fn apply(client: &ApiClient, args: &ApplyArgs) -> Result<(), Stop> {
    let status = client.primary("twistcli ha apply")?;
    let requests = &status.membership.shared.requests;
    if requests.is_empty() {
        let mut text = "no host asks to join".to_owned();
        next::steps(&status, unix_time()).iter().for_each(|step| text.push_str(&format!("\n  {step}")));
        return Err(Stop::refuse(&text));
    }
    eprintln!("{} to join {}:\n", ask(requests.len()), cluster_of(&status));
    requests.iter().for_each(|request| eprint!("{}", describe(request)));
    eprintln!("\nEach fingerprint must be the one that the join script showed on that host.");
    confirm("Admit them?", args.yes)?;
    let fingerprints = Some(requests.iter().map(|request| request.fingerprint.clone()).collect());
    let call = Call::post("high-availability/apply").with(Approval { fingerprints });
    let Admitted { admitted } = client.call(&call)?;
    let names: Vec<&str> = requests.iter().map(|request| request.name.as_str()).collect();
    say(&format!("Admitted: {} (node {}).", names.join(", "), list(&admitted)))?;
    if args.no_wait {
        eprintln!("Next: twistcli ha status --watch");
        return Ok(());
    }
    catch_up::wait(client, args.wait, false)
}

/// "2 hosts ask".
fn ask(count: usize) -> String {
    if count == 1 { "1 host asks".to_owned() } else { format!("{count} hosts ask") }
}

fn list(ids: &[NodeId]) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

fn cluster_of(status: &Status) -> String {
    let names: Vec<&str> = status.membership.roster.members.iter().map(|member| member.name.as_str()).collect();
    format!("the cluster of {}", names.join(", "))
}

/// A host that asks, as the administrator compares it.
fn describe(request: &Request) -> String {
    format!(
        "  {} ({}), version {}, clock {}\n    fingerprint {}\n",
        request.name,
        request.place(),
        request.version,
        clock(request.clock_ms),
        request.fingerprint
    )
}

/// Removes a member.
pub(super) fn remove(client: &ApiClient, args: &RemoveArgs) -> Result<(), Stop> {
    let force = if args.force { " --force" } else { "" };
    let status = client.primary(&format!("twistcli ha remove {}{force}", args.node))?;
    // Only to explain: the daemon decides which member a name means, and may refuse.
    let named = |member: &&MemberStatus| member.name == args.node || member.id.to_string() == args.node;
    if let Some(member) = status.members.iter().find(named) {
        eprint!("{}", consequences(member, &status, args.force));
    }
    confirm(&format!("Remove {}?", args.node), args.yes)?;
    let path = format!("{}?force={}", member(&args.node), args.force);
    let Gone { warning } = client.call(&Call::delete(path))?;
    say(&format!("{} is removed.", args.node))?;
    if let Some(warning) = warning {
        eprintln!("Warning: {}", columns::harmless(&warning));
    }
    match status.membership.roster.size.is_pool() {
        true => {
            eprintln!("Next: twistcli clustered-db add --member-address ADDRESS, for the host that takes its place")
        }
        false => eprintln!("Next: twistcli ha join-script, and run its line on the host that takes its place"),
    }
    Ok(())
}

/// The path of a member.
fn member(node: &str) -> String {
    format!("high-availability/members/{}", segment(node))
}

fn consequences(member: &MemberStatus, status: &Status, force: bool) -> String {
    let mut text = format!(
        "{} ({}) is {}. Once removed, it has no vote, its certificate is refused for good, and it stops serving.\n\
         Its data stays on its disk.{}\n",
        member.name,
        member.address,
        member.state,
        match status.membership.roster.size.is_pool() {
            true => " To bring it back, set them aside and add it again.",
            false => " To bring it back, run the join script on it again.",
        }
    );
    let (left, size) = (status.members.len() - 1, status.membership.roster.size);
    if size.missing(left) > 0 {
        text.push_str(&format!(
            "{left} of {size} members remain: {}\n",
            if left == 2 { "both must be up for the Console to be served." } else { "no failure is tolerated then." }
        ));
    }
    if force {
        text.push_str(
            "--force: it is removed even if no majority of the remaining members answers. Nobody serves then until enough \
             of them are back.\n",
        );
    }
    text
}

/// Hands the role over, or only checks whether it could be.
pub(super) fn switchover(client: &ApiClient, args: &SwitchoverArgs, paint: Paint) -> Result<(), Stop> {
    let (to, dry_run) = (option("to", args.to.as_ref()), if args.dry_run { " --dry-run" } else { "" });
    let status = client.primary(&format!("twistcli ha switchover{to}{dry_run}"))?;
    let report: SwitchoverReport = match client {
        ApiClient::Local(_) => {
            let wanted = Switchover { to: args.to.clone(), dry_run: args.dry_run };
            client.call(&handover::switchover_to(wanted))?
        }
        ApiClient::Remote(remote) => handover::switchover(client, remote, &status, args.to.as_deref(), args.dry_run)?,
    };
    let possible = report.checks.iter().all(|check| check.ok);
    if args.json {
        print_json(&report)?;
    } else {
        columns::print(&describe_switchover(&report, args.dry_run, paint))?;
        if report.gap_ms.is_some() {
            let there = if matches!(client, ApiClient::Local(_)) { "on that host, " } else { "" };
            eprintln!("Next, to bring it back: {there}twistcli ha switchover --to {}", status.name);
        }
    }
    if possible { Ok(()) } else { Err(Stop::Told(EX_TEMPFAIL)) }
}

fn describe_switchover(report: &SwitchoverReport, dry_run: bool, paint: Paint) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let detail = if check.detail.is_empty() { String::new() } else { format!(": {}", check.detail) };
        text.push_str(&format!("{} {}{detail}\n", paint.mark(check.ok), check.name));
    }
    let to = report.to.as_deref().unwrap_or("another member");
    text.push_str(&match (report.checks.iter().all(|check| check.ok), dry_run, report.gap_ms) {
        (false, ..) => "The role stays where it is: see what is marked above.\n".to_owned(),
        (true, true, _) => format!("{to} can take the role. Nothing was changed.\n"),
        (true, false, Some(gap)) => format!("{to} is PRIMARY. Nobody could write for {gap:.1} ms.\n"),
        (true, false, None) => format!("The role goes to {to}. See: twistcli ha status\n"),
    });
    text
}

/// Suspends automatic takeover for a while.
pub(super) fn pause(client: &ApiClient, seconds: u64) -> Result<(), Stop> {
    let status = client.primary(&format!("twistcli ha pause --for {seconds}s"))?;
    let span = Pause { minutes: None, seconds: Some(u32::try_from(seconds).unwrap_or(u32::MAX)) };
    let Paused { until } = client.call(&Call::post("high-availability/pause").with(span))?;
    say(&format!("PAUSED until {}: nobody takes over if {} fails meanwhile.", date(until), status.name))?;
    eprintln!("Next, when the maintenance is done: twistcli ha resume");
    Ok(())
}

/// Replaces the certificate authority.
pub(super) fn rotate_ca(client: &ApiClient, args: &RotateCaArgs) -> Result<(), Stop> {
    let overlap = args.overlap.as_secs();
    let command = format!("rotate-ca --overlap {overlap}s");
    client.primary(&format!("twistcli ha {command}"))?;
    eprintln!(
        "All certificates of nodes and Consoles will be reissued, and join scripts that were given out will stop working."
    );
    eprintln!(
        "Clients that know the old CA need the new one within {}, when it begins to sign: certificates/ca.pem of each member \
         has both until then.",
        duration(args.overlap.as_millis() as u64)
    );
    confirm("Replace the certificate authority?", args.yes)?;
    let overlap = Overlap { overlap_sec: u32::try_from(overlap).unwrap_or(u32::MAX) };
    simple(
        client,
        &command,
        &Call::post("high-availability/rotate-ca").with(overlap),
        "The members trust the new authority now. It signs when the overlap is over. See: twistcli ha status",
    )
}

/// Gives a member another address.
pub(super) fn set_address(client: &ApiClient, args: &SetAddressArgs) -> Result<(), Stop> {
    let (to, port) = (option("to", args.to.as_ref()), option("port", args.port.as_ref()));
    let command = format!("set-address {}{to}{port}{}", args.node, option("name", args.name.as_ref()));
    let place = Place { name: args.name.clone(), address: args.to.clone(), port: args.port };
    let call = Call::put(format!("{}/address", member(&args.node))).with(place);
    simple(client, &command, &call, "The members dial the new address from now on. See: twistcli ha status")
}

/// Turns a host down that asks to join.
pub(super) fn reject(client: &ApiClient, host: &str) -> Result<(), Stop> {
    let call = Call::delete(format!("high-availability/requests/{}", segment(host)));
    simple(client, &format!("reject {host}"), &call, &format!("{host} is turned down."))
}

/// An option of a command that is to be run elsewhere.
fn option(name: &str, value: Option<&impl Display>) -> String {
    value.map_or_else(String::new, |value| format!(" --{name} {value}"))
}

/// Carries out an operation that answers nothing. `command` is what follows `twistcli ha`.
pub(super) fn simple(client: &ApiClient, command: &str, call: &Call, done: &str) -> Result<(), Stop> {
    client.primary(&format!("twistcli ha {command}"))?;
    client.have_done(call)?;
    say(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin::Check, cluster::Role, node::verdict::tests::healthy};

    #[test]
    fn a_removal_is_explained_before_it_is_asked_for() {
        let mut status = healthy();
        status.members[2].state = Role::Down;
        let text = consequences(&status.members[2], &status, false);
        assert!(text.starts_with("node3 (127.0.0.3:8086) is DOWN. Once removed, it has no vote"), "{text}");
        assert!(text.contains("2 of 3 members remain: both must be up"), "{text}");
        assert!(!text.contains("--force"), "{text}");
        assert!(consequences(&status.members[2], &status, true).contains("--force: it is removed even if"));
    }

    #[test]
    fn each_check_of_a_switchover_is_shown() {
        let check = |name: &str, ok, detail: &str| Check { name: name.into(), ok, detail: detail.into() };
        let mut report = SwitchoverReport {
            checks: vec![check("node2 is up", true, ""), check("caught up", false, "9 entries behind")],
            to: Some("node2".into()),
            gap_ms: None,
        };
        let text = describe_switchover(&report, true, Paint(false));
        assert_eq!(
            text,
            "✓ node2 is up\n✗ caught up: 9 entries behind\nThe role stays where it is: see what is marked above.\n"
        );
        report.checks[1].ok = true;
        assert!(
            describe_switchover(&report, true, Paint(false))
                .ends_with("node2 can take the role. Nothing was changed.\n")
        );
        report.gap_ms = Some(41.26);
        assert!(
            describe_switchover(&report, false, Paint(false))
                .ends_with("node2 is PRIMARY. Nobody could write for 41.3 ms.\n")
        );
        assert!(describe_switchover(&report, false, Paint(true)).contains("\x1b[32m✓\x1b[0m"));
    }
}
