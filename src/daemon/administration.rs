//! The parts of a node that administrators and other members ask, made of its configuration. Must never decide what may
//! be done: that is up to [`Admin`] and [`Backups`].

use std::{path::PathBuf, sync::Arc};

use serde_json::Value;
use tokio::sync::watch;
use twistlock_ha::{
    admin::{Admin, AdminConfig, BoxFuture, Ports},
    ask::{Answers, Asker, Topic},
    backup::{BackupConfig, Backups, Keep},
    cluster::{Membership, NodeId, program_version},
    config::Config,
    console::Inside,
    events::Recorder,
    node::Handle,
    supervisor::SupervisorHandle,
};

/// The operations of this node.
pub(super) fn admin(config: &Config, handle: &Handle, ports: SupervisorHandle, inside: Inside) -> Admin {
    let config = AdminConfig {
        certificates: config.data_folder.join("certificates"),
        version: program_version().to_owned(),
        https_port: config.management_port_https,
        data: PathBuf::from(&config.data_folder),
        pool_secret_file: config.clustered_db_secret_file.clone(),
        bind: config.bind_address,
    };
    Admin::new(config, handle.clone(), Arc::new(ConsolePorts(ports)), Arc::new(inside))
}

/// The backups of this node.
pub(super) fn backups(
    config: &Config,
    handle: &Handle,
    admin: Arc<Admin>,
    events: Recorder,
    asker: Asker,
) -> Arc<Backups> {
    let keep = Keep {
        daily: config.backup_keep_daily,
        weekly: config.backup_keep_weekly,
        monthly: config.backup_keep_monthly,
    };
    let config = BackupConfig {
        enabled: config.data_recovery_enabled,
        folder: config.data_recovery_volume.clone(),
        keep,
        key_file: config.backup_key_file.clone(),
        url: config.backup_url.clone(),
        credentials: config.backup_credentials_file.clone(),
        delay: config.backup_delay,
        data: config.data_folder.clone(),
        version: program_version().to_owned(),
    };
    Backups::new(config, handle.clone(), admin, events, asker)
}

/// The Console's ports, as the supervisor holds them.
struct ConsolePorts(SupervisorHandle);

impl Ports for ConsolePorts {
    fn drain(&self, why: &'static str) -> BoxFuture<'_, ()> {
        Box::pin(self.0.drain(why))
    }

    fn resume(&self) {
        self.0.resume();
    }

    fn reopened(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.0.reopened())
    }
}

/// Who answers what other members ask.
pub(super) struct Colleague {
    pub(super) inside: Inside,
    pub(super) backups: Arc<Backups>,
    /// Newer than that of a status: has every change whose outcome is known.
    pub(super) membership: watch::Receiver<Arc<Membership>>,
}

impl Answers for Colleague {
    fn answer(&self, from: NodeId, topic: Topic, question: Value) -> BoxFuture<'_, Result<Value, String>> {
        Box::pin(async move {
            match topic {
                Topic::Backups => self.backups.for_member().await.map_err(|error| error.to_string()),
                Topic::Audit => {
                    let membership = self.membership.borrow().clone();
                    let member = membership.get(from).ok_or("only members of the cluster have rows in its audit")?;
                    self.inside.take_over(&member.name, question).await
                }
            }
        })
    }
}
