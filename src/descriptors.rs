//! How many files and connections this process may have open. Raises the limit at the start, shares it out between the
//! servers and keeps enough back for files: whatever strangers open, the raft log, the database and the membership find
//! a descriptor. Must never let a child inherit the raised limit: a program that uses `select` cannot bear it.

use std::{
    fs::File,
    io,
    sync::{Mutex, OnceLock},
};

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use crate::{clients::places::Room, mutex::locked, telemetry::DESCRIPTORS_SHORT};

/// With less, the daemon does not start.
pub const LEAST: u64 = 256;
/// Kept for files, links to the other members, timers and pipes. An idle member has about 50 open, a busy PRIMARY 90.
const FILES: u64 = 128;
/// The most that is shared out: more would only cost memory.
const MOST: u64 = 4096;
/// Connections to the service beside the Console, at least and at most.
const SERVICE: (u64, u64) = (16, 16_384);
/// Descriptors that are held so that a file can have one when none is left.
const RESERVE: usize = 16;
/// What programs expect that know nothing of this.
const USUAL: u64 = 1024;

/// The soft limit before it was raised.
static ORIGINAL: OnceLock<rlim_t> = OnceLock::new();
static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// What each server may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Console, HTTPS.
    pub https: usize,
    /// Console, HTTP.
    pub http: usize,
    /// The port for Defenders, without what is left over: see [`for_defenders`].
    pub defender: usize,
    /// Handshakes of those who say that they are members.
    pub peers: usize,
    pub health: usize,
    /// Clients of the control socket.
    pub control: usize,
    /// Clients of the service beside the Console. Each takes two descriptors; they come out of what the others leave.
    pub service: usize,
}

