//! The course of a service: when it is started, opened to clients, ended, killed, started again and given up. Pure: it
//! gets the time with each event and answers with what is to be done. Must never look at a clock, process or socket.

use std::{collections::VecDeque, time::Duration};

/// Waits before a restart, one failure after the other; the last one stays.
const WAITS: [u64; 7] = [0, 1, 2, 4, 8, 16, 30];
/// Restarts are counted within this span; a service that was ready for as long counts as well.
pub const WINDOW: Duration = Duration::from_secs(60);

/// The limits of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From its start to its readiness.
    pub ready: Duration,
    /// From SIGTERM to SIGKILL.
    pub stop: Duration,
    /// Restarts within [`WINDOW`] before another member is to try.
    pub restarts: u32,
}

/// Where a service stands. Times are those that came with the events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does not run, and shall not.
    Stopped,
    /// It is started again then.
    Waiting { until: Duration },
    /// It runs, and is not ready yet.
    Starting { until: Duration },
    /// Clients are let in.
    Ready { since: Duration },
    /// It was told to end, and is killed then.
    Stopping { until: Duration },
    /// It was killed, and some of it may be left.
    Killing,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It shall run.
    Wanted,
    /// It shall end, in order.
    Unwanted,
    /// It shall end now.
    Doomed,
    /// It shall end in order and begin again.
    Renewed,
    /// It can be used.
    Ready,
    /// Nothing of it is left, or it could not be started at all; says how that came.
    Ended(String),
    /// The time that [`Course::alarm`] named may have come.
    Alarm,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Spawn,
    /// SIGTERM to its first process.
    Terminate,
    /// SIGKILL to all of it.
    Kill,
    /// Let clients in.
    Open,
    /// Let nobody in any more.
    Close,
    /// It has failed, for this reason, and is started again after this time.
    Failed(String, Duration),
    /// Another member should try: why.
    HandOver(String),
}

/// The course of one service through the life of a node.
#[derive(Debug)]
pub struct Course {
    limits: Limits,
    state: State,
    wanted: bool,
    /// What has to be done with it when it has ended.
    verdict: Option<String>,
    failures: VecDeque<Duration>,
    /// Failures one behind the other, without a good span between them.
    in_a_row: usize,
    restarts: u64,
    /// Another member was asked to try, and it has not been good here since.
    handed_over: bool,
}

impl Course {
    /// It does not run yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::Stopped,
            wanted: false,
            verdict: None,
            failures: VecDeque::new(),
            in_a_row: 0,
            restarts: 0,
            handed_over: false,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// How often it was started again.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// True if it fails here again and again, and no other member is asked any more.
    pub fn is_given_up(&self, now: Duration) -> bool {
        self.handed_over && self.too_often(now)
    }

    /// When [`Event::Alarm`] is due; none if nothing is waited for.
    pub fn alarm(&self) -> Option<Duration> {
        match self.state {
            State::Waiting { until } | State::Starting { until } | State::Stopping { until } => Some(until),
            State::Stopped | State::Ready { .. } | State::Killing => None,
        }
    }

    /// Takes an event.
    pub fn on(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match event {
            Event::Wanted => self.wanted(now),
            Event::Unwanted => self.end(now, false),
            Event::Renewed if self.wanted => self.renew(now),
            Event::Renewed => Vec::new(),
            Event::Doomed => self.doom(),
            Event::Ready => self.ready(now),
            Event::Ended(how) => self.ended(now, how),
            Event::Alarm => self.alarmed(now),
        }
    }

    fn wanted(&mut self, now: Duration) -> Vec<Action> {
        self.wanted = true;
        if self.state != State::Stopped {
            return Vec::new(); // it begins when the former one has ended
        }
        (self.failures, self.in_a_row) = (VecDeque::new(), 0);
        self.spawn(now)
    }

    fn spawn(&mut self, now: Duration) -> Vec<Action> {
        self.verdict = None;
        self.state = State::Starting { until: now + self.limits.ready };
        vec![Action::Spawn]
    }

    fn end(&mut self, now: Duration, wanted: bool) -> Vec<Action> {
        self.wanted = wanted;
        let was_open = matches!(self.state, State::Ready { .. });
        match self.state {
            State::Waiting { .. } => {
                self.state = State::Stopped;
                Vec::new()
            }
            State::Starting { .. } | State::Ready { .. } => {
                self.state = State::Stopping { until: now + self.limits.stop };
                let close = was_open.then_some(Action::Close);
                close.into_iter().chain([Action::Terminate]).collect()
            }
            State::Stopped | State::Stopping { .. } | State::Killing => {
                self.verdict = None;
                Vec::new()
            }
        }
    }

    fn renew(&mut self, now: Duration) -> Vec<Action> {
        match self.state {
            State::Waiting { .. } => self.spawn(now),
            _ => self.end(now, true),
        }
    }

