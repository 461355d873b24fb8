//! Every operation of an administrator, in one place: the Console's API and the control socket both come here, by the
//! one door [`Admin`], which has each operation audited. Owns the checks before a change and the line in the log after
//! it; who may ask is up to the callers. Must never change anything when it refuses, and never log a secret.
//!
//! All but [`Admin::status`], [`Admin::pool_status`], [`Admin::pool_settings`], [`Admin::request_state`] and
//! [`Admin::certificates`] work on the PRIMARY only and name it elsewhere.

mod admission;
mod attempts;
pub mod audit;
mod certificates;
mod closed;
mod door;
mod invitation;
mod members;
mod notifications;
mod pool;
mod rotate;
mod switchover;

use std::{
    net::IpAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    cluster::{Change, Membership, NodeId},
    node::{ChangeError, Handle, Status, trouble},
};

pub use audit::{Act, Actor, Audit, Outcome, Record, Ticket};
pub use certificates::{Certificates, Custom, MAX_UPLOAD, Signer};
pub use door::Admin;
pub use pool::{
    AddedMember, NewMember, PoolAddition, PoolCandidate, PoolHealth, PoolMember, PoolRemoval, PoolSettings, PoolSize,
    PoolStatus, PoolWish, pool_settings, pool_state, pool_status,
};
pub use switchover::{Check, SwitchoverReport};

use admission::Rejections;
use attempts::Attempts;

/// How often a change is tried again while another one is under way, and how far apart: one second in all.
const PATIENCE: u32 = 40;
const PACE: Duration = Duration::from_millis(25);
/// A consensus loop that has not turned for so long stands still.
const STANDSTILL: Duration = Duration::from_secs(1);

/// A future behind a pointer, as traits that are used behind a pointer return it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the operations need to know about this host.
#[derive(Clone, Debug)]
pub struct AdminConfig {
    /// Folder of the certificates and of the key that unseals the authority.
    pub certificates: PathBuf,
    /// Version of this program.
    pub version: String,
    /// `MANAGEMENT_PORT_HTTPS`, the same on all members.
    pub https_port: Option<u16>,
    /// The data folder.
    pub data: PathBuf,
    /// `CLUSTERED_DB_SECRET_FILE`: what hosts that are added to a pool have to know.
    pub pool_secret_file: Option<PathBuf>,
    /// The address to call them from; none: any.
    pub bind: Option<IpAddr>,
}

/// The Console's ports on this node, as the daemon controls them.
pub trait Ports: Send + Sync {
    /// Closes them in order; returns when the database is free. `why` is for the log.
    fn drain(&self, why: &'static str) -> BoxFuture<'_, ()>;
    /// Takes [`Ports::drain`] back.
    fn resume(&self);
    /// Returns when they are open again, or it is known that they will not be; after a few seconds at the latest.
    fn reopened(&self) -> BoxFuture<'_, ()>;
}

/// A new invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invited {
    /// By which the status knows it: see [`crate::cluster::shared::Invitation::id`].
    pub id: String,
    /// The join token: whoever has it may ask to join. Kept nowhere.
    pub token: String,
    /// The authority's certificate, PEM.
    pub ca_pem: String,
    /// When it expires, in seconds since 1970.
    pub until: u64,
    /// `host:port` of the members' Console ports, the primary's first.
    pub addresses: Vec<String>,
}

/// Why an operation was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AdminError {
    /// Only the primary does this.
    #[error("{}", elsewhere(primary.as_deref()))]
    NotPrimary {
        /// Its name, if one is known.
        primary: Option<String>,
    },
    /// Something is in the way; the text says what to do. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// The token does not permit it.
    #[error("{0}")]
    Denied(String),
    /// Too many tokens that were not good; later, this one may be looked at.
    #[error("{0}")]
    TooMany(String),
    /// It may have happened or not: look at the status.
    #[error("{0}")]
    Unknown(String),
}

fn elsewhere(primary: Option<&str>) -> String {
    match primary {
        Some(name) => format!("only the PRIMARY does this: run it on {name}"),
        None => {
            "there is no PRIMARY at the moment: a majority of the members must be up and reach each other".to_owned()
        }
    }
}

