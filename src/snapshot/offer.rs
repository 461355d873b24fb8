//! What the receiver says: which pages it has, chunk by chunk, as fast as the primary compares them. Must never offer
//! bytes other than those that it keeps for the answer, and never keep more than a few chunks.

use std::{convert::Infallible, fs::File, future::pending, sync::Arc};

use tokio::{
    io::AsyncWrite,
    sync::mpsc::{self, Receiver, Sender},
    task,
};

use super::frame;
use crate::storage::{
    checkpoint::Record,
    snapshot::difference::{KEY, Tagger, read_own},
};

/// Chunks that have been offered and wait for the answer: what goes through a long line at once.
const AHEAD: usize = 8;

/// An offer that is being made: what to tell the primary, and what to keep for its answers.
pub(super) struct Offer {
    pub tags: Receiver<Vec<u8>>,
    /// The chunks that they are of.
    pub own: Receiver<Vec<u8>>,
}

impl Offer {
    /// For a primary that has not asked.
    pub fn none() -> Self {
        let ((_, tags), (_, own)) = (mpsc::channel(1), mpsc::channel(1));
        Self { tags, own }
    }

    /// Begins to read this node's own database file on a thread, if it has one.
    pub fn begin(file: Option<Arc<File>>, key: &[u8; KEY], record: Record) -> Self {
        let ((to_tags, tags), (to_own, own)) = (mpsc::channel(AHEAD), mpsc::channel(AHEAD));
        let tagger = Tagger::new(key);
        task::spawn_blocking(move || read(file.as_deref(), &tagger, &record, (&to_tags, &to_own)));
        Self { tags, own }
    }
}

/// Tells the primary, and does not return: what comes back says when the transfer is over, and how.
pub(super) async fn tell(mut tags: Receiver<Vec<u8>>, stream: &mut (impl AsyncWrite + Unpin)) -> Infallible {
    while let Some(list) = tags.recv().await {
        if frame::write(stream, frame::TAGS, &list, &[]).await.is_err() {
            break;
        }
    }
    pending().await
}

/// Ends early when nobody wants the chunks any more.
fn read(file: Option<&File>, tagger: &Tagger, record: &Record, (tags, own): (&Sender<Vec<u8>>, &Sender<Vec<u8>>)) {
    let mut done = 0;
    while let Some(bytes) = file.and_then(|file| read_own(file, record, done)) {
        let list = tagger.tags(done, record.page_size, &bytes);
        done += bytes.len() as u32 / record.page_size;
        if own.blocking_send(bytes).is_err() || tags.blocking_send(list).is_err() {
            return;
        }
    }
    if done < record.pages {
        let _ = tags.blocking_send(Vec::new()); // the transfer may be over
    }
}
