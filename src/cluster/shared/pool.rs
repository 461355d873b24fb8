//! What only the members of a pool share: where clients reach the pool, and the version that its database has come to.
//! Owns the rules for both; must never change anything of a cluster in HA mode.

use serde::{Deserialize, Serialize};

use super::{Shared, console_certificate::sound_names};
use crate::cluster::{
    level::is_older,
    limits::{Impossible, MAX_NAME, fits},
};

/// Bytes of what a pool shares: an address and a version.
pub(super) const MAX_POOL: usize = 2 * MAX_NAME + 96;

/// What only the members of a pool share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Host name or IP address of the load balancer in front of the Consoles, without a port; empty if there is none.
    /// It is also one of [`Shared::console_names`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub load_balancer: String,
    /// The highest version of a program that was PRIMARY: see [`Shared::is_behind_pool`]. Empty until there was one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
}

impl Pool {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Shared {
    /// True if a program of this version is older than the pool's database: it replicates and votes, and never becomes
    /// PRIMARY. Never so in HA mode.
    pub fn is_behind_pool(&self, version: &str) -> bool {
        is_older(version, &self.pool.version)
    }

    /// Another load balancer, or none if the address is empty. Its name goes into all Consoles' certificates, and that
    /// of the one before leaves them.
    pub(in crate::cluster) fn set_load_balancer(&mut self, address: &str) -> Result<(), Impossible> {
        let address = address.to_ascii_lowercase();
        if address.starts_with("*.") {
            return Err(Impossible(format!("{address:?} is not the address of one load balancer")));
        }
        let mut names = self.console_names.clone();
        names.retain(|name| *name != self.pool.load_balancer);
        if !address.is_empty() {
            names.push(address.clone());
        }
        self.console_names = sound_names(&names)?;
        self.pool.load_balancer = address;
        Ok(())
    }

    /// Refuses a list of names without that of the load balancer: clients could not verify the Consoles behind it.
    pub(in crate::cluster) fn check_load_balancer_is_in(&self, names: &[String]) -> Result<(), Impossible> {
        let load_balancer = &self.pool.load_balancer;
        match load_balancer.is_empty() || names.iter().any(|name| name.eq_ignore_ascii_case(load_balancer)) {
            true => Ok(()),
            false => Err(Impossible(format!(
                "{load_balancer} is the address of the load balancer, and stays in the list: change it with `twistcli \
                 clustered-db configure --load-balancer-address` first"
            ))),
        }
    }

    /// A program of this version is PRIMARY.
    pub(in crate::cluster) fn raise_pool_version(&mut self, version: &str) -> Result<(), Impossible> {
        fits("the version", &version, MAX_NAME)?;
        if !self.pool.version.is_empty() && !is_older(&self.pool.version, version) {
            return Err(Impossible(format!("the pool's database has version {} already", self.pool.version)));
        }
        self.pool.version = version.to_owned();
        Ok(())
    }
}
