//! The first start of the first node: makes the authority, this node's certificates and its identity, and so a cluster
//! of one. Owns what a host says about itself at its first start. Must never touch a folder that holds a database
//! already.

use std::{collections::HashSet, net::IpAddr};

use anyhow::{Context, Result, bail};
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};
use tracing::info;

use crate::{
    cluster::{
        ClusterId, Member, Membership, NodeId,
        roster::{SizePolicy, check_host, place},
        shared::console_names_that_fit,
    },
    config::Config,
    pki::Authority,
    storage::{DataDir, IDENTITY_FORMAT, Identity, make_private_dir},
};

/// The id of the founder.
const FOUNDER: NodeId = 1;
/// What only a node with an identity writes.
const REMAINS: [&str; 4] = ["raft-log", "database", "membership.json", "snapshot.ready"];

/// The name of something in a data folder that only a node with an identity writes, if there is any.
pub fn remains(data: &DataDir) -> Option<&'static str> {
    REMAINS.into_iter().find(|name| data.path().join(name).exists())
}

/// Makes this host the only member of a new cluster of three. The identity is written last: whatever a crash left
/// before that is made anew by the next start.
///
/// # Errors
/// When the folder holds a database, the configuration does not say how to reach this host, or a file cannot be
/// written.
pub fn found(config: &Config, data: &DataDir) -> Result<Identity> {
    found_with(config, data, SizePolicy::ha())
}

/// Makes this host the only member of a new pool, its seed, as [`found`] does for a cluster of three. Its keys are new:
/// those with which it waited are replaced.
///
/// # Errors
/// Those of [`found`].
pub fn found_pool(config: &Config, data: &DataDir) -> Result<Identity> {
    found_with(config, data, SizePolicy::pool())
}

fn found_with(config: &Config, data: &DataDir, size: SizePolicy) -> Result<Identity> {
    if let Some(name) = remains(data) {
        bail!(
            "{} is there, but identity.json is not: bring it back, or set DATA_FOLDER to an empty folder",
            data.path().join(name).display()
        );
    }
    // Before anything is written: the certificates of a member must stay.
    data.check_unused()?;
    let cluster = ClusterId(rand::random());
    let (name, address) = (config.member_name(), address(config)?);
    let port = config.high_availability_port.context("HIGH_AVAILABILITY_PORT is off: members need it")?;
    check_host(&name, &address, port).context("HIGH_AVAILABILITY_NAME and HIGH_AVAILABILITY_ADDRESS")?;
    let certificates = data.path().join("certificates");
    make_private_dir(&certificates).with_context(|| format!("create {}", certificates.display()))?;
    let (authority, sealed) = Authority::establish(cluster, &certificates).context("make the certificate authority")?;
    let node = authority.issue_node(FOUNDER, &name, &[&address]).context("make the node's certificate")?;
    node.save_node(&certificates)?;
    let names = console_names(config, &address);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    authority.issue_console(&names).context("make the Console's certificate")?.save_console(&certificates)?;
    let mut membership = Membership::founded(cluster, vec![Member::founder(FOUNDER, &name, &address, port)]);
    membership.roster.size = size;
    membership.shared.authority = Some(sealed);
    let identity = Identity { format: IDENTITY_FORMAT, cluster, node: FOUNDER, name, membership };
    data.create_identity(&identity)?;
    info!(node = identity.name, %cluster, "a new cluster is founded: {} is its only member", place(&address, port));
    Ok(identity)
}

/// How the other members are to reach this host: `HIGH_AVAILABILITY_ADDRESS`, `BIND_ADDRESS`, or the first address that
/// is not of this host alone.
///
/// # Errors
/// When the configuration names none, and this host has only loopback addresses.
pub fn address(config: &Config) -> Result<String> {
    if let Some(address) = &config.high_availability_address {
        return Ok(address.clone());
    }
    let found = config.bind_address.or_else(|| local_addresses().into_iter().find(|address| !address.is_loopback()));
    let found = found.context("this host has no address but its loopback one: set HIGH_AVAILABILITY_ADDRESS")?;
    Ok(found.to_string())
}

/// The names that this host's Console certificate has: `CONSOLE_CN` first, the host's name, the address that members
/// use, localhost, and all addresses of the host (as many as fit).
pub fn console_names(config: &Config, address: &str) -> Vec<String> {
    let first = [config.common_name(), config.member_name(), address.to_owned(), "localhost".to_owned()];
    let local = local_addresses().into_iter().map(|address| address.to_string());
    let mut seen = HashSet::new();
    console_names_that_fit(first.into_iter().chain(local).filter(|name| seen.insert(name.clone())))
}

