//! What a PRIMARY runs: today the built-in Console. Knows how it starts, becomes ready and stops; never when.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use axum::Router;
use tokio::sync::watch;

use crate::{
    console::{Console, connect_options},
    node::{Serving, Status},
    storage::database::PrimaryDatabase,
};

pub use crate::console::Services;

/// The workload of one term as PRIMARY. Holds the database: it must be stopped and dropped before the node can become
/// SECONDARY.
#[derive(Debug)]
pub struct Workload {
    console: Arc<Console>,
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
        services: Option<Services>,
    ) -> anyhow::Result<Self> {
        let database = serving.borrow().clone().filter(|database| database.epoch == epoch);
        let database = database.ok_or_else(|| anyhow!("this node is not PRIMARY in epoch {epoch} any more"))?;
        let console = Console::new(connect_options(&database), status, services)
            .map_err(|_| anyhow!("the system gives no random bytes"))?;
        Ok(Self { console, _database: database })
    }

    /// Waits until requests can be served. May be given up at any time.
    ///
    /// # Errors
    /// When the database cannot be opened.
    pub async fn ready(&self) -> anyhow::Result<()> {
        self.console.ready().await.context("open the Console's database and its schema")
    }

    /// What serves the requests.
    pub fn router(&self) -> Router {
        self.console.router()
    }

    /// Ends what would go on for as long as a client likes: the ports are about to close in order.
    pub fn wind_down(&self) {
        self.console.wind_down();
    }

    /// Stops: returns when nothing uses the database any more. The caller bounds the time.
    pub async fn stop(self) {
        self.console.stop().await;
    }
}
