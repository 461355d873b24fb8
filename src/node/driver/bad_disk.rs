//! A disk that fails or does not answer: hands the role to a member whose disk works, and shows what is wrong. Must
//! never give the role up when nobody can take it.

use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::Driver;
use crate::{
    cluster::{Cause, Phase},
    node::{
        disk::{REFRESH, distrusted_for, judge, overdue},
        lease::boottime,
        warning::Warning,
    },
    peer::Condition,
    storage::watch,
    telemetry,
};

/// What hangs here may hang on all hosts, for example on shared storage. The others get this long to report it.
const GRACE: Duration = Duration::from_millis(100);
/// The role is not given up again within this time: passing it round would help nobody.
const PAUSE: Duration = Duration::from_secs(10);

impl Driver {
    /// Once per tick.
    pub(super) fn watch_disk(&mut self) {
        let observed = watch::observed();
        let (condition, sentence) = judge(&observed);
        if observed.failures > self.host.disk.failures {
            metrics::counter!(telemetry::DISK_FAILURES).increment(observed.failures - self.host.disk.failures);
            self.host.disk.failures = observed.failures;
        }
        if condition != self.host.disk.condition {
            self.disk_becomes(condition, sentence.as_deref());
        }
        if condition == Condition::Bad {
            self.leave_bad_disk(overdue(&observed).is_some(), distrusted_for(&observed));
        }
        let now = Instant::now();
        if self.host.disk.shown_at.is_none_or(|at| now.duration_since(at) >= REFRESH) {
            let waits = observed.running.iter().flatten().map(|running| running.took).max().unwrap_or_default();
            metrics::gauge!(telemetry::DISK_WAIT).set(waits.as_secs_f64());
            metrics::gauge!(telemetry::DISK_TROUBLE).set(match condition {
                Condition::Good => 0.0,
                Condition::Slow => 1.0,
                Condition::Bad => 2.0,
            });
            self.host.disk.shown_at = Some(now);
            if sentence.is_some() || self.publisher.warns(Warning::DiskTrouble) {
                let advice = self.disk_advice();
                self.publisher.warn(Warning::DiskTrouble, sentence.map(|sentence| sentence + advice));
            }
        }
    }

    /// What the administrator can do about it.
    fn disk_advice(&self) -> &'static str {
        match self.host.disk.condition {
            Condition::Bad if !self.host.disk.no_successor => {
                "; look at this host's disk, and at its kernel log (dmesg)"
            }
            Condition::Bad if self.cluster.is_takeover_paused(boottime()) => {
                "; takeover is paused, so the role stays here: repair this disk, or type twistcli ha resume"
            }
            Condition::Bad => {
                "; no other member with a working disk answers, so the role stays here: repair this disk, or bring another member up"
            }
            _ => "",
        }
    }

    fn disk_becomes(&mut self, condition: Condition, sentence: Option<&str>) {
        let sentence = sentence.unwrap_or_default();
        match condition {
            Condition::Bad => error!("{sentence}"),
            Condition::Slow => info!("{sentence}"),
            Condition::Good => info!("the disk of this host works again"),
        }
        (self.host.disk.condition, self.host.disk.since) = (condition, Instant::now());
        self.host.disk.shown_at = None;
        self.host.disk.no_successor = false;
        self.publisher.disk(condition);
    }

    /// A primary with a bad disk lets another member take over. If the disk still answers, this is a handover: that
    /// member begins as soon as the database is closed here. Otherwise nobody waits for this node: the others elect a
    /// primary when their promises have run out.
    fn leave_bad_disk(&mut self, hangs: bool, bad_for: Duration) {
        let now = boottime();
        let serves = matches!(self.cluster.phase(), Phase::Primary | Phase::Promoting);
        let early = hangs && self.host.disk.since.elapsed() < GRACE;
        if !serves || early || self.host.disk.given_up.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        let paused = self.cluster.is_takeover_paused(now);
        let to = self.members.best_successor().filter(|_| !paused);
        let Some(to) = to else {
            if !std::mem::replace(&mut self.host.disk.no_successor, true) {
                self.host.disk.shown_at = None;
                let why = if paused { "takeover is paused" } else { "no other member could take over" };
                warn!("the disk of this PRIMARY is in trouble, and {why}: the role stays here");
            }
            return;
        };
        self.host.disk.given_up = Some(Instant::now());
        warn!(to, hangs, "the disk of this PRIMARY is in trouble: the role goes to a member whose disk works");
        // As long as the others are told that it is bad: a member that they take for sound must not refuse the role.
        self.cluster.set_unfit_until(now, now + bad_for.as_nanos() as u64);
        if hangs {
            self.cluster.give_up(now, Cause::DiskFailed);
        } else {
            self.cluster.hand_over_because(now, Some(to), Cause::DiskFailed);
        }
    }

    /// False if messages of raft are dropped: what this node cannot write must not reach raft, or the loop would wait
    /// for the disk. That is safe for a former primary: it is not needed for a majority, and gets everything again. A
    /// SECONDARY takes them in, because its answers keep the lease of the primary.
    pub(super) fn takes_in(&self) -> bool {
        self.cluster.phase() != Phase::Demoting || !self.host.disk.is_bad()
    }
}
