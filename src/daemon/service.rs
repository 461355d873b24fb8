//! The service beside the Console, as the configuration describes it; how the role goes elsewhere when it does not stay
//! up here; and what of it is on this host alone.

use std::{path::Path, sync::Arc, time::Duration};

use tracing::{info, warn};
use twistlock_ha::{
    config::Config,
    guard::PortGuard,
    node::{Handle, Warning},
    service::{Readiness, Runner, Service, Settings, course::Limits},
    storage::folder::plain::MOST_PLAIN,
    supervisor::SupervisorHandle,
};

use super::folder::MountedFolder;

/// How often it is looked which files are on this host alone.
const LOOK: Duration = Duration::from_secs(1);

/// The service of the configuration in this folder, and what runs it; none if it names none.
pub(super) fn of(
    config: &Config,
    node: &str,
    folder: Arc<MountedFolder>,
    guard: PortGuard,
) -> Option<(Service, Runner)> {
    // The rules over these keys have seen to it that there is a port or a readiness.
    let first = || config.service_ports.first().map(|pair| Readiness::Tcp(pair.inside));
    let ready = config.service_ready.clone().or_else(first)?;
    Some(Service::new(Settings {
        program: "/proc/self/exe".into(),
        words: config.service_command.clone(),
        user: config.service_user.clone(),
        folder,
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

/// Shows in the status what of the service's folder is on this host alone, and why the service cannot run here.
/// `local`: patterns of what nobody misses.
pub(super) async fn watch_files(folder: Arc<MountedFolder>, local: Vec<String>, handle: Handle) {
    let mut times = tokio::time::interval(LOOK);
    times.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut shown = None;
    loop {
        times.tick().await;
        let text = folder.obstacle().map(|why| format!("the service cannot run on this host: {why}"));
        let text = text.or_else(|| {
            let mut files = folder.plain_files();
            let known = files.len();
            files.retain(|file| !local.iter().any(|pattern| fits(pattern, file)));
            let first = files.first()?;
            let what = match (files.len(), known >= MOST_PLAIN) {
                (1, false) => "1 file of the service's folder is no SQLite database, and is".to_owned(),
                (count, false) => format!("{count} files of the service's folder are no SQLite databases, and are"),
                (count, true) => {
                    format!("{count} files or more of the service's folder are no SQLite databases, and are")
                }
            };
            let first = first.display();
            Some(format!("{what} on this host alone (such as {first}): this version does not replicate other files"))
        });
        if text != shown {
            if let Some(text) = text.as_ref().filter(|_| shown.is_none()) {
                warn!("{text}");
            }
            handle.warn(Warning::ServiceFiles, text.clone());
            shown = text;
        }
    }
}

/// True if a pattern of `SERVICE_LOCAL_FILES` means this path: `**` stands for any folders, `*` for any characters of
/// one name.
fn fits(pattern: &str, path: &Path) -> bool {
    let pattern: Vec<&[u8]> = pattern.split('/').map(str::as_bytes).collect();
    let path: Vec<&[u8]> = path.components().map(|part| part.as_os_str().as_encoded_bytes()).collect();
    fits_parts(&pattern, &path)
}

fn fits_parts(pattern: &[&[u8]], path: &[&[u8]]) -> bool {
    match (pattern, path) {
        ([], rest) => rest.is_empty(),
        ([b"**"], rest) => !rest.is_empty(),
        ([b"**", behind @ ..], rest) => (0..=rest.len()).any(|skipped| fits_parts(behind, &rest[skipped..])),
        ([name, behind @ ..], [first, rest @ ..]) => fits_name(name, first) && fits_parts(behind, rest),
        (_, []) => false,
    }
}

fn fits_name(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], rest) => rest.is_empty(),
        ([b'*', behind @ ..], rest) => (0..=rest.len()).any(|skipped| fits_name(behind, &rest[skipped..])),
        ([byte, behind @ ..], [first, rest @ ..]) => byte == first && fits_name(behind, rest),
        (_, []) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_folders_and_names() {
        let fits = |pattern, path| fits(pattern, Path::new(path));
        for (pattern, path) in
            [("cache/**", "cache/a/b"), ("logs/*.log", "logs/a.log"), ("**/x", "a/b/x"), ("**/x", "x"), ("a", "a")]
        {
            assert!(fits(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in
            [("cache/**", "cache"), ("logs/*.log", "logs/a/b.log"), ("a", "a/b"), ("*.log", "x.logs")]
        {
            assert!(!fits(pattern, path), "{pattern} {path}");
        }
    }
}
