//! What a PRIMARY runs, and the ports at which it is reached: the built-in Console, and a service beside it if there is
//! one. Knows how it starts, becomes ready and stops, what each port serves and who may connect; never when.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use axum::Router;
use rustls::ServerConfig;
use tokio::sync::{Semaphore, watch};

use crate::{
    clients::places::Room,
    console::{Console, connect_options},
    descriptors,
    node::{Serving, Status},
    service::{Service, proxy::Target},
    storage::database::PrimaryDatabase,
};

pub use crate::console::ConsoleServices;

/// Handshakes of Defenders at once. After a takeover all of them come within seconds, and the first are to be done
/// before the last begin, or all would take too long.
const HANDSHAKES: usize = 256;

/// What people call it, in messages.
pub const NAME: &str = "the Console";
/// What people call the service beside it.
pub const SERVICE_NAME: &str = "the service";

/// The ports of the configuration; none means that the listener is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsolePorts {
    /// `MANAGEMENT_PORT_HTTPS`.
    pub https: Option<u16>,
    /// `MANAGEMENT_PORT_HTTP`.
    pub http: Option<u16>,
    /// `COMMUNICATION_PORT`: for Defenders.
    pub defender: Option<u16>,
}

/// What the workload of each term is started with.
#[derive(Clone, Debug)]
pub struct Setup {
    pub ports: ConsolePorts,
    /// Looked at for each connection.
    pub tls: watch::Receiver<Arc<ServerConfig>>,
    /// For the port of the Defenders, which show a certificate there.
    pub defender_tls: watch::Receiver<Arc<ServerConfig>>,
    /// `DEFENDER_CONNECTIONS`: Defenders that may be connected at once.
    pub defenders: usize,
    /// What the Console does for the cluster; without it, there is none to administer.
    pub services: Option<ConsoleServices>,
    /// What runs beside the Console, and how long its orderly end may take (`SERVICE_STOP_SECONDS`).
    pub service: Option<(Service, Duration)>,
}

/// One port of a workload.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// What it is called in messages and metrics. Endpoints of one name share their places.
    pub name: &'static str,
    pub port: u16,
    pub serves: Serves,
    /// Connections at once, at most, and who gets them.
    pub room: Room,
    /// Whoever is known at this port is known nowhere else.
    pub apart: bool,
}

/// What is behind a port.
#[derive(Clone, Debug)]
pub enum Serves {
    /// HTTP/1.1. A request may turn its connection into something else (RFC 9110 section 7.8), as a WebSocket.
    Http {
        /// The settings also say whether a client has to show a certificate. None: connections are not encrypted.
        tls: Option<watch::Receiver<Arc<ServerConfig>>>,
        router: Router,
        /// TLS handshakes at once; the others wait for their turn. None: as many as come.
        handshakes: Option<Arc<Semaphore>>,
    },
    /// Whatever the service speaks.
    Service(Target),
}

/// The workload of one term as PRIMARY. Holds the database: it must be stopped and dropped before the node can become
/// SECONDARY.
#[derive(Debug)]
pub struct Workload {
    console: Arc<Console>,
    ports: ConsolePorts,
    tls: watch::Receiver<Arc<ServerConfig>>,
    defender_tls: watch::Receiver<Arc<ServerConfig>>,
    defenders: usize,
    epoch: u64,
    service: Option<(Service, Duration)>,
    // After the console: its connections close first.
    _database: Arc<PrimaryDatabase>,
}

impl Workload {
    /// Prepares the workload of this epoch; fast, opens nothing.
    ///
    /// # Errors
    /// When the epoch is over or the system has no random bytes.
    pub fn start(
        epoch: u64,
        status: watch::Receiver<Arc<Status>>,
        serving: &Serving,
        setup: &Setup,
    ) -> anyhow::Result<Self> {
        let database = serving.borrow().clone().filter(|database| database.epoch == epoch);
        let database = database.ok_or_else(|| anyhow!("this node is not PRIMARY in epoch {epoch} any more"))?;
        let console = Console::new(connect_options(&database), status, setup.services.clone())
            .map_err(|_| anyhow!("the system gives no random bytes"))?;
        let (ports, tls, defender_tls) = (setup.ports, setup.tls.clone(), setup.defender_tls.clone());
        let (defenders, service) = (setup.defenders, setup.service.clone());
        Ok(Self { console, ports, tls, defender_tls, defenders, epoch, service, _database: database })
    }

    /// Waits until requests to the Console can be served; the service begins meanwhile. May be given up at any time.
    ///
    /// # Errors
    /// When the database cannot be opened.
    pub async fn ready(&self) -> anyhow::Result<()> {
        if let Some((service, _)) = &self.service {
            service.run_in(self.epoch).await;
        }
        self.console.ready().await.context("open the Console's database and its schema")
    }

    /// The ports of the Console, which are open while it is ready.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let (ConsolePorts { https, http, defender }, budget) = (self.ports, descriptors::budget());
        let one = |port: u16, name, tls, connections| {
            let serves = Serves::Http { tls, router: self.console.router(), handshakes: None };
            Endpoint { name, port, serves, room: descriptors::room(connections), apart: false }
        };
        let https = https.map(|port| one(port, "console", Some(self.tls.clone()), budget.https));
        let http = http.map(|port| one(port, "console_http", None, budget.http));
        let defender = defender.map(|port| Endpoint {
            name: "defender",
            port,
            serves: Serves::Http {
                tls: Some(self.defender_tls.clone()),
                router: self.console.defender_router(),
                handshakes: Some(Arc::new(Semaphore::new(HANDSHAKES))),
            },
            room: descriptors::room_for_defenders(descriptors::for_defenders(self.defenders)),
            apart: true,
        });
        [https, http, defender].into_iter().flatten().collect()
    }

    /// The service beside the Console. Its ports are open while its report says that it is ready.
    pub fn service(&self) -> Option<&Service> {
        self.service.as_ref().map(|(service, _)| service)
    }

    /// The ports of the service.
    pub fn service_endpoints(&self) -> Vec<Endpoint> {
        let room = descriptors::common_room(descriptors::budget().service);
        let pairs = self.service().map_or(&[][..], Service::ports).iter();
        let endpoint = |pair: &crate::service::PortPair| Endpoint {
            name: "service",
            port: pair.outside,
            serves: Serves::Service(Target { port: pair.inside, proxy: pair.proxy }),
            room,
            apart: true,
        };
        pairs.map(endpoint).collect()
    }

    /// Ends what would go on for as long as a client likes: the ports are about to close in order.
    pub fn wind_down(&self) {
        self.console.wind_down();
    }

    /// How much longer than without a service an orderly stop may take.
    pub fn patience(&self) -> Duration {
        self.service.as_ref().map_or(Duration::ZERO, |(_, limit)| *limit)
    }

    /// Stops: returns when nothing uses the database any more, and nothing of the service is left. The service ends in
    /// order or at once. The caller bounds the time.
    pub async fn stop(self, in_order: bool) {
        if let Some((service, _)) = &self.service {
            service.end(in_order).await;
        }
        self.console.stop().await;
    }
}
