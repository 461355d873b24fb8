//! `twistcli certs`: the authority that signs the certificates of a cluster, and the certificates of its Consoles. Must
//! never pass an authority's certificate that came from a stranger off as a good one, or print a private key.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};

use super::{
    args::DONE_OR_REFUSED,
    columns::{self, Cell, Paint, print_json, say},
    quantity::date,
    stop::{EX_NOINPUT, EX_USAGE, Stop, confirm},
    target::Target,
    untrusted::{self, Claimed},
};
use crate::{
    admin::{Certificates, Custom, MAX_UPLOAD},
    console::certs::{Names, Upload},
    control::Call,
    node::CertificateStatus,
};

const CA_HELP: &str = "\
The certificate goes to standard output, its fingerprint to standard error. Without --address it is that of
this host's cluster. With --address it is what the Console there claims: nothing proves that it is the right
one until you have compared the fingerprint with the one on a member. No password is needed, and none is
sent.

Exit code: 0 done, 64 wrong command line, 66 there is none on this host, 69 nobody answers.

Examples:
  sudo twistcli certs ca
  twistcli certs ca --address https://console.example.com:8083 > ca.pem";

const NAMES_HELP: &str = "\
Every Console's certificate is valid for the names of its own host, and for these. They replace those that
were set before. Each member reissues its certificate and serves it at once; no connection is cut.

Exit code: 0 done, 64 wrong command line, 69 nobody answers, 75 refused, 77 the login is refused.

Examples:
  sudo twistcli certs set-names console.example.com 192.0.2.10
  sudo twistcli certs set-names --none";

const UPLOAD_HELP: &str = "\
The file has, in PEM form, the certificate, then those of the authorities above it, and the private key
unless --key names a file for that. If the certificate does not cover every member and the names of
`twistcli certs set-names`, it is refused, and the missing names are listed. All Consoles serve it at once;
the key is kept encrypted.

Exit code: 0 done, 64 wrong command line, 66 a file cannot be read, 69 nobody answers, 75 refused, 77 the
login is refused.

Examples:
  sudo twistcli certs upload console.pem
  twistcli certs upload chain.pem --key key.pem --address https://console.example.com:8083";

