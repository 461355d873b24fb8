//! What the local administrator can do, through the control socket: each operation goes to [`Admin`], which checks, carries
//! out and logs it. Must never do anything that `Admin` would refuse.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{sync::watch, task};
use twistlock_ha::{
    admin::{Actor, Admin, AdminConfig, AdminError, BoxFuture, Invited, Ports},
    ask::{Answers, Asker, Topic},
    backup::{Agreed, BackupConfig, BackupError, Backups, Keep, RestoreFrom},
    cluster::{Membership, NodeId, PROGRAM_VERSION},
    config::Config,
    console::{Inside, LocalAnswer},
    control::{Answer, ApiReply, ControlHandler, JoinScript, Operation, Peer, Place},
    events::{self, Notifier, Recorder, Wanted},
    join::{Kit, KitError},
    node::{Handle, Lease, Status},
    supervisor::SupervisorHandle,
    telemetry,
};

/// The operations of this node.
pub(crate) fn admin(config: &Config, handle: &Handle, ports: SupervisorHandle, inside: Inside) -> Admin {
    let config = AdminConfig {
        certificates: config.data_folder.join("certificates"),
        version: PROGRAM_VERSION.to_owned(),
        https_port: config.management_port_https,
        data: PathBuf::from(&config.data_folder),
    };
    Admin::new(config, handle.clone(), Arc::new(ConsolePorts(ports)), Arc::new(inside))
}

/// The backups of this node.
pub(crate) fn backups(
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
        version: PROGRAM_VERSION.to_owned(),
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
}

/// The handler of the control socket of a member.
pub(crate) struct Administrator {
    pub(crate) admin: Arc<Admin>,
    pub(crate) inside: Inside,
    pub(crate) lease: Lease,
    pub(crate) backups: Arc<Backups>,
    pub(crate) kit: Arc<Kit>,
    /// The data folder.
    pub(crate) data: PathBuf,
    pub(crate) notifier: Notifier,
    /// Newer than that of a status: has every change whose outcome is known.
    pub(crate) membership: watch::Receiver<Arc<Membership>>,
}

impl Administrator {
    async fn carry_out(&self, by: &Actor, operation: Operation) -> Result<Value, AdminError> {
        let admin = &self.admin;
        match operation {
            Operation::Invite { valid_s, script } => {
                let invited = admin.invite(Duration::from_secs(valid_s), by).await?;
                self.join_script(invited, script).await.map(answer)
            }
            Operation::Uninvite {} => admin.uninvite(by).await.map(answer),
            Operation::Apply { fingerprints } => admin.apply(fingerprints, by).await.map(answer),
            Operation::Reject { host } => admin.reject(&host, by).await.map(answer),
            Operation::Remove { node, force } => admin.remove(&node, force, by).await.map(answer),
            Operation::Switchover { to, dry_run: true } => admin.check_switchover(to.as_deref()).map(answer),
            Operation::Switchover { to, dry_run: false } => admin.switchover(to.as_deref(), by).await.map(answer),
            Operation::Pause { seconds } => admin.pause(Duration::from_secs(seconds), by).await.map(answer),
            Operation::Resume {} => admin.resume(by).await.map(answer),
            Operation::RotateKey {} => admin.rotate_cluster_key(by).await.map(answer),
            Operation::RotateCa { overlap_s } => {
                admin.rotate_authority(Duration::from_secs(overlap_s), by).await.map(answer)
            }
            Operation::TestNotifications {} => Ok(answer(admin.test_notifications(by, self.notifier.test()).await)),
            Operation::Events { wanted } => self.events(wanted).await,
            Operation::Readdress { node, new_name, address, port } => {
                admin.readdress(&node, new_name, address, port, by).await.map(answer)
            }
            Operation::Certificates {} => Ok(answer(admin.certificates())),
            Operation::SetConsoleNames { names } => admin.set_console_names(names, by).await.map(answer),
            Operation::SetCertificate { pem } => admin.set_certificate(&pem.0, by).await.map(answer),
            Operation::RemoveCertificate {} => admin.remove_certificate(by).await.map(answer),
            of_backups => self.back_up(by, of_backups).await.map_err(|error| AdminError::Refused(error.to_string())),
        }
    }

