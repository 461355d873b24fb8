//! The folder of a dev cluster: certificates, one folder per node, and `cluster.json`. Must never start anything.
//!
//! `DIR/authority/` (CA), `DIR/nodeN/twistlock.cfg`, `DIR/nodeN/data/`, `DIR/nodeN/log`, `DIR/cluster.json`,
//! `DIR/lock`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{
    cluster::{ClusterId, Member, Membership, NodeId, roster::SizePolicy},
    config::{self, Config},
    pki::{Authority, ClusterKey},
    storage::{DataDir, DataDirError, Identity, durable_write, make_private_dir},
};

/// `HIGH_AVAILABILITY_PORT` before the offset.
const HA_PORT: u16 = 8086;
/// `MANAGEMENT_PORT_HTTPS` before the offset.
const HTTPS_PORT: u16 = 8083;
/// `COMMUNICATION_PORT` before the offset.
const DEFENDER_PORT: u16 = 8084;
/// `HEALTH_PORT` before the offset.
const HEALTH_PORT: u16 = 8085;
/// Members of a new cluster that nobody wants larger; their addresses are 127.0.0.1 and so on.
const MEMBERS: usize = 3;
/// The administrator that is signed up.
const USER: &str = "admin";
/// Format of the identity file that this program writes.
const IDENTITY_FORMAT: u32 = 1;

/// `cluster.json`: how to use the cluster that runs in a folder. Programs read it; it is replaced at every change of a
/// pid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFile {
    /// Certificate of the authority that signed the Console's certificates.
    pub ca: PathBuf,
    /// Name of the administrator.
    pub user: String,
    /// Password of the administrator.
    pub password: String,
    /// The nodes, in rank order.
    pub nodes: Vec<NodeFile>,
}

/// One node in `cluster.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// `node1` and so on.
    pub name: String,
    /// Address of all its ports.
    pub address: String,
    /// Process id of its daemon; none while it does not run.
    pub pid: Option<u32>,
    /// `https://ADDRESS:PORT` of its Console.
    pub console_url: String,
    /// Its data folder.
    pub data: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
}

/// What a cluster is to be like. What is none is as in the folder, or as in HA mode.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(super) struct Shape {
    /// Added to all ports (8083 to 8086) [default: 0, or what the folder was made with]
    #[arg(long, value_name = "N")]
    port_offset: Option<u16>,
    /// Members, 3 to 7; with more than 3 it is a pool [default: 3, or what the folder was made with]
    #[arg(long, value_name = "N", value_parser = members)]
    members: Option<usize>,
    /// Make a pool, which may grow to 7 members, also of 3
    #[arg(long)]
    pool: bool,
}

fn members(text: &str) -> Result<usize, String> {
    let policy = SizePolicy::pool();
    let number = text.parse().ok().filter(|number| policy.permits(*number));
    number.ok_or_else(|| format!("{policy} are allowed"))
}

impl Shape {
    fn members(&self) -> usize {
        self.members.unwrap_or(MEMBERS)
    }

    /// How many members there may be.
    fn size(&self) -> SizePolicy {
        let ha = SizePolicy::ha();
        if self.pool || !ha.permits(self.members()) { SizePolicy::pool() } else { ha }
    }
}

/// The folder of a dev cluster, locked for this process.
pub(super) struct Layout {
    dir: PathBuf,
    /// Held for its lock.
    _lock: DataDir,
    pub(super) cluster: ClusterFile,
    /// True if the folder held a cluster before.
    pub(super) existed: bool,
    port_offset: u16,
}