/// Raises the soft limit to the hard one.
///
/// # Errors
/// When that is not enough to work with: one sentence that says what to do.
pub fn raise() -> Result<(), String> {
    let (soft, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| format!("read the limit of open files: {error}"))?;
    let _ = ORIGINAL.set(soft);
    if hard < LEAST {
        return Err(format!(
            "this process may have {hard} files open at most, and needs at least {LEAST}: raise the limit (LimitNOFILE= in the \
             systemd unit, or ulimit -Hn)"
        ));
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        .map_err(|error| format!("raise the limit of open files: {error}"))?;
    fill(&mut locked(&HELD));
    Ok(())
}

fn fill(held: &mut Vec<File>) {
    while held.len() < RESERVE
        && let Ok(file) = File::open("/dev/null")
    {
        held.push(file);
    }
}

/// Opens a file that this node cannot do without. When no descriptor is left, it gets one of those that are held for
/// that.
///
/// # Errors
/// The error of the last attempt, when a reserved descriptor did not help, either.
pub fn open<T>(mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut opened = open();
    if !opened.as_ref().is_err_and(are_short) {
        let mut held = locked(&HELD);
        // The reserve is refilled as soon as possible; a program that has not raised its limit holds none.
        if opened.is_ok() && ORIGINAL.get().is_some() {
            fill(&mut held);
        }
        return opened;
    }
    metrics::counter!(DESCRIPTORS_SHORT).increment(1);
    tracing::error!("no more files can be opened: a reserved place is used for one that is needed");
    let mut held = locked(&HELD);
    while opened.as_ref().is_err_and(are_short) && held.pop().is_some() {
        opened = open();
    }
    opened
}

/// Sets the soft limit to what it was before [`raise`], for a program that begins in this process.
pub fn restore() {
    lower(original());
}

/// The soft limit that children should have.
pub fn original() -> rlim_t {
    ORIGINAL.get().copied().unwrap_or(USUAL)
}

/// Lowers the soft limit of this process; a failure leaves it as it is.
pub fn lower(soft: rlim_t) {
    if let Ok((now, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.min(now), hard);
    }
}

/// What the limit in force allows.
pub fn budget() -> Budget {
    // It can always be read; without it, only the least is certain.
    Budget::of(getrlimit(Resource::RLIMIT_NOFILE).map_or(LEAST, |(soft, _)| soft))
}

impl Budget {
    fn of(limit: u64) -> Self {
        let all = usize::try_from(limit.clamp(LEAST, MOST) - FILES).unwrap_or(0);
        let control = (all / 12).clamp(4, 16);
        let (peers, health) = ((all / 6).clamp(16, 256), (all / 6).clamp(16, 128));
        let console = all - control - peers - health;
        let (http, defender) = ((console / 4).min(512), (console / 8).min(128));
        let service = (limit.saturating_sub(MOST) / 2).clamp(SERVICE.0, SERVICE.1) as usize;
        Self { https: (console - http - defender).min(1024), http, defender, peers, health, control, service }
    }
}

/// How many Defenders may be connected if so many are `wanted`: each has its share of what is not for files and not for
/// the other servers.
pub fn for_defenders(wanted: usize) -> usize {
    defenders_of(getrlimit(Resource::RLIMIT_NOFILE).map_or(LEAST, |(soft, _)| soft), wanted)
}

fn defenders_of(limit: u64, wanted: usize) -> usize {
    let Budget { https, http, defender, peers, health, control, .. } = Budget::of(limit);
    let others = FILES + (https + http + peers + health + control) as u64;
    let left = usize::try_from(limit.saturating_sub(others)).unwrap_or(usize::MAX);
    wanted.min(left.max(defender))
}

/// Places for Defenders, who may all come from the address of a load balancer once one of them has shown who it is.
/// None is reserved: whoever has not shown that makes room for whoever comes.
pub fn room_for_defenders(places: usize) -> Room {
    Room { places, from_one: places / 2, from_known: places, reserved: 0 }
}

/// Places for connections of which one network gets the half, since all clients behind a load balancer come from the
/// same one.
pub fn room(places: usize) -> Room {
    Room { places, from_one: places / 2, from_known: places / 2, reserved: places / 8 }
}

/// Places of which nobody's share is less than all: whoever uses a service may be behind one load balancer.
pub fn common_room(places: usize) -> Room {
    Room { places, from_one: places, from_known: places, reserved: 0 }
}

/// True if an error says that this process, or the host, has no descriptor left: it passes by itself.
pub fn are_short(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::EMFILE | nix::libc::ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_a_descriptor_when_none_is_left() {
        ORIGINAL.set(USUAL).unwrap();
        fill(&mut HELD.lock().unwrap());
        let (mut tries, none) = (0, || Err::<(), _>(io::Error::from_raw_os_error(nix::libc::EMFILE)));
        let opened = open(|| {
            tries += 1;
            if tries < 3 { none() } else { Ok(()) }
        });
        assert!(opened.is_ok() && HELD.lock().unwrap().len() == RESERVE - 2);
        assert!(open(none).is_err(), "it is no loop without an end");
        assert!(HELD.lock().unwrap().is_empty());
        open(|| Ok(())).unwrap();
        assert_eq!(HELD.lock().unwrap().len(), RESERVE);
        assert!(open(|| Err::<(), _>(io::ErrorKind::NotFound.into())).is_err_and(|error| !are_short(&error)));
        assert_eq!(HELD.lock().unwrap().len(), RESERVE);
    }

    #[test]
    fn what_is_shared_out_leaves_enough_for_files() {
        for limit in [LEAST, 300, 1024, 4096, 1 << 20, u64::MAX] {
            let budget = Budget::of(limit);
            let Budget { https, http, defender, peers, health, control, .. } = budget;
            let all = (https + http + defender + peers + health + control) as u64;
            assert!(all + FILES <= limit && https >= 40 && control >= 4 && peers >= 16, "{limit}: {budget:?}");
        }
        let ample =
            Budget { https: 1024, http: 512, defender: 128, peers: 256, health: 128, control: 16, service: 7952 };
        assert_eq!(Budget::of(20_000), ample);
        let of = |limit| defenders_of(limit, 12_000);
        assert_eq!([of(LEAST), of(1024), of(4096), of(65_536)], [Budget::of(LEAST).defender, 75, 2032, 12_000]);
        assert_eq!([defenders_of(65_536, 10), defenders_of(u64::MAX, 1 << 20)], [10, 1 << 20]);
        for limit in [LEAST, 300, 1024, 4096, 9000, 65_536] {
            let Budget { https, http, peers, health, control, .. } = Budget::of(limit);
            let all = (https + http + peers + health + control + of(limit)) as u64;
            assert!(all + FILES <= limit, "{limit}: {all}");
        }
    }
}
