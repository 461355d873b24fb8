//! What systemd hears of the daemon: that it is up, that it is alive, and when it needs longer.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;
use twistlock_ha::node::{self, Status};

/// How long a start from a fetched database may take, as in the systemd unit.
const LONG_START: Duration = Duration::from_secs(30 * 60);
/// A status that is not renewed for this long comes from a loop that stands still.
const STANDSTILL: Duration = Duration::from_secs(2);

/// Tells systemd, to which this daemon is up already, that a whole database may be put in place before the node's loop
/// turns. That may take as long as a start. [`service_manager`] ends it.
pub(crate) fn begin_long_start() {
    if sd_notify::watchdog_enabled().is_some() {
        let limit = sd_notify::NotifyState::WatchdogUsec(LONG_START.as_micros() as u32);
        let _ = sd_notify::notify(&[limit, sd_notify::NotifyState::Watchdog]);
    }
}

/// Tells systemd that the node is up, what it is, and, as long as its loop turns, that it is alive.
pub(super) async fn service_manager(mut status: watch::Receiver<Arc<Status>>) {
    let watchdog = sd_notify::watchdog_enabled();
    let mut shown = String::new();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    if let Some(usual) = watchdog.and_then(|limit| u32::try_from(limit.as_micros()).ok()) {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::WatchdogUsec(usual)]);
    }
    loop {
        match tokio::time::timeout(STANDSTILL, status.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            // A new process would not help a loop that waits for the disk: it would wait for the same disk.
            Err(_) if node::trouble().is_none() => continue,
            Err(_) => {}
        }
        let now = status.borrow_and_update().clone();
        let line = format!("{} in epoch {}: {}", now.role, now.epoch, now.reason);
        if line != shown {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&line)]);
            shown = line;
        }
        if watchdog.is_some() {
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}
