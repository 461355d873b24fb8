//! Fetches the whole database when this node needs it, and then has the process restart with it. Must never stop trying
//! while the database is needed, and never try again without a pause.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::fetch::{FetchError, Fetched, fetch};
use crate::{
    cluster::{Member, NodeId},
    node::{Handle, Warning},
    peer::PeerIdentity,
    scheduling,
    storage::snapshot::SnapshotError,
};

/// First and longest pause between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// Waits until this node needs the whole database, fetches it, and asks for a restart, which installs it. Returns then,
/// or when the node has ended. `data` is the data folder, and `own` the database file that this node has: it may be
/// old or damaged.
pub async fn refetch(handle: Handle, identity: Arc<PeerIdentity>, data: PathBuf, own: Arc<File>) {
    let mut own = Some(own);
    let me = identity.me;
    let mut wanted = handle.refetch_from();
    let mut pause = PAUSE.0;
    loop {
        // An error means that the node has ended.
        let Ok(from) = wanted.wait_for(Option::is_some).await.map(|from| *from) else { return };
        let Some(member) = source(&handle, &identity, from) else {
            sleep(PAUSE.0).await;
            continue;
        };
        info!(from = member.name, "fetching the whole database");
        let start = Instant::now();
        match fetch_apart(&handle, &identity, &member, &data, own.clone()).await {
            Ok(Fetched { manifest, unchanged }) => {
                handle.warn(Warning::Snapshot, None);
                let index = manifest.record.index;
                let ms = start.elapsed().as_millis() as u64;
                info!(index, bytes = manifest.bytes(), unchanged, ms, "the whole database has been fetched");
                return handle.restart(format!("to install the database of {} at index {index}", member.name));
            }
            Err(error) => {
                give_up(&handle, &member, me, &error);
                // Whatever is wrong with how the two were put together, it must not be so for ever.
                if matches!(error, FetchError::Store(SnapshotError::Damaged(_))) {
                    own = None;
                }
            }
        }
        wanted.mark_unchanged();
        // Goes on at once if somebody else has become primary.
        if timeout(pause, wanted.changed()).await.is_ok() {
            pause = PAUSE.0;
            if wanted.borrow().is_none() {
                handle.warn(Warning::Snapshot, None); // the missing entries have arrived in other ways
            }
        } else {
            pause = (pause * 2).min(PAUSE.1);
        }
    }
}

/// Fetches it on a thread that leaves the processor to whoever commits.
async fn fetch_apart(
    handle: &Handle,
    identity: &Arc<PeerIdentity>,
    member: &Member,
    data: &Path,
    own: Option<Arc<File>>,
) -> Result<Fetched, FetchError> {
    let (handle, identity, member, data) = (handle.clone(), identity.clone(), member.clone(), data.to_owned());
    let work = move || async move {
        let report = |progress| handle.report_sync(identity.me, Some(progress));
        fetch(&identity, &member, &data, own, report).await
    };
    scheduling::apart("snapshot-fetch", work).await?
}

/// The member to ask: the primary, or else the one that was primary when the need was noticed.
fn source(handle: &Handle, identity: &PeerIdentity, from: Option<NodeId>) -> Option<Member> {
    let status = handle.status();
    let primary = status.borrow().primary.filter(|primary| *primary != identity.me).or(from)?;
    // Its address is not looked up in the membership alone: this node may be too far behind to know that the primary
    // has moved.
    identity.roster.member(primary)
}

fn give_up(handle: &Handle, member: &Member, me: NodeId, error: &FetchError) {
    handle.report_sync(me, None);
    warn!(from = member.name, %error, "the whole database could not be fetched; trying again");
    let text = format!("this node needs the whole database, and could not fetch it from {}: {error}", member.name);
    handle.warn(Warning::Snapshot, Some(text));
}
