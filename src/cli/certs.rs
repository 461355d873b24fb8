//! `twistcli certs`: the authority that signs the certificates of a cluster, and the certificates of its Consoles. Must never
//! pass an authority's certificate that came from a stranger off as a good one.

use std::fs;

use clap::Subcommand;

use super::{
    columns::{self, Paint},
    stop::{EX_NOINPUT, Stop},
    target::Target,
    untrusted::{self, Claimed},
};

const CA_HELP: &str = "\
The certificate goes to standard output, its fingerprint to standard error. Without --address it is that of the
cluster of this host. With --address it is what the Console there says: nothing proves that it is the right one until
you have compared the fingerprint with that on a member. No password is needed, and none is sent.

Exit code: 0 done, 64 wrong command line, 66 there is none on this host, 69 nobody answers.

Examples:
  sudo twistcli certs ca
  twistcli certs ca --address https://console.example.com:8083 > ca.pem";

/// Commands of `twistcli certs`.
#[derive(Debug, Subcommand)]
pub(super) enum Certs {
    /// Print the certificate of the cluster's authority, and its fingerprint
    #[command(after_help = CA_HELP)]
    Ca {
        #[command(flatten)]
        target: Target,
    },
}

/// Carries a command out.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Certs, _paint: Paint) -> Result<(), Stop> {
    match command {
        Certs::Ca { target } => ca(target),
    }
}

fn ca(target: &Target) -> Result<(), Stop> {
    let places = target.addresses()?;
    let (claimed, whence) = match places.first() {
        Some(_) if target.is_local() => (own(target)?, None),
        Some(place) => (untrusted::authority(place)?, Some(place)),
        None => (own(target)?, None),
    };
    columns::print(&claimed.pem)?;
    eprintln!("SHA-256 fingerprint of the authority:\n  {}", claimed.fingerprint);
    if let Some(place) = whence {
        eprintln!(
            "This is what {place} says. Compare it with `sudo twistcli certs ca` on a member before you trust it."
        );
    }
    Ok(())
}

/// The authority of this host's cluster.
fn own(target: &Target) -> Result<Claimed, Stop> {
    let path = target.local()?.data.join("certificates").join("ca.pem");
    let unusable = |why: String| Stop::tell(EX_NOINPUT, &format!("{}: {why}", path.display()));
    let text = fs::read_to_string(&path).map_err(|error| unusable(error.to_string()))?;
    untrusted::claimed(&text).map_err(unusable)
}
