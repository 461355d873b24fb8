//! `twistcli clustered-db fingerprint`: by what whoever adds this host knows it.

use clap::Args;
use data_encoding::{BASE64, HEXUPPER};
use serde::Serialize;

use crate::{
    cli::{
        client::ApiClient,
        columns::{print_json, say},
        stop::Stop,
        target::Target,
    },
    node::{Status, Waiting},
};

pub(super) const HELP: &str = "\
Run it on the host that waits for a pool. The same fingerprint is in its log, on its status page and in
`twistcli ha status`. With --json there is also the pin of the key, for a sign-up by
curl --insecure --pinnedpubkey PIN.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 this host does not wait.

Example:
  sudo twistcli clustered-db fingerprint";

#[derive(Debug, Args)]
pub(in crate::cli) struct FingerprintArgs {
    #[command(flatten)]
    target: Target,
    /// Print it as JSON, with the state, the address and since when it waits
    #[arg(long)]
    json: bool,
}

impl FingerprintArgs {
    pub(super) fn target(&self) -> &Target {
        &self.target
    }
}

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    state: String,
    name: &'a str,
    #[serde(flatten)]
    waiting: &'a Waiting,
    /// As curl's `--pinnedpubkey` takes it.
    pin: String,
}

/// Prints the fingerprint of a host that waits.
///
/// # Errors
/// When nobody answers, or this host does not wait.
pub(super) fn run(client: &ApiClient, args: &FingerprintArgs) -> Result<(), Stop> {
    let status = client.host()?.status()?;
    let Status { name, role, waiting: Some(waiting), .. } = &status else {
        let why = format!("{} is {}: only a host that waits for a pool has a fingerprint", status.name, status.role);
        return Err(Stop::refuse(&why));
    };
    if !args.json {
        return say(&waiting.fingerprint);
    }
    print_json(&Shown { state: role.to_string(), name, waiting, pin: pin(&waiting.fingerprint) })
}

/// A fingerprint as curl writes it.
fn pin(fingerprint: &str) -> String {
    let digest = HEXUPPER.decode(fingerprint.replace(':', "").as_bytes()).unwrap_or_default();
    format!("sha256//{}", BASE64.encode(&digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_the_same_digest() {
        assert_eq!(pin(&["00"; 32].join(":")), format!("sha256//{}=", "A".repeat(43)));
    }
}
