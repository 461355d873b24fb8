//! `twistcli clustered-db configure`: the addresses by which a pool is reached.

use super::ConfigureArgs;
use crate::{
    admin::{PoolSettings, PoolWish},
    cli::{
        client::ApiClient,
        columns::{print_json, say},
        stop::Stop,
    },
    control::Call,
};

/// Sets one of the addresses.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(client: &ApiClient, args: &ConfigureArgs) -> Result<(), Stop> {
    let ConfigureArgs { load_balancer_address, seed_console_address, .. } = args;
    let wish = PoolWish {
        load_balancer_address: load_balancer_address.clone(),
        seed_console_address: seed_console_address.clone(),
    };
    let option = match (load_balancer_address, seed_console_address) {
        (Some(address), _) => format!("--load-balancer-address {address:?}"),
        (None, address) => format!("--seed-console-address {:?}", address.as_deref().unwrap_or_default()),
    };
    client.primary(&format!("twistcli clustered-db configure {option}"))?;
    let settings: PoolSettings = client.call(&Call::post("clustered-db/settings").with(wish))?;
    if args.json {
        return print_json(&settings);
    }
    match load_balancer_address {
        Some(_) => {
            say(&format!("Load balancer address: {}", settings.load_balancer_address))?;
            eprintln!("All Consoles' certificates are good for it from now on.");
            Ok(())
        }
        None => say(&format!("Seed Console address: {}", settings.seed_console_address)),
    }
}