/// The addresses of this host's interfaces, in the order of the system, IPv4 first; those of a link alone left out.
fn local_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = getifaddrs() else { return Vec::new() };
    let up = interfaces.filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP));
    let mut addresses: Vec<IpAddr> = up
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .filter(|address| match address {
            IpAddr::V4(address) => !address.is_link_local(),
            IpAddr::V6(address) => !address.is_unicast_link_local(),
        })
        .collect();
    addresses.sort_by_key(IpAddr::is_ipv6);
    addresses
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    use super::*;
    use crate::pki::{CA_KEY, CLUSTER_KEY, CONSOLE_CERTIFICATE, CONSOLE_KEY, ClusterKey, NODE_KEY, NodeTls, Pair};

    fn config(data: &Path) -> Config {
        Config {
            data_folder: data.to_owned(),
            bind_address: Some("127.0.0.1".parse().unwrap()),
            high_availability_name: Some("first".to_owned()),
            ..Config::default()
        }
    }

    #[test]
    fn a_cluster_of_one_can_sign_and_keeps_its_keys() {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::open(folder.path().join("data")).unwrap();
        let identity = found(&config(data.path()), &data).unwrap();
        assert_eq!(data.identity().unwrap(), identity);
        let member = &identity.membership.roster.members[0];
        assert_eq!((member.name.as_str(), member.address.as_str(), member.port), ("first", "127.0.0.1", 8086));
        assert!(member.voter);
        let certificates = data.path().join("certificates");
        assert_eq!(NodeTls::load(&certificates).unwrap().identity, (identity.cluster, FOUNDER));
        Pair::load(&certificates.join(CONSOLE_CERTIFICATE), &certificates.join(CONSOLE_KEY)).unwrap();
        let sealed = identity.membership.shared.authority.as_ref().unwrap();
        let key = ClusterKey::load(&certificates).unwrap();
        Authority::unseal(identity.cluster, sealed, &key).unwrap();
        assert!(!certificates.join(CA_KEY).exists());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for secret in [NODE_KEY, CONSOLE_KEY, CLUSTER_KEY, "../identity.json"] {
            assert_eq!(mode(&certificates.join(secret)), 0o600, "{secret}");
        }
        assert_eq!(mode(&certificates), 0o700);
        let before = fs::read(certificates.join(NODE_KEY)).unwrap();
        assert!(found(&config(data.path()), &data).unwrap_err().to_string().contains("already belongs"));
        assert_eq!(fs::read(certificates.join(NODE_KEY)).unwrap(), before);
        assert_eq!(data.identity().unwrap(), identity);
    }

    #[test]
    fn a_crash_before_the_identity_is_made_good_by_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::open(folder.path()).unwrap();
        let first = found(&config(data.path()), &data).unwrap();
        let certificates = data.path().join("certificates");
        // Each file in the order in which it is written: a crash right before the next one.
        let written =
            ["identity.json", "certificates/console-cert.pem", "certificates/node.pem", "certificates/cluster.key"];
        for (index, _) in written.iter().enumerate() {
            for lost in &written[..=index] {
                fs::remove_file(data.path().join(lost)).unwrap();
            }
            let again = found(&config(data.path()), &data).unwrap();
            assert_ne!(again.cluster, first.cluster);
            assert_eq!(NodeTls::load(&certificates).unwrap().identity, (again.cluster, FOUNDER));
            let sealed = again.membership.shared.authority.as_ref().unwrap();
            Authority::unseal(again.cluster, sealed, &ClusterKey::load(&certificates).unwrap()).unwrap();
        }
    }

    #[test]
    fn a_host_without_an_address_for_others_is_told_what_to_set() {
        let mut config = config(Path::new("/x"));
        config.high_availability_address = Some("*.example".to_owned());
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::open(folder.path()).unwrap();
        let error = format!("{:#}", found(&config, &data).unwrap_err());
        assert!(error.contains("HIGH_AVAILABILITY_ADDRESS") && error.contains("*.example"), "{error}");
        assert!(!folder.path().join("certificates").exists());
    }

    #[test]
    fn a_database_without_an_identity_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let data = DataDir::open(folder.path()).unwrap();
        fs::create_dir(folder.path().join("raft-log")).unwrap();
        assert!(found(&config(data.path()), &data).unwrap_err().to_string().contains("identity.json is not"));
        assert!(!folder.path().join("certificates").exists());
    }

    #[test]
    fn names_are_told_once_and_fit() {
        let mut config = config(Path::new("/x"));
        config.console_cn = Some("console.example".to_owned());
        let names = console_names(&config, "192.0.2.7");
        assert_eq!(names[..4], ["console.example", "first", "192.0.2.7", "localhost"]);
        assert!(names.contains(&"127.0.0.1".to_owned()), "{names:?}");
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        assert!(console_names(&config, &"a".repeat(254)).iter().all(|name| name.len() < 64));
        config.high_availability_address = Some("node.example".to_owned());
        assert_eq!(address(&config).unwrap(), "node.example");
    }
}
