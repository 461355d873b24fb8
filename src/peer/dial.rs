//! Keeps the other members linked: dials, hands the link over, and begins again when it is lost. Finds out whether a
//! peer that vanished is dead. Must never retry without a pause, or suspect a peer that said farewell.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    PeerIdentity,
    codec::{Purpose, Refusal, RefusalCode},
    connect::{Failure, OpenError, Opened, connect, open},
    hello::{Complaints, Subject},
    link::Established,
    links::{Handover, LinkSender, Signal},
};
use crate::cluster::{Member, NodeId};

/// First and longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Longest pause after a refusal: the other side may only be about to learn that this node has been admitted.
const REFUSED_PAUSE: Duration = Duration::from_millis(250);
/// Pause of a node that is no longer a member, or whose program is too old. It goes on because the next answer may come
/// from a member that knows better.
const REMOVED_PAUSE: Duration = Duration::from_secs(5);
/// A link that lasted for this long counts as a good one: after it, dialling starts without a pause.
const STEADY: Duration = Duration::from_secs(1);
/// How long, and how often, a peer whose links dropped is probed. Its port may outlive it by some milliseconds: the
/// port guard holds the socket too and dies only after it.
const PROBE_FOR: Duration = Duration::from_millis(100);
const PROBE_EVERY: Duration = Duration::from_millis(2);

/// Keeps one member dialled.
pub(super) struct Dialler {
    member: Member,
    identity: Arc<PeerIdentity>,
    sender: LinkSender,
    complaints: Arc<Complaints>,
    signal: watch::Receiver<Signal>,
    /// Where the last link went, for probes.
    last: Option<SocketAddr>,
    /// The refusal by which the loop was told that this node was removed, or that its program is too old.
    told: Option<String>,
}

/// Dials a member for as long as the task lives. Waits while [`super::Links`] does not know the member.
pub(super) async fn run(member: Member, identity: Arc<PeerIdentity>, sender: LinkSender, complaints: Arc<Complaints>) {
    while let Some(signal) = sender.wait_for_signal(member.id).await {
        let (member, identity, sender) = (member.clone(), identity.clone(), sender.clone());
        let complaints = complaints.clone();
        Dialler { member, identity, sender, complaints, signal, last: None, told: None }.run().await;
    }
}

