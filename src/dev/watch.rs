//! Asks the nodes of a dev cluster for their status, again and again, one thread per node, so that a frozen node delays
//! nobody. Must never change anything.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{control, mutex::locked, node::Status};

/// Pause between two questions while somebody looks.
const PERIOD: Duration = Duration::from_millis(100);
/// Pause between two questions when nobody does: the idle cost of a node is not to be ours.
const CALM_PERIOD: Duration = Duration::from_secs(1);
/// A node that takes longer than this for an answer counts as down.
const ANSWER_LIMIT: Duration = Duration::from_millis(400);

/// The newest answers of all nodes.
pub(super) struct Watch {
    answers: Vec<Arc<Mutex<Option<Status>>>>,
    calm: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    /// Starts to ask.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(sockets: Vec<PathBuf>) -> std::io::Result<Self> {
        let (calm, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mut answers = Vec::new();
        for socket in sockets {
            let answer = Arc::new(Mutex::new(None));
            let (mine, calm, stop) = (Arc::clone(&answer), Arc::clone(&calm), Arc::clone(&stop));
            thread::Builder::new().name("watch".into()).spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let status = control::status(&socket, ANSWER_LIMIT).ok();
                    *locked(&mine) = status;
                    thread::sleep(if calm.load(Ordering::Relaxed) { CALM_PERIOD } else { PERIOD });
                }
            })?;
            answers.push(answer);
        }
        Ok(Self { answers, calm, stop })
    }

    /// Asks less often from now on.
    pub(super) fn calm_down(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    /// What each node last said; none for one that does not answer.
    pub(super) fn latest(&self) -> Vec<Option<Status>> {
        let read = |answer: &Arc<Mutex<Option<Status>>>| locked(answer).clone();
        self.answers.iter().map(read).collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
