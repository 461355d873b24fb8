//! The service beside the Console, as the configuration describes it; and how the role goes elsewhere when it does not
//! stay up here.

use std::sync::Arc;

use tracing::{info, warn};
use twistlock_ha::{
    config::Config,
    guard::PortGuard,
    node::{Handle, Warning},
    service::{PlainFolder, Readiness, Runner, Service, Settings, course::Limits},
    supervisor::SupervisorHandle,
};

/// The service of the configuration, and what runs it; none if it names none.
pub(super) fn of(config: &Config, node: &str, guard: PortGuard) -> Option<(Service, Runner)> {
    if config.service_command.is_empty() {
        return None;
    }
    // The rules over these keys have seen to it that there are a folder, and a port or a readiness.
    let folder = config.service_folder.clone()?;
    let first = || config.service_ports.first().map(|pair| Readiness::Tcp(pair.inside));
    let ready = config.service_ready.clone().or_else(first)?;
    warn!(folder = %folder.display(), "the files of the service are not replicated: what it writes stays on this host");
    Some(Service::new(Settings {
        program: "/proc/self/exe".into(),
        words: config.service_command.clone(),
        user: config.service_user.clone(),
        folder: Arc::new(PlainFolder(folder)),
        mark: config.data_folder.clone(),
        ports: config.service_ports.clone(),
        ready,
        limits: Limits {
            ready: config.service_ready_limit,
            stop: config.service_stop_limit,
            restarts: config.service_restarts,
        },
        environment_file: config.service_environment_file.clone(),
        node: node.to_owned(),
        guard: Some(guard),
        cgroups: true,
    }))
}

/// Shows in the status why the service is not ready, and hands the role over when it asks for that.
pub(super) async fn follow(service: Service, ports: SupervisorHandle, handle: Handle) {
    let (mut asks, mut report) = (service.asks(), service.report());
    let mut shown = None;
    loop {
        let asked = tokio::select! {
            changed = asks.changed() => changed.map(|()| true),
            changed = report.changed() => changed.map(|()| false),
        };
        match asked {
            Ok(true) => {
                let Some(why) = asks.borrow_and_update().clone() else { continue };
                info!(reason = why, "the role is handed over because of the service");
                ports.drain("the service does not stay up on this node").await;
                handle.hand_over(None).await;
                // If nobody could take it, it goes on here.
                ports.resume();
            }
            Ok(false) => {
                let problem = report.borrow_and_update().problem.clone();
                if problem != shown {
                    handle.warn(Warning::Service, problem.clone());
                    shown = problem;
                }
            }
            Err(_) => return,
        }
    }
}
