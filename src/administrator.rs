//! What the local administrator can do, through the control socket: each operation goes to [`Admin`], which checks, carries
//! out and logs it. Must never do anything that `Admin` would refuse.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde_json::Value;
use twistlock_ha::{
    admin::{Admin, AdminConfig, AdminError, BoxFuture, Invited, Ports},
    config::Config,
    control::{Answer, ControlHandler, JoinScript, Operation},
    node::{Handle, Status},
    supervisor::SupervisorHandle,
    telemetry,
};

/// Who asks, in the log: only the owner of the socket can.
const BY: &str = "the administrator of this host";

/// The operations of this node.
pub(crate) fn admin(config: &Config, handle: &Handle, ports: SupervisorHandle) -> Admin {
    let config = AdminConfig {
        certificates: config.data_folder.join("certificates"),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        console_addresses: Vec::new(),
        https_port: config.management_port_https,
        data: PathBuf::from(&config.data_folder),
    };
    Admin::new(config, handle.clone(), Arc::new(ConsolePorts(ports)))
}

/// The Console's ports, as the supervisor holds them.
struct ConsolePorts(SupervisorHandle);

impl Ports for ConsolePorts {
    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.0.drain())
    }

    fn resume(&self) {
        self.0.resume();
    }
}

/// The handler of the control socket of a member.
pub(crate) struct Administrator(pub(crate) Arc<Admin>);

impl Administrator {
    async fn carry_out(&self, operation: Operation) -> Result<Value, AdminError> {
        let admin = &self.0;
        match operation {
            Operation::Invite { valid_s, script } => {
                let invited = admin.invite(Duration::from_secs(valid_s), BY).await?;
                join_script(&invited, script).map(answer)
            }
            Operation::Uninvite {} => admin.uninvite(BY).await.map(answer),
            Operation::Apply { fingerprints } => {
                self.still_the_same(fingerprints)?;
                admin.apply(BY).await.map(answer)
            }
            Operation::Reject { host } => admin.reject(&host, BY).await.map(answer),
            Operation::Remove { node, force } => admin.remove(&node, force, BY).await.map(answer),
            Operation::Switchover { to, dry_run } => admin.switchover(to.as_deref(), dry_run, BY).await.map(answer),
            Operation::Pause { seconds } => admin.pause(Duration::from_secs(seconds), BY).await.map(answer),
            Operation::Resume {} => admin.resume(BY).await.map(answer),
            Operation::Readdress { node, new_name, address, port } => {
                admin.readdress(&node, new_name, address, port, BY).await.map(answer)
            }
        }
    }

    /// A host must not be admitted whose fingerprint nobody has compared.
    fn still_the_same(&self, compared: Option<Vec<String>>) -> Result<(), AdminError> {
        let Some(mut compared) = compared else { return Ok(()) };
        let status = self.0.status();
        let mut asking: Vec<String> =
            status.membership.requests.iter().map(|request| request.fingerprint.clone()).collect();
        asking.sort();
        compared.sort();
        if asking == compared {
            return Ok(());
        }
        Err(AdminError::Refused(
            "the hosts that ask to join are not those that you have looked at: compare the fingerprints again"
                .to_owned(),
        ))
    }
}

/// None of the answers has maps with keys that JSON lacks.
fn answer(value: impl serde::Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

impl ControlHandler for Administrator {
    fn status(&self) -> Arc<Status> {
        self.0.status()
    }

    fn administer(&self, operation: Operation) -> Answer<'_> {
        Box::pin(async move { self.carry_out(operation).await.map_err(|error| error.to_string()) })
    }

    fn metrics(&self) -> String {
        telemetry::metrics_handle().map(|handle| handle.render()).unwrap_or_default()
    }
}

fn join_script(invited: &Invited, script: bool) -> Result<JoinScript, AdminError> {
    use base64::{Engine, prelude::BASE64_STANDARD};
    if script {
        return Err(AdminError::Refused("the script itself comes from the Console: leave --script out".to_owned()));
    }
    let nowhere = || AdminError::Refused("the Console has no HTTPS port: set MANAGEMENT_PORT_HTTPS".to_owned());
    let address = invited.addresses.first().ok_or_else(nowhere)?;
    let line = format!(
        "curl -fsS --cacert <(base64 -d <<<{}) -H @<(echo 'Authorization: Bearer {}') \
         https://{address}/api/v1/scripts/console.sh | sudo bash",
        BASE64_STANDARD.encode(&invited.ca_pem),
        invited.token
    );
    Ok(JoinScript { line, script: None, until: invited.until })
}