impl Dialler {
    /// Dials, hands over, waits until the link is lost, and begins again, until the loop drops the member.
    async fn run(mut self) {
        let mut pause = PAUSE.0;
        let mut lost = false;
        while self.signal.has_changed().is_ok() {
            let mut before = *self.signal.borrow_and_update();
            let result = if lost && before.alive { self.dial_and_probe().await } else { self.dial().await };
            lost = false;
            let mut wait = pause;
            match result {
                Ok((address, link)) => {
                    self.last = Some(address);
                    let start = Instant::now();
                    if self.establish(address, link).await && start.elapsed() > STEADY {
                        pause = PAUSE.0;
                        lost = true;
                        continue;
                    }
                    // A link that was lost so soon may be lost again: look after the peer's life, but do not hurry.
                    before = *self.signal.borrow_and_update();
                    if before.alive && !before.up {
                        self.probe().await;
                    }
                }
                Err(failure) => {
                    wait = self.pause_after(&failure, pause);
                    self.complain(failure);
                }
            }
            // Jitter keeps the members from dialling each other in step.
            let jittered = wait.mul_f64(rand::random_range(0.5..1.0));
            let nudged = self.signal.wait_for(|signal| signal.nudges != before.nudges);
            if timeout(jittered, nudged).await.is_ok() {
                // At once when the peer calls, but not in a circle when links come and go.
                sleep(PROBE_EVERY).await;
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// How long to wait after a failure. Tells the loop of what does not pass by itself.
    fn pause_after(&mut self, failure: &Failure, pause: Duration) -> Duration {
        match failure {
            Failure::Other(OpenError::Refused(Refusal { code: RefusalCode::Removed, reason })) => {
                self.tell(reason, |by, reason| Handover::Removed { by, reason });
                REMOVED_PAUSE
            }
            Failure::Other(OpenError::Refused(Refusal { code: RefusalCode::Outdated, reason })) => {
                self.tell(reason, |by, reason| Handover::Outdated { by, reason });
                REMOVED_PAUSE
            }
            Failure::Other(OpenError::Refused(Refusal { code: RefusalCode::Forgot, reason })) => {
                self.tell(reason, |by, reason| Handover::Forgot { by, reason });
                pause.min(REFUSED_PAUSE)
            }
            Failure::Other(OpenError::Refused(_)) => pause.min(REFUSED_PAUSE),
            _ => pause,
        }
    }

    /// Tells the loop of a refusal, once per reason.
    fn tell(&mut self, reason: &str, event: impl FnOnce(NodeId, String) -> Handover) {
        if self.told.as_deref() != Some(reason) {
            let told = self.sender.hand_over(event(self.member.id, reason.to_owned()));
            self.told = told.then(|| reason.to_owned());
        }
    }

    /// Hands a link over and waits until it is lost. False if the loop did not take it.
    async fn establish(&mut self, address: SocketAddr, link: Established) -> bool {
        let (peer, name) = (self.member.id, &self.member.name);
        // Before the hand-over: the loop may lose the link before this task runs again.
        if !self.sender.change_signal(peer, |signal| (signal.up, signal.alive) = (true, true)) {
            return false;
        }
        if !self.sender.hand_over(Handover::Outbound(peer, link)) {
            self.sender.change_signal(peer, |signal| signal.up = false);
            return false;
        }
        self.complaints.settle(Subject::Dialled(peer));
        info!(peer, name, %address, "linked");
        self.told = None;
        // An error means that the loop has dropped the peer, and its links with it.
        let _ = self.signal.wait_for(|signal| !signal.up).await;
        true
    }

    fn complain(&self, failure: Failure) {
        let (peer, address) = (self.member.id, self.member.place());
        let subject = Subject::Dialled(peer);
        match failure {
            Failure::Other(OpenError::Refused(Refusal { reason, .. })) if self.complaints.is_new(subject, &reason) => {
                warn!(peer, address, reason, "cannot link with this node");
            }
            Failure::Other(OpenError::Unreachable(reason)) if self.complaints.is_new(subject, &reason) => {
                info!(peer, address, reason, "cannot reach this node, trying again");
            }
            Failure::NobodyListens if self.complaints.is_new(subject, "connection refused") => {
                info!(peer, address, reason = "connection refused", "cannot reach this node, trying again");
            }
            Failure::Other(error) => debug!(peer, reason = %error, "still no link"),
            Failure::NobodyListens => debug!(peer, "still no link"),
        }
    }

    /// Dials once, and finds out meanwhile whether the peer is dead. Only a TLS handshake proves it alive: a dead
    /// process's port may accept connections for a moment.
    async fn dial_and_probe(&self) -> Result<(SocketAddr, Established), Failure> {
        let (probe, dial) = (self.probe(), self.dial());
        tokio::pin!(probe, dial);
        tokio::select! {
            biased;
            dead = &mut probe => if dead { Err(Failure::NobodyListens) } else { dial.await },
            result = &mut dial => match result {
                Err(_) if probe.await => Err(Failure::NobodyListens),
                result => result,
            },
        }
    }

    /// True as soon as the peer is known to be dead; false if nothing has shown it in time.
    async fn probe(&self) -> bool {
        let Some(address) = self.last else { return false };
        let end = Instant::now() + PROBE_FOR;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            match timeout(left, connect(&self.identity, address)).await {
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    // The attempt beside this one may have come to the same verdict before.
                    if self.sender.report_dead(self.member.id) || !self.signal.borrow().alive {
                        return true;
                    }
                }
                // A reset instead of an orderly end leaves nothing behind in either kernel.
                Ok(Ok(stream)) => drop(SockRef::from(&stream).set_linger(Some(Duration::ZERO))),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Ok(Err(_)) | Err(_) => return false,
            }
            sleep(PROBE_EVERY).await;
        }
    }

    async fn dial(&self) -> Result<(SocketAddr, Established), Failure> {
        let nobody_listens = |address| {
            // Only where the last link went: another address of the name may never have been the member's.
            if self.last == Some(address) {
                self.sender.report_dead(self.member.id);
            }
        };
        let Opened { address, stream, datagrams } =
            open(&self.identity, &self.member, Purpose::Link, nobody_listens).await?;
        let (socket, tls) = stream.into_inner();
        let datagrams = datagrams.then_some(address);
        match socket.into_std() {
            Ok(socket) => Ok((address, Established { socket, tls: tls.into(), datagrams })),
            Err(error) => Err(Failure::unreachable(error.to_string())),
        }
    }
}
