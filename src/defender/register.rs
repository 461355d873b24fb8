//! Has this host registered by a Console: fetches the authority, compares it with the token, and asks for a
//! certificate. Must never send the token to anybody whom that authority does not vouch for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use ureq::Agent;

use super::{
    folder::{Folder, Settings},
    wire::{REGISTER, Registered, Registration},
};
use crate::{
    https::{self, Limits, Trust},
    join::Token,
    pki::{self, CONSOLE_NAME, pem},
};

const LIMITS: Limits = Limits { connect: Duration::from_secs(3), request: Duration::from_secs(15) };
/// Longest answer in bytes.
const ANSWER: u64 = 1 << 20;
/// Bytes that the queue may take.
const QUEUE: u64 = 64 << 20;

/// What a registration needs to be told.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// HOST:PORT of a Console's HTTPS port, or of what leads there; again for each
    #[arg(long = "console", value_name = "HOST:PORT", required = true)]
    consoles: Vec<String>,
    /// Port of the Consoles for Defenders
    #[arg(long, value_name = "PORT", default_value_t = 8084)]
    port: u16,
    /// File with the token, or - for standard input
    #[arg(long, value_name = "FILE")]
    token_file: String,
    /// How this host is called; its host name if not given
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// Registers this host. Does nothing a second time but fetch another certificate for the same key.
///
/// # Errors
/// When no Console answers, or one refuses.
pub(super) fn register(folder: &Folder, options: &Options) -> Result<()> {
    let text = match options.token_file.as_str() {
        "-" => std::io::read_to_string(std::io::stdin()),
        path => std::fs::read_to_string(path),
    };
    let text = text.context("read the token")?;
    let token: Token = text.trim().parse().map_err(|why: &str| anyhow::anyhow!("the token cannot be used: {why}"))?;
    let consoles = options.consoles.iter().map(|place| place_for_defenders(place, options.port));
    let consoles = consoles.collect::<Result<Vec<_>>>()?;
    let name = options.name.clone().unwrap_or_else(|| super::facts::facts().hostname);
    let key = folder.key()?;
    let csr = pki::request_with(&key, &name, &[])?;
    let body = Registration { token: text.trim().to_owned(), name: name.clone(), csr };
    let mut refusals = Vec::new();
    for place in &options.consoles {
        match ask(place, &token, &body) {
            Ok(Registered { id, certificate, authorities }) => {
                pki::defender_client_tls(&authorities, &certificate, &key).context("use the certificate that came")?;
                folder.keep_authorities(&authorities)?;
                folder.keep_certificate(&certificate)?;
                let queue_bytes = folder.settings().ok().flatten().map_or(QUEUE, |before| before.queue_bytes);
                folder.keep_settings(&Settings { consoles, name, id: id.clone(), queue_bytes })?;
                println!("This host is registered with the id {id}.");
                return Ok(());
            }
            Err(error) => refusals.push(format!("{place}: {error:#}")),
        }
    }
    bail!("no Console has registered this host:\n  {}", refusals.join("\n  "))
}

/// Where a Defender connects: the host of a Console's place, with another port.
fn place_for_defenders(place: &str, port: u16) -> Result<String> {
    let host = place.rsplit_once(':').map(|(host, _)| host).filter(|host| !host.is_empty());
    let host = host.with_context(|| format!("{place:?} is not HOST:PORT"))?;
    Ok(format!("{host}:{port}"))
}

fn ask(place: &str, token: &Token, body: &Registration) -> Result<Registered> {
    let known = fetch(&https::credulous_client(LIMITS), &format!("https://{place}/api/v1/certs/ca.pem"))?;
    let vouched = pem::certificates(&known).context("read the authority of the cluster")?;
    // Another one may be about to take its place; the token knows one of them.
    if !vouched.iter().any(|der| token.trusts(der)) {
        bail!("it is not a Console of the cluster that the token is from, or somebody is in between");
    }
    let trusted =
        vouched.into_iter().filter(|der| token.trusts(der)).map(|der| pki::as_pem(&[der])).collect::<String>();
    let agent = https::client_at(&Trust::pem(trusted.as_bytes())?, LIMITS, place)?;
    let mut response = agent.post(format!("https://{CONSOLE_NAME}{REGISTER}")).send_json(body)?;
    if !response.status().is_success() {
        bail!("{}", https::refusal(&mut response));
    }
    let text = response.body_mut().with_config().limit(ANSWER).read_to_string()?;
    serde_json::from_str(&text).context("its answer is not understood")
}

fn fetch(agent: &Agent, url: &str) -> Result<String> {
    let mut response = agent.get(url).call()?;
    if !response.status().is_success() {
        bail!("{}", https::refusal(&mut response));
    }
    Ok(response.body_mut().with_config().limit(ANSWER).read_to_string()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_keeps_its_host() {
        assert_eq!(place_for_defenders("[2001:db8::1]:8083", 8084).unwrap(), "[2001:db8::1]:8084");
        assert_eq!(place_for_defenders("console.example:443", 9084).unwrap(), "console.example:9084");
        assert!(place_for_defenders("console.example", 8084).is_err());
    }
}