    async fn back_up(&self, by: &Actor, operation: Operation) -> Result<Value, BackupError> {
        let backups = &self.backups;
        match operation {
            Operation::Backups {} => backups.all().await.map(answer),
            Operation::BackupState {} => Ok(answer(backups.state().await)),
            Operation::Backup { called } => backups.create(&called, by).await.map(answer),
            Operation::VerifyBackup { id } => backups.verify(&id, by).await.map(answer),
            Operation::RenameBackup { id, called } => backups.rename(&id, &called, by).await.map(answer),
            Operation::DeleteBackup { id } => backups.delete(&id, by).await.map(answer),
            Operation::BackupCopies {} => backups.copies().await.map(answer),
            Operation::FetchBackup { place } => backups.fetch(&place, by).await.map(answer),
            Operation::Restore { file, stop_console, unencrypted } => {
                let from = RestoreFrom::File(&file);
                backups.restore(from, Agreed { stop_console, unencrypted }, by).await.map(answer)
            }
            other => Err(BackupError::Refused(format!("not known here: {other:?}"))),
        }
    }

    fn actor(&self, by: &Peer) -> Actor {
        Actor::local(&by.name, by.uid, &self.admin.status().name)
    }

    async fn events(&self, wanted: Wanted) -> Result<Value, AdminError> {
        let data = self.data.clone();
        let read = task::spawn_blocking(move || events::read(&data, &wanted)).await;
        let read = read.map_err(|error| AdminError::Unknown(error.to_string()))?;
        read.map(answer).map_err(|error| AdminError::Refused(format!("the events cannot be read: {error}")))
    }

    async fn join_script(&self, invited: Invited, script: bool) -> Result<JoinScript, AdminError> {
        let (node, membership) = (self.admin.status().node, self.membership.borrow().clone());
        let Invited { token, until, .. } = invited;
        let refused = |error: KitError| AdminError::Refused(error.to_string());
        let line = self.kit.line(&membership, node, &token).map_err(refused)?;
        let kit = self.kit.clone();
        // Reads the programs whole.
        let read = move || kit.script(&membership, node, &token);
        let script = if script {
            let script = task::spawn_blocking(read).await;
            Some(script.map_err(|error| AdminError::Unknown(error.to_string()))?.map_err(refused)?)
        } else {
            None
        };
        Ok(JoinScript { line, script, until })
    }
}

/// None of the answers has maps with keys that JSON lacks.
fn answer(value: impl serde::Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// What other members ask.
impl Answers for Administrator {
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

impl ControlHandler for Administrator {
    fn status(&self) -> Arc<Status> {
        self.admin.status()
    }

    fn administer(&self, by: Peer, operation: Operation) -> Answer<'_> {
        Box::pin(async move { self.carry_out(&self.actor(&by), operation).await.map_err(|error| error.to_string()) })
    }

    fn api(&self, by: Peer, method: String, path: String, body: Option<Value>) -> Answer<'_> {
        Box::pin(async move {
            let LocalAnswer { status, body, total } = self.inside.call(self.actor(&by), &method, &path, body).await?;
            // As for an answer through a port: a node that does not know whether it is PRIMARY tells nobody anything.
            if !self.lease.is_valid() {
                return Err(
                    "this node lost the primary role meanwhile: look at the status before you try again".to_owned()
                );
            }
            Ok(answer(ApiReply { status, body, total }))
        })
    }

    fn place(&self) -> Place {
        Place { https_port: self.admin.https_port() }
    }

    fn metrics(&self) -> String {
        telemetry::metrics_handle().map(|handle| handle.render()).unwrap_or_default()
    }
}