/// Commands of `twistcli certs`.
#[derive(Debug, Subcommand)]
pub(super) enum Certs {
    /// Print the certificate of the cluster's authority, and its fingerprint
    #[command(after_help = CA_HELP)]
    Ca {
        #[command(flatten)]
        target: Target,
    },
    /// Show the certificates that the Consoles serve, and until when they are valid
    #[command(after_help = DONE_OR_REFUSED)]
    List {
        #[command(flatten)]
        target: Target,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Set the names that every Console's certificate is valid for, besides those of its host
    #[command(after_help = NAMES_HELP)]
    SetNames(NamesArgs),
    /// Have all Consoles serve a certificate of your own
    #[command(after_help = UPLOAD_HELP)]
    Upload(UploadArgs),
    /// Have all Consoles serve certificates of the cluster's authority again
    #[command(after_help = DONE_OR_REFUSED)]
    Remove {
        #[command(flatten)]
        target: Target,
        /// Do not ask; needed where standard input is no terminal
        #[arg(long, short)]
        yes: bool,
    },
}

/// Arguments of `twistcli certs set-names`.
#[derive(Debug, Args)]
pub(super) struct NamesArgs {
    #[command(flatten)]
    target: Target,
    /// Host names and IP addresses, such as those of a load balancer
    #[arg(value_name = "NAME", required_unless_present = "none", conflicts_with = "none")]
    names: Vec<String>,
    /// No names but those of each host
    #[arg(long)]
    none: bool,
}

/// Arguments of `twistcli certs upload`.
#[derive(Debug, Args)]
pub(super) struct UploadArgs {
    #[command(flatten)]
    target: Target,
    /// The certificate chain, PEM, and the private key
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The private key, PEM, if it is in a file of its own
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

/// Carries a command out.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(command: &Certs, paint: Paint) -> Result<(), Stop> {
    match command {
        Certs::Ca { target } => ca(target),
        Certs::List { target, json } => list(target, *json, paint),
        Certs::SetNames(args) => set_names(args),
        Certs::Upload(args) => upload(args),
        Certs::Remove { target, yes } => remove(target, *yes),
    }
}

fn list(target: &Target, json: bool, paint: Paint) -> Result<(), Stop> {
    let found: Certificates = target.client()?.call(&Call::get("settings/certs"))?;
    if json {
        return print_json(&found);
    }
    let rows: Vec<Vec<Cell>> = found.certificates.iter().map(row).collect();
    let heads = [("OF", false), ("SOURCE", false), ("VALID UNTIL", false), ("ISSUER", false), ("NAMES", false)];
    let mut text = columns::table(&heads, &rows, paint);
    let names = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    text.push_str(&format!("\nNames of all Consoles, besides those of each host: {}\n", names(&found.console_names)));
    if let Some(Custom { by, at, missing, exposed_to, .. }) = &found.custom {
        text.push_str(&format!(
            "The certificate of all Consoles was uploaded by {}, {}.\n",
            columns::harmless(by),
            date(*at)
        ));
        if !missing.is_empty() {
            text.push_str(&format!("It is not valid for: {}\n", columns::harmless(&missing.join(", "))));
        }
        if !exposed_to.is_empty() {
            text.push_str(&exposed(exposed_to));
        }
    }
    Ok(columns::print(&text)?)
}

fn row(certificate: &CertificateStatus) -> Vec<Cell> {
    let info = &certificate.info;
    vec![
        certificate.of.as_str().into(),
        certificate.source.word().into(),
        date(info.not_after).into(),
        info.issuer.as_str().into(),
        info.names.join(", ").into(),
    ]
}

fn set_names(args: &NamesArgs) -> Result<(), Stop> {
    let client = args.target.client()?;
    client.primary(&format!("twistcli certs set-names {}", args.names.join(" ")))?;
    let wanted = Names { names: args.names.clone() };
    let Names { names } = client.call(&Call::post("settings/certs").with(wanted))?;
    let sentence = match names.as_slice() {
        [] => "Every Console's certificate is valid for the names of its host only.".to_owned(),
        names => format!("Every Console's certificate is also valid for {}.", names.join(", ")),
    };
    say(&sentence)?;
    eprintln!("Each member reissues its certificate. See: twistcli certs list");
    Ok(())
}

fn upload(args: &UploadArgs) -> Result<(), Stop> {
    let mut pem = read(&args.file)?;
    if let Some(key) = &args.key {
        pem.push('\n');
        pem.push_str(&read(key)?);
    }
    let client = args.target.client()?;
    client.primary("twistcli certs upload FILE")?;
    let given: Custom = client.call(&Call::post("settings/custom-certs").with(Upload { certificate: pem }))?;
    let (subject, until) = (&given.info.subject, date(given.info.not_after));
    say(&format!("All Consoles serve the certificate {subject}, valid until {until}."))?;
    eprintln!("SHA-256 fingerprint:\n  {}", given.info.fingerprint);
    if !given.exposed_to.is_empty() {
        eprint!("It has the same key as the one before. {}", exposed(&given.exposed_to));
    }
    Ok(())
}

/// Who else knows the private key.
fn exposed(names: &[String]) -> String {
    format!(
        "Its private key is known to former members: {}. Upload a certificate with another key.\n",
        columns::harmless(&names.join(", "))
    )
}

/// Reads a file of the administrator. Nothing of it is ever shown.
fn read(path: &Path) -> Result<String, Stop> {
    let unusable = |code, why: &str| Stop::tell(code, &format!("{}: {why}", path.display()));
    let failed = |error: io::Error| unusable(EX_NOINPUT, &error.to_string());
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_UPLOAD as u64 + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() > MAX_UPLOAD {
        return Err(unusable(EX_USAGE, &format!("it is longer than {MAX_UPLOAD} bytes")));
    }
    Ok(text)
}

fn remove(target: &Target, yes: bool) -> Result<(), Stop> {
    let client = target.client()?;
    client.primary("twistcli certs remove")?;
    confirm("Have all Consoles serve certificates of the cluster's authority again?", yes)?;
    client.have_done(&Call::delete("settings/custom-certs"))?;
    say("All Consoles serve certificates of the cluster's authority again.")
}

fn ca(target: &Target) -> Result<(), Stop> {
    let places = if target.is_local() { Vec::new() } else { target.addresses()? };
    let (claimed, whence) = match places.split_last() {
        // Only the PRIMARY's Console answers. If none does, the error of the last one is shown.
        Some((last, others)) => {
            let found = others.iter().find_map(|place| Some((untrusted::authority(place).ok()?, place)));
            let (claimed, place) =
                found.map_or_else(|| untrusted::authority(last).map(|claimed| (claimed, last)), Ok)?;
            (claimed, Some(place))
        }
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
    let text = std::fs::read_to_string(&path).map_err(|error| unusable(error.to_string()))?;
    untrusted::claimed(&text).map_err(unusable)
}
