//! What the receiver says: which pages it has, chunk by chunk, as fast as the primary compares them. Must never offer
//! bytes other than those that it keeps for the answer, and never keep more than a few chunks.

use std::{convert::Infallible, future::pending};

use tokio::{
    io::AsyncWrite,
    sync::mpsc::{self, Receiver, Sender},
    task,
};

use super::frame;
use crate::storage::snapshot::{
    Course, Manifest, Own,
    difference::{KEY, Tagger, read_own},
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

    /// Begins to read this node's own database files on a thread, if it has any.
    pub fn begin(files: Option<Own>, key: &[u8; KEY], manifest: &Manifest) -> Self {
        let ((to_tags, tags), (to_own, own)) = (mpsc::channel(AHEAD), mpsc::channel(AHEAD));
        let (tagger, course) = (Tagger::new(key), Course::new(manifest));
        task::spawn_blocking(move || read(files.as_ref(), &tagger, course, (&to_tags, &to_own)));
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
fn read(own: Option<&Own>, tagger: &Tagger, mut course: Course, (tags, chunks): (&Sender<Vec<u8>>, &Sender<Vec<u8>>)) {
    let mut open = None;
    while let Some((id, record, done)) = course.current() {
        if open.as_ref().is_none_or(|(of, _)| *of != id) {
            open = Some((id, own.and_then(|own| own.file(id))));
        }
        let file = open.as_ref().and_then(|(_, file)| file.as_deref());
        let sent = match file.and_then(|file| read_own(file, &record, done)) {
            Some(bytes) => {
                let list = tagger.tags(done, record.page_size, &bytes);
                course.advance(bytes.len() as u32 / record.page_size);
                chunks.blocking_send(bytes).is_ok() && tags.blocking_send(list).is_ok()
            }
            None => {
                course.skip();
                tags.blocking_send(Vec::new()).is_ok()
            }
        };
        if !sent {
            return; // the transfer may be over
        }
    }
}
