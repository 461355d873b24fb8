//! `twistcli clustered-db add`: hosts that wait become members. Shows whom it talks to before anything is changed; must
//! never add a host that nobody has compared or proven.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use clap::Args;

use super::{status, tell_size};
use crate::{
    admin::{AddedMember, NewMember, PoolAddition, PoolCandidate},
    cli::{
        args::span,
        catch_up,
        client::ApiClient,
        columns::{harmless, print_json, say},
        stop::{EX_USAGE, Stop, confirm},
        target::Target,
    },
    console::clustered_db::AddMembers,
    control::Call,
};

pub(super) const HELP: &str = "\
The hosts run twistlockd with CLUSTERED_DB_ENABLED=true and an empty data folder: they wait. Compare each
fingerprint with the one that the host itself shows (twistcli clustered-db fingerprint, its log, its status
page), or give it here. With the same CLUSTERED_DB_SECRET_FILE on all hosts nothing is asked: both sides
prove that they know it. All hosts are added, or none. An interrupted command may be given again.

Exit code: 0 done and all members up, 64 wrong command line, 69 nobody answers, 75 refused, not confirmed,
or not all up within the time given by --wait (the message says why and what to do), 77 the login is refused.

Examples:
  twistcli clustered-db add --member-address 10.0.0.2 --member-address 10.0.0.3 \\
    --address https://10.0.0.1:8083 -u admin -p PASSWORD
  twistcli clustered-db add --member-address 10.0.0.2 --member-fingerprint AB:CD:... --no-wait";

#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    #[command(flatten)]
    target: Target,
    /// Address of a host that waits, by which all members reach it; may be given several times
    #[arg(long, value_name = "ADDRESS", required = true)]
    member_address: Vec<String>,
    /// The fingerprint that the host shows, instead of the question; as often as --member-address, in its order
    #[arg(long, value_name = "FINGERPRINT")]
    member_fingerprint: Vec<String>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
    /// Return as soon as they are members; they then copy the database and get their votes by themselves
    #[arg(long)]
    no_wait: bool,
    /// How long to wait until all are SECONDARY
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = span, conflicts_with = "no_wait")]
    wait: Duration,
}

impl AddArgs {
    pub(super) fn target(&self) -> &Target {
        &self.target
    }
}

/// Adds the hosts, and waits until all members are up.
///
/// # Errors
/// When nobody answers, it is refused, or not confirmed.
pub(super) fn run(client: &ApiClient, args: &AddArgs) -> Result<(), Stop> {
    let (hosts, prints) = (&args.member_address, &args.member_fingerprint);
    if !prints.is_empty() && prints.len() != hosts.len() {
        let why = "give as many --member-fingerprint as --member-address, in the same order";
        return Err(Stop::tell(EX_USAGE, why));
    }
    let named = hosts.iter().map(|host| format!(" --member-address {host}")).collect::<String>();
    client.primary(&format!("twistcli clustered-db add{named}"))?;
    let prints = prints.iter().cloned().map(Some).chain(std::iter::repeat(None));
    let member =
        |(address, fingerprint): (&String, Option<String>)| NewMember { address: address.clone(), fingerprint };
    let mut members: Vec<NewMember> = hosts.iter().zip(prints).map(member).collect();
    if args.member_fingerprint.is_empty() {
        let seen = client.call(&call("clustered-db/candidates", &members))?;
        compare(&mut members, seen)?;
    }
    let added: PoolAddition = client.call(&call("clustered-db/members", &members))?;
    if args.json {
        print_json(&added)?;
    } else {
        added.members.iter().try_for_each(|member| say(&harmless(&sentence(member))))?;
    }
    if let Some(AddedMember { address, .. }) = added.members.iter().find(|member| member.problem.is_some()) {
        return Err(Stop::refuse(&format!("{address} does not know that it is a member: give the same command again")));
    }
    if args.no_wait {
        eprintln!(
            "They count for what the pool tolerates when they have caught up. Next: twistcli clustered-db status --watch"
        );
        return Ok(());
    }
    catch_up::wait(client, args.wait, args.json)?;
    // Only now do they have their votes.
    match status::ask(client)?.size {
        Some(size) if !args.json => tell_size(&size),
        _ => Ok(()),
    }
}

fn call(path: &str, members: &[NewMember]) -> Call {
    Call::post(path).with(AddMembers { address: None, members: Some(members.to_vec()) })
}

/// Shows the hosts and their fingerprints. What was shown is what is added.
fn compare(members: &mut [NewMember], seen: Vec<PoolCandidate>) -> Result<(), Stop> {
    let mut ask = false;
    for PoolCandidate { address, name, version, fingerprint, proven } in seen {
        let secret = if proven { "; it knows the secret of the pool" } else { "" };
        let text = format!("  {address} ({name}), version {version}{secret}\n    fingerprint {fingerprint}");
        text.lines().for_each(|line| eprintln!("{}", harmless(line)));
        ask |= !proven;
        if let Some(member) = members.iter_mut().find(|member| member.address == address) {
            member.fingerprint = Some(fingerprint);
        }
    }
    if !ask {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        let why = "compare the fingerprints, and give them with --member-fingerprint: standard input is no terminal";
        return Err(Stop::refuse(why));
    }
    eprintln!("\nEach fingerprint must be the one that the host itself shows.");
    confirm("Add them?", false)
}

fn sentence(AddedMember { address, name, node, before, problem }: &AddedMember) -> String {
    let is = if *before { "is a member since an earlier request" } else { "is added" };
    let problem = problem.as_ref().map(|why| format!(", but was not told: {why}")).unwrap_or_default();
    format!("{address} ({name}, node {node}) {is}{problem}.")
}
