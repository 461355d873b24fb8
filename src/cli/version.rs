//! `twistcli version`: this program's, and those of the members.

use clap::Args;
use serde_json::json;

use super::{
    columns::{self, Cell, Paint, print_json},
    stop::Stop,
    target::Target,
};

/// The help of `twistcli version`.
pub(super) const HELP: &str = "\
`twistcli --version` asks nobody.

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

/// Prints them.
///
/// # Errors
/// When nobody answers.
pub(super) fn run(args: &VersionArgs, paint: Paint) -> Result<(), Stop> {
    let own = env!("CARGO_PKG_VERSION");
    let status = args.target.door()?.status()?;
    if args.json {
        let members: Vec<_> = status
            .members
            .iter()
            .map(|member| json!({ "name": member.name, "state": member.state, "version": member.version }))
            .collect();
        return print_json(&json!({ "twistcli": own, "members": members }));
    }
    let version = |text: &str| match text {
        "" => Cell::from("-"),
        same if same == own => same.into(),
        // Not an error: a rolling upgrade goes one member at a time.
        other => Cell::coloured("33", other),
    };
    let mut rows = vec![vec!["twistcli".into(), "-".into(), own.into()]];
    rows.extend(
        status
            .members
            .iter()
            .map(|member| vec![member.name.as_str().into(), member.state.to_string().into(), version(&member.version)]),
    );
    Ok(columns::print(&columns::table(&[("WHO", false), ("STATE", false), ("VERSION", false)], &rows, paint))?)
}
