//! `twistcli clustered-db remove`: one member less.

use super::{RemoveArgs, tell_size};
use crate::{
    admin::PoolRemoval,
    cli::{
        client::ApiClient,
        columns::{harmless, print_json, say},
        remote::segment,
        stop::Stop,
    },
    control::Call,
};

/// Removes a member. No question is asked: scripts for the interface that we keep answer none.
///
/// # Errors
/// When nobody answers, or it is refused.
pub(super) fn run(client: &ApiClient, args: &RemoveArgs) -> Result<(), Stop> {
    let address = &args.member_address;
    client.primary(&format!("twistcli clustered-db remove --member-address {address}"))?;
    let call = Call::delete(format!("clustered-db/members/{}", segment(address)));
    let removal: PoolRemoval = client.call(&call)?;
    if args.json {
        return print_json(&removal);
    }
    say(&format!("{address} is removed."))?;
    tell_size(&removal.size)?;
    if let Some(warning) = &removal.warning {
        eprintln!("Warning: {}", harmless(warning));
    }
    Ok(())
}