impl From<ChangeError> for AdminError {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::NotPrimary => Self::NotPrimary { primary: None },
            ChangeError::Busy => Self::Refused(error.to_string()),
            ChangeError::Impossible(why) => Self::Refused(why),
            ChangeError::Unknown(_) => Self::Unknown(format!("{error}; look at the status before you try again")),
        }
    }
}

/// What is behind the door: the operations themselves.
struct Operations {
    config: AdminConfig,
    handle: Handle,
    ports: Arc<dyn Ports>,
    /// Raft takes one change of the membership at a time: held from the look at the membership to the change.
    changing: tokio::sync::Mutex<()>,
    attempts: Mutex<Attempts>,
    rejections: Mutex<Rejections>,
}

impl Operations {
    fn new(config: AdminConfig, handle: Handle, ports: Arc<dyn Ports>) -> Self {
        Self {
            config,
            handle,
            ports,
            changing: tokio::sync::Mutex::default(),
            attempts: Mutex::default(),
            rejections: Mutex::default(),
        }
    }

    /// The latest picture of this node and what it knows of the others. It says so if it is old.
    fn status(&self) -> Arc<Status> {
        let status = self.handle.status().borrow().clone();
        let silent = self.handle.pulse().age();
        if silent < STANDSTILL {
            return status;
        }
        let why = trouble().unwrap_or_else(|| "the process gets no time, or waits for something".to_owned());
        let mut old = Status::clone(&status);
        old.warnings
            .push(format!("this node stands still, and what it shows is {:.1} s old: {why}", silent.as_secs_f64()));
        Arc::new(old)
    }

    /// The newest membership that this node knows: newer than that of a status, has every change whose outcome is
    /// known.
    fn membership(&self) -> Arc<Membership> {
        self.handle.membership().borrow().clone()
    }

    /// The status of this node if it is PRIMARY.
    fn primary(&self) -> Result<Arc<Status>, AdminError> {
        let status = self.status();
        if status.primary == Some(status.node) {
            return Ok(status);
        }
        let name = status.primary.and_then(|id| status.membership.get(id)).map(|member| member.name.clone());
        Err(AdminError::NotPrimary { primary: name })
    }

    /// Makes a change. The end of an admission is two changes of raft in a row, and the primary gives members their
    /// vote by itself: that another change is under way is worth a moment's patience.
    async fn change(&self, change: Change) -> Result<Arc<Membership>, AdminError> {
        let mut result = self.handle.change(change.clone()).await;
        for _ in 0..PATIENCE {
            let Err(ChangeError::Busy) = result else { break };
            tokio::time::sleep(PACE).await;
            result = self.handle.change(change.clone()).await;
        }
        result.map_err(|error| match AdminError::from(error) {
            AdminError::NotPrimary { .. } => match self.primary() {
                Err(error) => error,
                Ok(_) => AdminError::Refused("the primary role is on its way here: try again".to_owned()),
            },
            other => other,
        })
    }

    /// The ids of the members that are meant by a name, an id or the beginning of a name that fits one member only.
    fn member(membership: &Membership, wanted: &str) -> Result<NodeId, AdminError> {
        let names: Vec<String> = membership.roster.members.iter().map(|member| member.name.clone()).collect();
        let exact = membership.roster.members.iter().find(|member| member.name == wanted);
        let by_id = || membership.roster.members.iter().find(|member| member.id.to_string() == wanted);
        if let Some(member) = exact.or_else(by_id) {
            return Ok(member.id);
        }
        let mut begin =
            membership.roster.members.iter().filter(|member| !wanted.is_empty() && member.name.starts_with(wanted));
        match (begin.next(), begin.next()) {
            (Some(member), None) => Ok(member.id),
            (Some(_), Some(_)) => Err(AdminError::Refused(format!(
                "{wanted:?} fits more than one member: write more of the name ({})",
                names.join(", ")
            ))),
            (None, _) => {
                Err(AdminError::Refused(format!("there is no member {wanted:?}: the members are {}", names.join(", "))))
            }
        }
    }
}
