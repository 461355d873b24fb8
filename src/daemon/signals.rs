//! The signals of the daemon, from its first moment to its last: none is lost between two phases of its life. Must
//! never do more than report them, except for the level of the log.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};
use tokio::sync::watch;
use tracing::{Level, error, info};
use twistlock_ha::{
    config::{self, Config},
    mutex::locked,
    telemetry,
};

/// What was asked of this process.
#[derive(Clone)]
pub(crate) struct Signals {
    stop: watch::Receiver<bool>,
    /// This program no longer heeds signals: they are for the one that comes next in this process.
    left: Arc<Mutex<bool>>,
}

impl Signals {
    /// Takes SIGTERM, SIGINT and SIGHUP from now on. Must be called before another thread is started: threads inherit
    /// what is blocked.
    ///
    /// # Errors
    /// When the system has no thread to wait for them.
    pub(crate) fn take(path: PathBuf, running: Config) -> Result<Self> {
        let mut taken = SigSet::empty();
        taken.extend([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
        taken.thread_block().context("block the signals")?;
        let (sender, stop) = watch::channel(false);
        let left = Arc::new(Mutex::new(false));
        let leaving = Arc::clone(&left);
        let wait = move || {
            loop {
                let signal = taken.wait();
                // The lock is held until the signal is reported: see `leave`.
                let left = locked(&leaving);
                match signal {
                    // It stays pending, as it is blocked, beyond the beginning of another program.
                    Ok(signal) if *left => {
                        let _ = kill(Pid::this(), signal); // a process may always signal itself
                        return;
                    }
                    Ok(Signal::SIGHUP) => reload(&path, &running),
                    Ok(signal) => {
                        info!("{signal}: the role is handed over, then the node stops");
                        sender.send_replace(true);
                    }
                    Err(error) => {
                        error!(%error, "cannot wait for signals: the node stops");
                        sender.send_replace(true);
                        return;
                    }
                }
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(wait).context("start the thread for signals")?;
        Ok(Self { stop, left })
    }

    /// Leaves signals that come from now on to the program that begins in this process next. True if this one was asked
    /// to stop before.
    pub(crate) fn leave(&self) -> bool {
        let mut left = locked(&self.left);
        *left = true;
        *self.stop.borrow()
    }

    /// Returns when SIGTERM or SIGINT has come, also if it came before the call.
    pub(crate) async fn asked_to_stop(&self) {
        // An error means that the thread has ended, which it does after it has asked for a stop only.
        let _ = self.stop.clone().wait_for(|stop| *stop).await;
    }
}

/// SIGHUP reads the configuration again and says what a restart would change.
fn reload(path: &std::path::Path, running: &Config) {
    match config::load(path) {
        Ok(loaded) if loaded.config == *running => info!("SIGHUP: {} has not changed", path.display()),
        Ok(loaded) => {
            telemetry::set_level(Level::from(loaded.config.log_level));
            info!("SIGHUP: LOG_LEVEL of {} is in force; other changes need a restart of this node", path.display());
        }
        Err(errors) => error!("SIGHUP: nothing changed, the file has errors:\n{errors}"),
    }
}