impl Layout {
    /// Opens the cluster in `dir`, or makes a new one there.
    ///
    /// # Errors
    /// When the folder is in use, holds something else or a cluster with other ports, or cannot be written.
    pub(super) fn open(dir: &Path, shape: Shape) -> Result<Self> {
        let lock = match DataDir::open(dir) {
            Ok(lock) => lock,
            Err(DataDirError::Locked { pid, .. }) => {
                bail!("a dev cluster already runs in {} (pid {pid})", dir.display())
            }
            Err(error) => return Err(error.into()),
        };
        let dir = fs::canonicalize(dir).with_context(|| format!("resolve {}", dir.display()))?;
        let file = dir.join("cluster.json");
        let existing = match fs::read(&file) {
            Ok(text) => Some(serde_json::from_slice(&text).with_context(|| format!("read {}", file.display()))?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        };
        let existed = existing.is_some();
        let (cluster, port_offset) = match existing {
            Some(cluster) => {
                let found = offset_of(&cluster)?;
                let members = cluster.nodes.len();
                let differs = [
                    shape.port_offset.is_some_and(|wanted| wanted != found),
                    shape.members.is_some_and(|wanted| wanted != members),
                ];
                ensure!(
                    !differs.contains(&true),
                    "the cluster in {} was made with --port-offset {found} --members {members}; its members know each \
                     other by it",
                    dir.display()
                );
                (cluster, found)
            }
            None => (describe(&dir, &shape)?, shape.port_offset.unwrap_or(0)),
        };
        let mut layout = Self { dir, _lock: lock, cluster, existed, port_offset };
        if !existed {
            layout.create(shape.size())?;
        }
        for node in &mut layout.cluster.nodes {
            node.pid = None;
        }
        layout.write()?;
        Ok(layout)
    }

    /// Where everything is.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The configuration file of a node.
    pub(super) fn config_path(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("twistlock.cfg")
    }

    /// Where a node's output goes.
    pub(super) fn log_path(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("log")
    }

    fn node_dir(&self, index: usize) -> PathBuf {
        self.dir.join(&self.cluster.nodes[index].name)
    }

    /// All `(address, port)` that the nodes will listen on.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = (&str, u16)> {
        let ports = [HA_PORT, HTTPS_PORT, DEFENDER_PORT].map(|port| port + self.port_offset);
        self.cluster.nodes.iter().flat_map(move |node| ports.map(|port| (node.address.as_str(), port)))
    }

    /// The status page of each node; a folder of an earlier version may have none. They are not among the
    /// [`Self::endpoints`]: a port that is taken costs the page, and nothing else.
    pub(super) fn status_pages(&self) -> Vec<String> {
        let config = |index| config::load(&self.config_path(index)).ok();
        let configs = (0..self.cluster.nodes.len()).filter_map(config);
        configs.filter_map(|loaded| Some(format!("http://{}/status", loaded.config.health_address()?))).collect()
    }

    /// Notes the pids and replaces `cluster.json`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn set_pids(&mut self, pids: &[Option<u32>]) -> Result<()> {
        for (node, pid) in self.cluster.nodes.iter_mut().zip(pids) {
            node.pid = *pid;
        }
        self.write()
    }

    fn write(&self) -> Result<()> {
        let path = self.dir.join("cluster.json");
        let mut text = serde_json::to_vec_pretty(&self.cluster).context("encode cluster.json")?;
        text.push(b'\n');
        durable_write(&path, &text).with_context(|| format!("write {}", path.display()))
    }

    /// Makes authority, certificates, identities and configuration files.
    fn create(&self, size: SizePolicy) -> Result<()> {
        let id = ClusterId(rand::random());
        let authority = Authority::create(id).context("make the certificate authority")?;
        let folder = self.dir.join("authority");
        private_dir(&folder)?;
        authority.save(&folder).context("save the certificate authority")?;
        let port = HA_PORT + self.port_offset;
        let members =
            (1..).zip(&self.cluster.nodes).map(|(id, node)| Member::founder(id, &node.name, &node.address, port));
        let key = ClusterKey::generate();
        let mut membership = Membership::founded(id, members.collect());
        membership.roster.size = size;
        membership.shared.authority = Some(authority.seal(&key).context("seal the certificate authority")?);
        // Every Console may be asked for by every address: a client that tries all of them verifies each.
        membership.shared.console_names = self.cluster.nodes.iter().map(|node| node.address.clone()).collect();
        for (index, node) in self.cluster.nodes.iter().enumerate() {
            self.create_node(index, node, &membership, &authority).with_context(|| format!("set {} up", node.name))?;
            key.save(&node.data.join("certificates"))?;
        }
        Ok(())
    }

    fn create_node(&self, index: usize, node: &NodeFile, membership: &Membership, authority: &Authority) -> Result<()> {
        let id = index as NodeId + 1;
        let data = DataDir::open(&node.data)?;
        let name = node.name.clone();
        let format = IDENTITY_FORMAT;
        data.create_identity(&Identity {
            format,
            cluster: membership.cluster,
            node: id,
            name,
            membership: membership.clone(),
        })?;
        let certificates = node.data.join("certificates");
        private_dir(&certificates)?;
        authority.save_certificate(&certificates)?;
        authority.issue_node(id, &node.name, &[&node.address])?.save_node(&certificates)?;
        let names: Vec<&str> = membership.shared.console_names.iter().map(String::as_str).collect();
        authority.issue_console(&names)?.save_console(&certificates)?;
        let config = Config {
            management_port_https: Some(HTTPS_PORT + self.port_offset),
            communication_port: Some(DEFENDER_PORT + self.port_offset),
            high_availability_port: Some(HA_PORT + self.port_offset),
            health_port: Some(HEALTH_PORT + self.port_offset),
            bind_address: Some(node.address.parse().context("parse the address")?),
            console_cn: Some(node.address.clone()),
            data_folder: node.data.clone(),
            data_recovery_enabled: false,
            data_recovery_volume: self.node_dir(index).join("backup"),
            systemd_enabled: false,
            run_console_as_root: true,
            high_availability_enabled: true,
            ..Config::default()
        };
        let path = self.config_path(index);
        fs::write(&path, config::render(&config)).with_context(|| format!("write {}", path.display()))
    }
}

