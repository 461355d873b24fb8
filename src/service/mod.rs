//! A service beside the Console: any program, which runs on the PRIMARY alone. [`course`] decides when it is started,
//! opened and ended; [`child`] does it, through the [keeper](keeper); [`proxy`] carries what clients send. Must never
//! let the service run while this node is not PRIMARY, and never decide who is.

mod child;
pub mod course;
mod environment;
mod group;
pub mod keeper;
pub mod output;
pub mod proxy;
mod ready;

use std::{
    fmt::Debug,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

pub use crate::config::service::{PortPair, Readiness};
use crate::guard::PortGuard;
pub use child::Runner;
use output::Journal;

/// Orders that may wait.
const ORDERS: usize = 16;

/// A future that does one thing for a [`Folder`].
pub type Work<'a> = Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>>;

/// The folder of a service's data: it is there while this node is PRIMARY.
pub trait Folder: Debug + Send + Sync {
    /// Where it is.
    fn path(&self) -> &Path;
    /// Makes it ready for the service of this epoch, who runs as this user and group.
    fn serve(&self, epoch: u64, owner: (u32, u32)) -> Work<'_>;
    /// Takes it away: no process of the service is left.
    fn withdraw(&self) -> Work<'_>;
    /// What is in it, as far as that is known.
    fn report(&self) -> FolderReport {
        FolderReport::default()
    }
}

/// What is in the folder of a service on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FolderReport {
    /// It is served: this node is PRIMARY. Nothing of the rest is known otherwise.
    pub served: bool,
    /// In the order of their paths.
    pub databases: Vec<DatabaseReport>,
    /// How many files belong to no database, and are on this host alone; 1000 stands for any larger number.
    pub other_files: u64,
    /// Why something was last refused, in this epoch.
    pub last_refusal: Option<String>,
}

/// A database of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DatabaseReport {
    /// Its number in the raft log; none before its first transaction.
    pub id: Option<u32>,
    /// Below the folder.
    pub path: PathBuf,
    /// How its last transaction in this epoch was made: `wal` or `rollback`; none if there was none.
    pub mode: Option<String>,
    pub page_size: u32,
    pub pages: u32,
    /// Transactions in this epoch.
    pub commits: u64,
    /// Pages with committed content that the application has not copied from its WAL yet.
    pub behind: u64,
}

/// What a service is and how it is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The daemon's program, which runs the keeper: `/proc/self/exe`.
    pub program: PathBuf,
    /// Program and arguments, never empty.
    pub words: Vec<String>,
    /// None: the daemon's own user.
    pub user: Option<String>,
    pub folder: Arc<dyn Folder>,
    /// A folder of this node alone; its processes are known by it after a crash of the daemon.
    pub mark: PathBuf,
    pub ports: Vec<PortPair>,
    pub ready: Readiness,
    pub limits: course::Limits,
    pub environment_file: Option<PathBuf>,
    /// The name of this node.
    pub node: String,
    /// Ends the service when the lease is lost and the daemon cannot; none in tests.
    pub guard: Option<PortGuard>,
    /// Whether a cgroup may be used, if there are any.
    pub cgroups: bool,
}

/// How a service is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// `stopped`, `waiting`, `starting`, `ready`, `stopping` or `killing`.
    pub state: String,
    /// When it came into this state, in milliseconds since 1970.
    pub since_ms: u64,
    /// Its first process.
    pub pid: Option<u32>,
    /// Program and arguments.
    pub command: Vec<String>,
    pub folder: PathBuf,
    /// Ports, as in `SERVICE_PORTS`.
    pub ports: Vec<String>,
    /// How often this node has started it again because it had failed.
    pub restarts: u64,
    /// Why it is not ready although it should be; none if all is well.
    pub problem: Option<String>,
    /// How it ended last.
    pub ended: Option<String>,
    /// An administrator has stopped it on this node.
    pub held: bool,
}

impl Report {
    /// Clients may be let in.
    pub fn is_ready(&self) -> bool {
        self.state == "ready"
    }

    /// Nothing of it is left.
    pub fn is_stopped(&self) -> bool {
        self.state == "stopped"
    }
}

/// What a service is told.
#[derive(Debug)]
enum Order {
    /// This node is PRIMARY in this epoch.
    Run(u64),
    /// It soon is no more, and the service ends in order; or it is no more.
    End { in_order: bool, done: oneshot::Sender<()> },
    /// An administrator wants it to begin again.
    Restart,
    /// An administrator wants it to run (false), or not to (true).
    Hold(bool),
}

/// Handle of a service.
#[derive(Clone, Debug)]
pub struct Service {
    orders: mpsc::Sender<Order>,
    report: watch::Receiver<Report>,
    asks: watch::Receiver<Option<String>>,
    journal: Journal,
    ports: Vec<PortPair>,
    folder: Arc<dyn Folder>,
}

impl Service {
    /// A service that does not run yet, and what runs it: see [`Runner::run`].
    pub fn new(settings: Settings) -> (Self, Runner) {
        let (orders, obeyed) = mpsc::channel(ORDERS);
        let (publish, report) = watch::channel(Report {
            state: "stopped".to_owned(),
            since_ms: crate::clock::unix_time_ms(),
            command: settings.words.clone(),
            folder: settings.folder.path().to_owned(),
            ports: settings.ports.iter().map(PortPair::to_string).collect(),
            ..Report::default()
        });
        let (ask, asks) = watch::channel(None);
        let journal = Journal::default();
        let (ports, folder) = (settings.ports.clone(), Arc::clone(&settings.folder));
        let service = Self { orders, report, asks, journal: journal.clone(), ports, folder };
        (service, Runner::new(settings, obeyed, (publish, ask), journal))
    }

    /// This node is PRIMARY in this epoch: the service shall run, if nobody has stopped it.
    pub async fn run_in(&self, epoch: u64) {
        self.tell(Order::Run(epoch)).await;
    }

    /// Ends it: in order (`SERVICE_STOP_SECONDS`) or at once. Returns when nothing of it is left.
    pub async fn end(&self, in_order: bool) {
        let (done, ended) = oneshot::channel();
        self.tell(Order::End { in_order, done }).await;
        let _ = ended.await; // whoever runs it has ended, and it with it
    }

    /// Begins it again, with what its files say now.
    pub async fn restart(&self) {
        self.tell(Order::Restart).await;
    }

    /// Stops it on this node until this is taken back, whatever the role.
    pub async fn hold(&self, held: bool) {
        self.tell(Order::Hold(held)).await;
    }

    async fn tell(&self, order: Order) {
        // Whoever runs it has ended only with the node.
        let _ = self.orders.send(order).await;
    }

    /// How it is, to read and to wait for.
    pub fn report(&self) -> watch::Receiver<Report> {
        self.report.clone()
    }

    /// Why another member should take the role over; changes each time it should.
    pub fn asks(&self) -> watch::Receiver<Option<String>> {
        self.asks.clone()
    }

    /// What it has written lately.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// What is in its folder.
    pub fn folder(&self) -> FolderReport {
        self.folder.report()
    }

    /// Its ports.
    pub fn ports(&self) -> &[PortPair] {
        &self.ports
    }
}
