//! What the kernel does for some threads before all others, and for some after them. First come those that keep the
//! lease, and those that end it. On a host whose processors are all busy an ordinary thread may wait a tenth of a
//! second for its turn; a PRIMARY whose heartbeats wait like that loses its role without a fault. Must never be asked
//! for by a thread that works for long at a time. Last comes what moves a lot of data: whoever commits must not wait
//! for it.
//!
//! The policy of the first is SCHED_RR with the lowest real-time priority (sched(7)): whatever else is real-time on the
//! host goes first. The kernel keeps real-time threads from taking all of a processor (`sched_rt_runtime_us`). The last
//! have a nice value, so that they get little of a busy processor, but get on.
//!
//! A processor is of no use to a thread whose next instruction has to be read from a disk first: from one that does not
//! answer, or behind all that a host reads again and again that is short of memory. So the program stays in memory.

use std::{io, sync::Once, thread};

use nix::{
    libc::MCL_ONFAULT,
    sys::mman::{MlockAllFlags, mlockall},
};
use thread_priority::{
    Error, NormalThreadSchedulePolicy, RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};
use tokio::{runtime, select, sync::oneshot};
use tracing::info;

/// The priority of threads whose work can wait, as the library counts: a nice value of 10. Such a thread gets a tenth
/// of what an ordinary one gets.
const LOW: u8 = 22;

/// Gives the calling thread real-time priority, and logs once for the process whether that was permitted. A refusal
/// changes nothing else. Threads that it starts have it, too, unless they call [`leisurely`].
pub fn urgent() {
    static SAID: Once = Once::new();
    let refused = try_urgent().err();
    SAID.call_once(|| match refused {
        None => info!("the threads that keep the lease have real-time priority"),
        Some(error) => info!(
            %error,
            "the threads that keep the lease have ordinary priority: while all processors of this host are busy, the \
             lease may lapse (LimitRTPRIO=1 in the unit permits more)"
        ),
    });
}

/// Gives the calling thread real-time priority, without a word.
///
/// # Errors
/// EPERM when this process may not have it: RLIMIT_RTPRIO is 0, or a filter of system calls forbids it.
pub fn try_urgent() -> io::Result<()> {
    set(ThreadPriority::Min, ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin))
}

/// Keeps in memory what is there of the program, and what comes there of it later. Must be called before another thread
/// is started: what threads reserve would count against RLIMIT_MEMLOCK, and what they free could not be given back.
///
/// # Errors
/// EPERM or ENOMEM when this process may not lock so much.
pub fn stay_in_memory() -> io::Result<()> {
    // Only what is used: nobody needs the rest.
    Ok(mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::from_bits_retain(MCL_ONFAULT))?)
}

/// Logs whether the program stays in memory.
pub fn say_if_it_stays(locked: io::Result<()>) {
    match locked {
        Ok(()) => info!("the program stays in memory"),
        Err(error) => info!(
            %error,
            "the program may have to be read from its disk again: while that does not answer, or this host is short of \
             memory, the lease may lapse (LimitMEMLOCK=64M in the unit permits more)"
        ),
    }
}

/// Gives the calling thread a low priority: for work that can wait. Threads that it starts have it, too.
pub fn leisurely() {
    // It may be refused: then the work takes its turn like everything else.
    let low = ThreadPriority::try_from(LOW).unwrap_or(ThreadPriority::Min);
    let _ = set(low, ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Other));
}

/// Carries out `work` on a [leisurely] thread of its own, with a runtime of its own: whatever it starts there is as
/// leisurely, and no task of another runtime waits behind it. The work ends where it is when this future is dropped.
///
/// # Errors
/// When there can be no thread for it.
pub async fn apart<T, F>(name: &'static str, work: impl FnOnce() -> F + Send + 'static) -> io::Result<T>
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    let (mut sender, receiver) = oneshot::channel();
    let run = move || {
        leisurely();
        let result = runtime::Builder::new_current_thread().thread_name(name).enable_all().build().map(|runtime| {
            let result = runtime.block_on(async {
                select! {
                    result = work() => Some(result),
                    () = sender.closed() => None,
                }
            });
            // What waits for a disk that hangs must not keep the result.
            runtime.shutdown_background();
            result
        });
        let _ = sender.send(result); // nobody may wait for it any more
    };
    thread::Builder::new().name(name.to_owned()).spawn(run)?;
    let result = receiver.await.map_err(io::Error::other)??;
    result.ok_or_else(|| io::Error::other("nobody waits for it any more"))
}

fn set(priority: ThreadPriority, policy: ThreadSchedulePolicy) -> io::Result<()> {
    set_thread_priority_and_policy(thread_native_id(), priority, policy).map_err(|error| match error {
        Error::OS(number) => io::Error::from_raw_os_error(number),
        other => io::Error::other(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_can_wait_runs_on_threads_of_a_low_priority() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let found = apart("a test", move || async move { (nice(), tokio::task::spawn_blocking(nice).await.unwrap()) });
        let (work, started) = found.await.unwrap();
        assert!(work == 10 || before > 10, "{work}, and {before} before");
        assert_eq!((started, nice()), (work, before), "the same for what it starts, but not for whoever waits for it");
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_ends() {
        let (alive, mut ended) = tokio::sync::mpsc::channel::<()>(1);
        let work = apart("a test", move || async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        let begun = tokio::time::timeout(std::time::Duration::from_millis(1), work).await;
        assert!(begun.is_err(), "it was dropped while it was under way");
        assert_eq!(ended.recv().await, None);
    }
}
