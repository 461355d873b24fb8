//! The background tasks of a node, by their names. One that ends before the node does is logged, and a vital one ends
//! the node. A panic is not seen here: it ends the process. Must never wait for the end of a task without a limit.

use std::{collections::HashMap, time::Duration};

use tokio::{
    sync::watch,
    task::{Id, JoinSet},
    time::timeout,
};
use tracing::{error, warn};

/// How much earlier than others a task may see the end of the node.
const GRACE: Duration = Duration::from_secs(1);
/// How long the end of all tasks may take when the node ends.
const LIMIT: Duration = Duration::from_secs(1);

/// What the end of a task means while the node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// The node must not run without it.
    Vital,
    /// The node goes on, and somebody has to be told.
    Steady,
    /// Its work is done.
    Finite,
}

/// The tasks that run.
#[derive(Default)]
pub(super) struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, (&'static str, Need)>,
}

impl Tasks {
    /// Starts one.
    pub fn spawn(&mut self, name: &'static str, need: Need, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.running.spawn(task).id();
        self.names.insert(id, (name, need));
    }

    /// Waits until a vital task has ended, and returns why the node must not go on. Logs each steady one that ends.
    /// `node` is a channel that closes when the node ends, which ends tasks, too.
    pub async fn lost<T>(&mut self, mut node: watch::Receiver<T>) -> String {
        while let Some(ended) = self.running.join_next_with_id().await {
            let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
            let Some((name, need)) = self.names.remove(&id) else { continue };
            if need == Need::Finite {
                continue;
            }
            if timeout(GRACE, async { while node.changed().await.is_ok() {} }).await.is_ok() {
                break;
            }
            error!(task = name, "a background task has ended: nobody does its work until this node starts again");
            if need == Need::Vital {
                return format!("the background task \"{name}\" has ended");
            }
        }
        std::future::pending().await
    }

    /// Ends all of them.
    pub async fn end(mut self) {
        self.running.abort_all();
        let all = async {
            while let Some(ended) = self.running.join_next_with_id().await {
                self.names.remove(&ended.map_or_else(|error| error.id(), |(id, ())| id));
            }
        };
        if timeout(LIMIT, all).await.is_err() {
            let mut names: Vec<_> = self.names.values().map(|(name, _)| *name).collect();
            names.sort_unstable();
            warn!(tasks = names.join(", "), "background tasks do not end: the process ends without them");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn only_a_vital_task_ends_the_node() {
        let (_node, runs) = watch::channel(());
        let mut tasks = Tasks::default();
        tasks.spawn("for ever", Need::Vital, pending());
        tasks.spawn("done", Need::Finite, async {});
        tasks.spawn("missed", Need::Steady, async {});
        assert!(timeout(3 * GRACE, tasks.lost(runs.clone())).await.is_err(), "the node goes on without them");
        assert_eq!(tasks.names.len(), 1, "both were seen");
        tasks.spawn("needed", Need::Vital, async {});
        assert_eq!(tasks.lost(runs).await, "the background task \"needed\" has ended");
        timeout(LIMIT, tasks.end()).await.expect("a task that waits can be ended");
    }

    #[tokio::test]
    async fn tasks_that_end_with_the_node_are_not_missed() {
        let (node, runs) = watch::channel(());
        let mut tasks = Tasks::default();
        tasks.spawn("needed", Need::Vital, async {});
        let ends = async {
            tokio::time::sleep(GRACE / 10).await;
            drop(node);
            pending::<()>().await;
        };
        tokio::select! {
            why = tasks.lost(runs) => panic!("{why}"),
            _ = timeout(2 * GRACE, ends) => {}
        }
    }
}
