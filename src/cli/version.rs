//! `twistcli version`: this program's, and those of the members.

use clap::Args;
use serde_json::json;

use super::{
    columns::{self, Cell, Paint, print_json},
    past::Past,
    stop::Stop,
    target::Target,
};
use crate::cluster::{Member, Role, program_version};

/// The help of `twistcli version`.
pub(super) const HELP: &str = "\
`twistcli --version` shows only the version of this program. While the daemon of this host does not answer,
the members are those that its files name.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 77 the login is refused.

Examples:
  twistcli version
  twistcli version --json";

#[derive(Debug, Args)]
pub(super) struct VersionArgs {
    #[command(flatten)]
    target: Target,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

/// Prints the versions. Returns the exit code.
///
/// # Errors
/// When nobody answers.
pub(super) fn run(args: &VersionArgs, paint: Paint) -> Result<u8, Stop> {
    let client = args.target.client()?;
    let status = match client.status() {
        Ok(status) => status,
        Err(stop) => return without_daemon(client.past(&stop), args.json, paint, stop),
    };
    let members = status.members.iter().map(|member| (&*member.name, member.state.to_string(), &*member.version));
    show(members.collect(), args.json, paint, false)?;
    Ok(0)
}

/// Prints this program's version, and who the members were.
fn without_daemon(past: Option<Past>, json: bool, paint: Paint, stop: Stop) -> Result<u8, Stop> {
    if !stop.is_unanswered() {
        return Err(stop);
    }
    let known = past.as_ref().and_then(|past| past.membership.as_ref());
    let version =
        |name: &str| past.as_ref().filter(|past| past.host() == name).and_then(|past| past.version.as_deref());
    let member = |member: &'_ Member| (member.name.clone(), version(&member.name).unwrap_or_default().to_owned());
    let members: Vec<_> = known.iter().flat_map(|membership| &membership.roster.members).map(member).collect();
    let unknown = || Role::Unknown.to_string();
    show(members.iter().map(|(name, version)| (&**name, unknown(), &**version)).collect(), json, paint, true)?;
    Ok(stop.code()?)
}

/// Prints the versions of the members: name, state and version. `stale`: as they were.
fn show(members: Vec<(&str, String, &str)>, json: bool, paint: Paint, stale: bool) -> Result<(), Stop> {
    let own = program_version();
    if json {
        let member =
            |(name, state, version): &(&str, String, &str)| json!({ "name": name, "state": state, "version": version });
        let mut told = json!({ "twistcli": own, "members": members.iter().map(member).collect::<Vec<_>>() });
        if stale {
            told["stale"] = true.into();
        }
        return print_json(&told);
    }
    let version = |text: &str| match text {
        "" => Cell::from("-"),
        same if same == own => same.into(),
        // Not an error: a rolling upgrade goes one member at a time.
        other => Cell::coloured("33", other),
    };
    let mut rows = vec![vec!["twistcli".into(), "-".into(), own.into()]];
    rows.extend(members.iter().map(|(name, state, text)| vec![(*name).into(), state.as_str().into(), version(text)]));
    Ok(columns::print(&columns::table(&[("WHO", false), ("STATE", false), ("VERSION", false)], &rows, paint))?)
}
