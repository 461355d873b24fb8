//! Which threads the kernel runs before all others: those that keep the lease, and those that end it. On a host whose
//! processors are all busy an ordinary thread may wait a tenth of a second for its turn; a PRIMARY whose heartbeats
//! wait like that loses its role without a fault. Must never be asked for by a thread that works for long at a time.
//!
//! The policy is SCHED_RR with the lowest real-time priority (sched(7)): whatever else is real-time on the host goes
//! first. The kernel keeps real-time threads from taking all of a processor (`sched_rt_runtime_us`).

use std::{io, sync::Once};

use thread_priority::{
    Error, NormalThreadSchedulePolicy, RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};
use tracing::info;

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
    set(ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin))
}

/// Gives the calling thread the lowest ordinary priority: for work that can wait.
pub fn leisurely() {
    // It may be refused: then the work takes its turn like everything else.
    let _ = set(ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Other));
}

fn set(policy: ThreadSchedulePolicy) -> io::Result<()> {
    set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy).map_err(|error| match error {
        Error::OS(number) => io::Error::from_raw_os_error(number),
        other => io::Error::other(other),
    })
}
