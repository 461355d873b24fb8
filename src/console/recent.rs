//! What was read of the last sessions, so that not every request asks the database for its user. Must never know a
//! session that has ended when its end was reported, nor keep a token: only its digest.

use std::{collections::HashMap, sync::Mutex};

use super::store::Store;
use crate::mutex::locked;

/// Sessions remembered; when there are more, all are read again.
const MOST: usize = 4096;

/// A session and its user, as the database has them.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) name: String,
    pub(super) role: String,
    /// Seconds since 1970.
    pub(super) began: i64,
    /// Seconds since 1970.
    pub(super) expires: i64,
}

/// The sessions that were read since users or sessions have last changed.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Sessions>);

#[derive(Debug, Default)]
struct Sessions {
    /// [`Store::login_revision`] before the first of them was read.
    since: u64,
    found: HashMap<Vec<u8>, Found>,
}

impl Recent {
    /// The session with this digest, if it was read and nothing has changed since.
    pub(super) fn find(&self, store: &Store, digest: &[u8]) -> Option<Found> {
        let sessions = locked(&self.0);
        // Asked for last: what was reported before this request was sent has changed it.
        sessions.found.get(digest).filter(|_| sessions.since == store.login_revision()).cloned()
    }

    /// Remembers what was read after `since`, which [`Store::login_revision`] said.
    pub(super) fn remember(&self, since: u64, digest: Vec<u8>, found: Found) {
        let mut sessions = locked(&self.0);
        if sessions.since != since || sessions.found.len() >= MOST {
            sessions.found.clear();
        }
        sessions.since = since;
        sessions.found.insert(digest, found);
    }
}
