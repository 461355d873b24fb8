//! Requests to the database thread for a copy of a SECONDARY's databases. Must never let a caller wait for ever.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{MAILBOX, Shared};
use crate::storage::online_copy::{CopyError, FinishedWhole, WholeCopy, WholeCopyId};

/// How long a caller waits for the database thread, which may have a long transaction to apply.
const COPY_PATIENCE: Duration = Duration::from_secs(30);

pub(super) enum CopyRequest {
    Begin(oneshot::Sender<Result<WholeCopy, CopyError>>),
    Finish(WholeCopyId, oneshot::Sender<Result<FinishedWhole, CopyError>>),
}

/// Sends requests straight to the database thread, so that the consensus loop has nothing to do with them.
#[derive(Clone)]
pub(in crate::node) struct OnlineCopies(pub(super) Arc<Shared>);

impl OnlineCopies {
    pub async fn begin(&self) -> Result<WholeCopy, CopyError> {
        let (reply, wait) = oneshot::channel();
        self.ask(CopyRequest::Begin(reply), wait).await
    }

    pub async fn finish(&self, copy: WholeCopyId) -> Result<FinishedWhole, CopyError> {
        let (reply, wait) = oneshot::channel();
        self.ask(CopyRequest::Finish(copy, reply), wait).await
    }

    /// False if too many wait already.
    fn post(&self, request: CopyRequest) -> bool {
        let waiting = &mut self.0.lock().mailbox.copies;
        let room = waiting.len() < MAILBOX;
        if room {
            waiting.push_back(request);
            self.0.changed.notify_one();
        }
        room
    }

    async fn ask<T>(
        &self,
        request: CopyRequest,
        wait: oneshot::Receiver<Result<T, CopyError>>,
    ) -> Result<T, CopyError> {
        let busy = || CopyError::Ended("the database is busy: try again".to_owned());
        if !self.post(request) {
            return Err(busy());
        }
        // A thread that has ended never answers: the request stays in the mailbox.
        match tokio::time::timeout(COPY_PATIENCE, wait).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(CopyError::Ended("the node stops".to_owned())),
            Err(_) => Err(busy()),
        }
    }
}