    fn doom(&mut self) -> Vec<Action> {
        self.wanted = false;
        self.verdict = None;
        let was_open = matches!(self.state, State::Ready { .. });
        match self.state {
            State::Stopped | State::Killing => Vec::new(),
            State::Waiting { .. } => {
                self.state = State::Stopped;
                Vec::new()
            }
            _ => {
                self.state = State::Killing;
                was_open.then_some(Action::Close).into_iter().chain([Action::Kill]).collect()
            }
        }
    }

    fn ready(&mut self, now: Duration) -> Vec<Action> {
        if !matches!(self.state, State::Starting { .. }) {
            return Vec::new(); // it was told to end meanwhile
        }
        self.state = State::Ready { since: now };
        vec![Action::Open]
    }

    fn ended(&mut self, now: Duration, how: String) -> Vec<Action> {
        let was = std::mem::replace(&mut self.state, State::Stopped);
        let verdict = self.verdict.take();
        match was {
            State::Stopped => Vec::new(),
            State::Waiting { .. } => {
                self.state = was;
                Vec::new()
            }
            State::Starting { .. } => self.failed(now, how),
            State::Ready { since } => {
                if now.saturating_sub(since) >= WINDOW {
                    (self.failures, self.in_a_row, self.handed_over) = (VecDeque::new(), 0, false);
                }
                [vec![Action::Close], self.failed(now, how)].concat()
            }
            State::Killing if self.wanted && verdict.is_some() => self.failed(now, verdict.unwrap_or_default()),
            State::Stopping { .. } | State::Killing if self.wanted => self.spawn(now),
            State::Stopping { .. } | State::Killing => Vec::new(),
        }
    }

    fn failed(&mut self, now: Duration, why: String) -> Vec<Action> {
        let wait = Duration::from_secs(WAITS[self.in_a_row.min(WAITS.len() - 1)]);
        self.in_a_row += 1;
        self.restarts += 1;
        self.failures.push_back(now);
        self.failures.retain(|at| now.saturating_sub(*at) < WINDOW);
        self.state = State::Waiting { until: now + wait };
        let mut actions = vec![Action::Failed(why.clone(), wait)];
        if self.too_often(now) && !self.handed_over {
            self.handed_over = true;
            let count = self.failures.len();
            actions.push(Action::HandOver(format!("the service has failed {count} times within {WINDOW:?}: {why}")));
        }
        actions
    }

    fn too_often(&self, now: Duration) -> bool {
        let recent = self.failures.iter().filter(|at| now.saturating_sub(**at) < WINDOW).count();
        // With long waits between them there are never many within the window.
        recent > self.limits.restarts as usize || self.in_a_row > self.limits.restarts as usize
    }