fn private_dir(path: &Path) -> Result<()> {
    make_private_dir(path).with_context(|| format!("create {}", path.display()))
}

/// The contents of a new `cluster.json`.
fn describe(dir: &Path, shape: &Shape) -> Result<ClusterFile> {
    let port_offset = shape.port_offset.unwrap_or(0);
    ensure!(port_offset <= u16::MAX - HA_PORT, "--port-offset: at most {} is allowed", u16::MAX - HA_PORT);
    let node = |id: usize| {
        let (name, address) = (format!("node{id}"), format!("127.0.0.{id}"));
        let data = dir.join(&name).join("data");
        NodeFile {
            console_url: format!("https://{address}:{}", HTTPS_PORT + port_offset),
            control: data.join(crate::control::SOCKET_NAME),
            pid: None,
            name,
            address,
            data,
        }
    };
    let password = format!("Dev1-{:024x}", rand::random::<u128>() >> 32);
    let nodes = (1..=shape.members()).map(node).collect();
    Ok(ClusterFile { ca: dir.join("authority").join("ca.pem"), user: USER.into(), password, nodes })
}

fn offset_of(cluster: &ClusterFile) -> Result<u16> {
    let url = cluster.nodes.first().map(|node| node.console_url.as_str()).unwrap_or_default();
    let port = url.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
    port.and_then(|port| port.checked_sub(HTTPS_PORT)).with_context(|| format!("cluster.json: odd console_url '{url}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offset(port_offset: u16) -> Shape {
        Shape { port_offset: Some(port_offset), ..Shape::default() }
    }

    #[test]
    fn more_than_three_members_are_a_pool() {
        let of = |members, pool| Shape { members, pool, ..Shape::default() }.size();
        assert_eq!([of(None, false), of(Some(3), false)], [SizePolicy::ha(); 2]);
        assert_eq!([of(None, true), of(Some(4), false), of(Some(7), true)], [SizePolicy::pool(); 3]);
        assert!(members("3").is_ok() && members("7").is_ok() && members("2").is_err() && members("8").is_err());
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dev");
        let layout = Layout::open(&dir, Shape { members: Some(5), ..Shape::default() }).unwrap();
        assert_eq!(layout.endpoints().count(), 15);
        let identity = DataDir::open(&layout.cluster.nodes[4].data).unwrap().identity().unwrap();
        let roster = &identity.membership.roster;
        assert_eq!((identity.node, roster.members.len(), roster.size), (5, 5, SizePolicy::pool()));
        drop(layout);
        let other = Layout::open(&dir, Shape { members: Some(4), ..Shape::default() });
        assert!(other.err().unwrap().to_string().contains("--members 5"));
        assert!(Layout::open(&dir, Shape::default()).unwrap().existed);
    }

    #[test]
    fn a_new_folder_is_complete_and_an_old_one_is_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dev");
        let first = Layout::open(&dir, offset(100)).unwrap();
        assert!(!first.existed);
        let loaded = config::load(&first.config_path(2)).unwrap();
        assert!(loaded.notes.is_empty(), "{:?}", loaded.notes);
        assert_eq!(loaded.config.management_port_https, Some(8183));
        assert_eq!(loaded.config.control_socket_path(), first.cluster.nodes[2].control);
        let identity = DataDir::open(&first.cluster.nodes[1].data).unwrap().identity().unwrap();
        assert_eq!((identity.node, identity.membership.roster.members.len()), (2, 3));
        crate::pki::NodeTls::load(&first.cluster.nodes[0].data.join("certificates")).unwrap();
        assert_eq!(first.endpoints().count(), 9);
        assert_eq!(first.status_pages()[2], "http://127.0.0.3:8185/status");
        let cluster = first.cluster.clone();
        assert!(Layout::open(&dir, Shape::default()).err().unwrap().to_string().contains("already runs"));
        drop(first);
        let second = Layout::open(&dir, Shape::default()).unwrap();
        assert!(second.existed && second.cluster == cluster);
        drop(second);
        assert!(Layout::open(&dir, offset(7)).err().unwrap().to_string().contains("--port-offset 100"));
    }
}
