//! All databases of a primary at one raft index, the Console's and those of a service, for whoever reads them while
//! everybody goes on writing. Must never give out databases that were not of the same moment.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;
use tracing::warn;

use super::{
    backing::Backing,
    catalogue::Catalogue,
    guarded::{Guarded, Still},
    members::Members,
    sqlite::Registry,
};
use crate::storage::{
    database::{Database, DatabaseError},
    snapshot::{Resting, Whole},
};

/// How long the service's transactions may take until none is between its commit and its files.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often that is looked at.
const MOMENT: Duration = Duration::from_millis(1);
/// How often it is tried to find all databases at one index.
const TRIES: u32 = 5;

const BUSY: DatabaseError = DatabaseError::Refused("the databases of the service are busy: try again");

/// Lets the Console's database and those of a service be read as of one raft index. Until the reader drops it, the
/// Console's file rests, and what a service's file loses is laid aside. The service's commits wait meanwhile for a
/// checkpoint of the Console, which has little to do: one is made before.
///
/// # Errors
/// [`DatabaseError::Refused`] when the databases are too busy: try again. Otherwise as [`Database::rest`].
pub fn rest(console: &mut Database, members: &Members, registry: &Registry) -> Result<Whole, DatabaseError> {
    // Whoever reads the Console's file now has it as of an earlier index, and begins again.
    console.checkpoint()?;
    let deadline = Instant::now() + PATIENCE;
    let known = registry.all();
    let mut held = Vec::new();
    for guarded in &known {
        held.push(wait_until(deadline, || guarded.hold_still())?);
    }
    // From here on no database gets an id.
    let _turn = wait_until(deadline, || registry.passage().try_turn())?;
    let is_held = |guarded: &Guarded| held.iter().any(|still| still.is(guarded));
    let news = registry.all().into_iter().any(|guarded| guarded.id().is_some() && !is_held(&guarded));
    if news || registry.passage().is_fenced() {
        return Err(BUSY);
    }
    let catalogue = members.catalogue();
    let last = held.iter().filter(|still| still.id().is_some()).map(Still::index).max();
    let console = rest_at_least(console, last.unwrap_or(0).max(catalogue.changed()))?;
    let service = keep_all(&held, &catalogue, &members.files(), &console).map_err(|error| {
        warn!(%error, "the databases of the service cannot be read as of one moment");
        BUSY
    })?;
    Ok(Whole { console, catalogue, service })
}

/// Has all of them kept as of the index of the Console's.
fn keep_all(
    held: &[Still<'_>],
    catalogue: &Catalogue,
    files: &Path,
    console: &Resting,
) -> io::Result<BTreeMap<u32, Resting>> {
    let backing = Backing::open(files)?;
    let mut service = BTreeMap::new();
    for (id, path) in catalogue.iter() {
        let still = held.iter().find(|still| still.id() == Some(id));
        let still = still.ok_or_else(|| io::Error::other(format!("nobody has database {id} open")))?;
        let wal = || Ok(backing.open_file(&wal_of(path), OFlags::RDONLY)?);
        let (record, kept) = still.keep(console.record().index, wal)?;
        service.insert(id, Resting::of_kept(kept, record, console.hold()));
    }
    Ok(service)
}

fn wait_until<T>(deadline: Instant, mut get: impl FnMut() -> Option<T>) -> Result<T, DatabaseError> {
    loop {
        match get() {
            Some(got) => return Ok(got),
            None if Instant::now() >= deadline => return Err(BUSY),
            None => thread::sleep(MOMENT),
        }
    }
}

/// The Console's database at `last` or later. A transaction of it that began before the service was held still may be
/// on its way: later ones have higher indexes.
fn rest_at_least(console: &mut Database, last: u64) -> Result<Resting, DatabaseError> {
    for _ in 0..TRIES {
        let resting = console.rest()?;
        if resting.record().index >= last {
            return Ok(resting);
        }
        if console.is_unchanged_since_checkpoint() {
            return Ok(resting.raised(last));
        }
        drop(resting);
        thread::sleep(MOMENT);
    }
    Err(BUSY)
}

fn wal_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push("-wal");
    name.into()
}
