//! Checks of this host before anything is changed. Some findings are only warnings, others block. Must never change
//! anything, and must never take another program's listener at another address for a conflict.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs},
    path::Path,
    thread,
};

use nix::sys::{
    statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, TMPFS_MAGIC, statfs},
    statvfs::statvfs,
};

use super::{
    place::{Place, ports},
    voice::{EX_TEMPFAIL, Failure, Voice},
};
use crate::config::{Config, host_name};

/// What a host should have.
const MIN_CPUS: usize = 2;
const MIN_MEMORY_KB: u64 = 950_000;
const MIN_DISK: u64 = 10_000_000 * 1024;
/// File systems of the kernel that nix has no name for (linux/magic.h, fs/smb/client).
const CIFS_MAGIC: u64 = 0xff53_4d42;
const SMB2_MAGIC: u64 = 0xfe53_4d42;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// Folders that the unit hides from the node.
const HIDDEN: [&str; 5] = ["/home", "/root", "/tmp", "/var/tmp", "/run/user"];

/// What was found.
struct Findings<'a> {
    voice: &'a Voice,
    blocks: usize,
}

impl Findings<'_> {
    fn block(&mut self, why: &str) {
        self.voice.complain(&format!("BLOCK    {why}"));
        self.blocks += 1;
    }
}

/// Makes all checks. `runs`: a node of this host runs, and has the ports.
///
/// # Errors
/// When a check blocks, unless it is to be passed over.
pub(super) fn check(config: &Config, place: &Place, runs: bool, pass_over: bool, voice: &Voice) -> Result<(), Failure> {
    let mut found = Findings { voice, blocks: 0 };
    processor_and_memory(&mut found);
    disk(config, place, &mut found);
    if !runs {
        for port in busy_ports(config) {
            found.block(&format!("port {port} is in use by another program (see: ss -ltnp 'sport = :{port}')"));
        }
    }
    clock(voice);
    own_name(voice);
    if found.blocks == 0 || pass_over {
        return Ok(());
    }
    let why = format!("{} check(s) of this host block the installation: nothing was changed", found.blocks);
    Err(Failure::new(EX_TEMPFAIL, why).hint("Mend what is listed above, or pass over it: -y"))
}

fn processor_and_memory(found: &mut Findings<'_>) {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    if cpus < MIN_CPUS {
        found.block(&format!("{cpus} CPU found, {MIN_CPUS} are needed"));
    }
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let memory: u64 = total.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    if memory < MIN_MEMORY_KB {
        found.block(&format!("{} MB of memory found, 1 GB is needed", memory / 1000));
    }
}

fn disk(config: &Config, place: &Place, found: &mut Findings<'_>) {
    let data = &config.data_folder;
    let there = data.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let free = statvfs(there).map_or(0, |disk| disk.blocks_available() * disk.fragment_size());
    if free < MIN_DISK {
        found.block(&format!("{} MB are free for {}, 10 GB are needed", free / 1_000_000, data.display()));
    }
    let kind = statfs(there).map_or(0, |disk| disk.filesystem_type().0 as u32 as u64);
    let is = |magic: nix::sys::statfs::FsType| magic.0 as u32 as u64 == kind;
    if is(TMPFS_MAGIC) || kind == RAMFS_MAGIC {
        found.voice.warn(&format!("{} is in memory: it does not survive a restart of the host", data.display()));
    } else if is(NFS_SUPER_MAGIC)
        || is(SMB_SUPER_MAGIC)
        || is(FUSE_SUPER_MAGIC)
        || [CIFS_MAGIC, SMB2_MAGIC].contains(&kind)
    {
        let text = format!("{} is on a network or user-space file system: use a local one", data.display());
        found.voice.warn(&text);
    }
    if place.uses_systemd(config) {
        for (key, folder) in [("DATA_FOLDER", data), ("DATA_RECOVERY_VOLUME", &config.data_recovery_volume)] {
            if HIDDEN.iter().any(|hidden| folder.starts_with(hidden)) {
                let folder = folder.display();
                found.block(&format!("{key}={folder} is in a folder that the systemd unit hides from the node"));
            }
        }
    }
}

/// The ports of these settings that another program has.
pub(super) fn busy_ports(config: &Config) -> Vec<u16> {
    let all = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let address = config.bind_address.unwrap_or(all);
    let busy = |port: &u16| match TcpListener::bind(SocketAddr::new(address, *port)) {
        // A host without IPv6.
        Err(error) if config.bind_address.is_none() && error.kind() != io::ErrorKind::AddrInUse => {
            in_use(TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)))
        }
        tried => in_use(tried),
    };
    ports(config).filter(busy).collect()
}

fn in_use(tried: io::Result<TcpListener>) -> bool {
    // The node itself reports everything else.
    tried.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
}

fn clock(voice: &Voice) {
    let systemd = voice.ask(&["timedatectl", "show", "-p", "NTPSynchronized", "--value"]);
    let answer = systemd.filter(|answer| !answer.is_empty());
    let answer = answer.or_else(|| voice.does(&["chronyc", "-n", "tracking"]).then(|| "yes".to_owned()));
    match answer.as_deref() {
        Some("yes") => {}
        Some("no") => {
            voice.warn(
                "the clock of this host is not synchronized: members whose clocks differ by over 1 s cannot join",
            );
        }
        _ => voice.warn(
            "cannot tell whether the clock of this host is synchronized: members need clocks that agree within 1 s",
        ),
    }
}

fn own_name(voice: &Voice) {
    let name = host_name();
    let found: Vec<IpAddr> =
        (name.as_str(), 0).to_socket_addrs().into_iter().flatten().map(|address| address.ip()).collect();
    match found.first() {
        None => voice
            .warn(&format!("the host name {name} does not resolve: the other members cannot reach this host by it")),
        Some(first) if found.iter().all(IpAddr::is_loopback) => voice.warn(&format!(
            "the host name {name} resolves to this host alone ({first}): the other members cannot reach it by its name"
        )),
        Some(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_in_the_way_only_at_the_nodes_own_address() {
        let other = TcpListener::bind("127.44.0.1:0").unwrap();
        let port = other.local_addr().unwrap().port();
        let at = |address: Option<&str>| Config {
            bind_address: address.map(|text| text.parse().unwrap()),
            management_port_https: Some(port),
            communication_port: None,
            high_availability_port: None,
            ..Config::default()
        };
        assert_eq!(busy_ports(&at(Some("127.44.0.1"))), [port]);
        assert_eq!(busy_ports(&at(None)), [port]);
        assert_eq!(busy_ports(&at(Some("127.44.0.2"))), Vec::<u16>::new());
        assert_eq!(busy_ports(&at(Some("::1"))), Vec::<u16>::new());
    }
}