    fn alarmed(&mut self, now: Duration) -> Vec<Action> {
        if self.alarm().is_none_or(|at| at > now) {
            return Vec::new();
        }
        match self.state {
            State::Waiting { .. } => self.spawn(now),
            State::Starting { .. } => {
                self.verdict = Some(format!("it was not ready within {:?}", self.limits.ready));
                self.state = State::Killing;
                vec![Action::Kill]
            }
            State::Stopping { .. } => {
                self.state = State::Killing;
                vec![Action::Kill]
            }
            State::Stopped | State::Ready { .. } | State::Killing => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { ready: Duration::from_secs(60), stop: Duration::from_secs(10), restarts: 2 };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn ended() -> Event {
        Event::Ended("exit 1".to_owned())
    }

    fn ready(course: &mut Course, now: u64) {
        assert_eq!(course.on(at(now), Event::Wanted), [Action::Spawn]);
        assert_eq!(course.on(at(now), Event::Ready), [Action::Open]);
    }

    #[test]
    fn a_good_service_is_opened_and_ends_in_order() {
        let mut course = Course::new(LIMITS);
        assert_eq!(course.alarm(), None);
        ready(&mut course, 1);
        assert_eq!(course.on(at(2), Event::Wanted), [], "it runs already");
        assert_eq!(course.on(at(100), Event::Alarm), []);
        assert_eq!(course.on(at(100), Event::Unwanted), [Action::Close, Action::Terminate]);
        assert_eq!(course.on(at(101), ended()), []);
        assert_eq!((course.state(), course.restarts()), (State::Stopped, 0));
    }

    #[test]
    fn who_ignores_the_signal_is_killed() {
        let mut course = Course::new(LIMITS);
        ready(&mut course, 1);
        course.on(at(2), Event::Unwanted);
        assert_eq!(course.alarm(), Some(at(12)));
        assert_eq!(course.on(at(11), Event::Alarm), []);
        assert_eq!(course.on(at(12), Event::Alarm), [Action::Kill]);
        assert_eq!(course.on(at(13), Event::Unwanted), [], "once is enough");
        assert_eq!(course.on(at(13), ended()), []);
        assert_eq!(course.state(), State::Stopped);
    }

    #[test]
    fn a_lost_lease_leaves_no_time() {
        let mut course = Course::new(LIMITS);
        ready(&mut course, 1);
        assert_eq!(course.on(at(2), Event::Doomed), [Action::Close, Action::Kill]);
        assert_eq!(course.on(at(2), Event::Ready), [], "too late");
        assert_eq!(course.on(at(3), Event::Wanted), [], "the former one is not gone yet");
        assert_eq!(course.on(at(3), ended()), [Action::Spawn]);
        assert_eq!(course.on(at(4), Event::Unwanted), [Action::Terminate], "nobody was let in");
        assert_eq!(course.on(at(5), Event::Doomed), [Action::Kill], "while it ends, too");
        assert_eq!(course.on(at(5), ended()), []);
        assert_eq!(course.on(at(5), Event::Doomed), []);
    }

    #[test]
    fn failures_wait_longer_and_longer_and_the_role_is_offered_once() {
        let mut course = Course::new(LIMITS);
        let (mut now, mut waits, mut offers) = (1, Vec::new(), 0);
        assert_eq!(course.on(at(now), Event::Wanted), [Action::Spawn]);
        for _ in 0..9 {
            let actions = course.on(at(now), ended());
            let Some(Action::Failed(why, wait)) = actions.first() else { panic!("{actions:?}") };
            assert_eq!(why, "exit 1");
            waits.push(wait.as_secs());
            offers += actions.iter().filter(|action| matches!(action, Action::HandOver(_))).count();
            assert_eq!(offers, usize::from(waits.len() > 2), "after the third failure, and never again");
            now += wait.as_secs();
            assert_eq!(course.on(at(now), Event::Alarm), [Action::Spawn]);
        }
        assert_eq!(waits, [0, 1, 2, 4, 8, 16, 30, 30, 30]);
        assert!(course.is_given_up(at(now)));
        // It stays up for a while, and everything is as at the beginning.
        assert_eq!(course.on(at(now), Event::Ready), [Action::Open]);
        let actions = course.on(at(now + 60), ended());
        assert_eq!(actions, [Action::Close, Action::Failed("exit 1".to_owned(), Duration::ZERO)]);
        assert!(!course.is_given_up(at(now + 60)) && course.restarts() == 10);
    }

    #[test]
    fn the_role_that_comes_back_is_not_offered_again() {
        let mut course = Course::new(Limits { restarts: 0, ..LIMITS });
        course.on(at(1), Event::Wanted);
        assert!(matches!(course.on(at(1), ended())[..], [Action::Failed(..), Action::HandOver(_)]));
        assert_eq!(course.on(at(2), Event::Doomed), [], "it waits");
        assert_eq!(course.on(at(9), Event::Wanted), [Action::Spawn]);
        assert!(!course.is_given_up(at(9)), "not tried yet");
        assert_eq!(course.on(at(9), ended()).len(), 1);
        assert!(course.is_given_up(at(9)));
    }

    #[test]
    fn who_is_never_ready_is_killed_and_that_is_a_failure() {
        let mut course = Course::new(LIMITS);
        course.on(at(1), Event::Wanted);
        assert_eq!(course.on(at(61), Event::Alarm), [Action::Kill]);
        let actions = course.on(at(62), Event::Ended("killed".to_owned()));
        assert_eq!(actions, [Action::Failed("it was not ready within 60s".to_owned(), Duration::ZERO)]);
    }

    #[test]
    fn a_renewal_is_no_failure() {
        let mut course = Course::new(LIMITS);
        assert_eq!(course.on(at(1), Event::Renewed), [], "it is not wanted");
        ready(&mut course, 1);
        assert_eq!(course.on(at(2), Event::Renewed), [Action::Close, Action::Terminate]);
        assert_eq!(course.on(at(3), ended()), [Action::Spawn]);
        assert_eq!(course.restarts(), 0);
        course.on(at(3), ended());
        course.on(at(3), Event::Alarm);
        course.on(at(3), ended());
        assert_eq!(course.state(), State::Waiting { until: at(4) });
        assert_eq!(course.on(at(3), Event::Renewed), [Action::Spawn], "somebody who has mended it need not wait");
    }

    #[test]
    fn what_is_wanted_no_more_is_not_started_again() {
        let mut course = Course::new(LIMITS);
        course.on(at(1), Event::Wanted);
        course.on(at(61), Event::Alarm);
        assert_eq!(course.on(at(61), Event::Unwanted), [], "it is being killed");
        assert_eq!(course.on(at(62), ended()), []);
        assert_eq!(course.state(), State::Stopped);
        assert_eq!(course.on(at(99), Event::Alarm), []);
    }
}
