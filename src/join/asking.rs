//! The host that joins: asks, waits for APPLY, and takes over what it is given, until it is a member. A level-triggered
//! loop: each round looks at the files and at the cluster's answer anew, so that a crash, another primary, an expired
//! request or a new join script at any time only mean another round. Must never give up by itself while it can still be
//! admitted.

use std::{
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{sync::watch, task, time::sleep};
use tracing::{info, warn};

use super::{
    RequestState,
    client::{Answer, Client},
    files::{Admitted, Asked, Host, JoinFile, Requests},
};
use crate::{
    clock::unix_time_ms,
    cluster::{Membership, NodeId},
    storage::{DataDir, Identity},
};

/// Time between two looks at a request that waits, and at the files.
const ROUND: Duration = Duration::from_secs(1);
/// Longest time between two attempts without a useful answer.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// Time until a token that was refused is tried again: the primary's clock may have been wrong.
const AFTER_REFUSAL: Duration = Duration::from_secs(60);
/// Time until a request that waits is made again: the cluster then has this host's clock of today, not of the first
/// time.
const AGAIN: Duration = Duration::from_secs(60);

/// How far a host has got with joining, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It has not reached the cluster yet; the text says why, once that is known.
    Asking { name: String, problem: Option<String> },
    /// The cluster has its request, and an administrator has to APPLY.
    Waiting { name: String, fingerprint: String, console: String },
    /// It may not join with this token, or was turned down.
    Refused { name: String, reason: String },
    /// It was admitted and fetches the database.
    Admitted { node: NodeId, membership: Box<Membership>, problem: Option<String> },
}

/// A host that was admitted, for [`run`]'s `fetch`.
#[derive(Clone, Copy, Debug)]
pub struct Newcomer<'a> {
    pub node: NodeId,
    pub membership: &'a Membership,
    /// `host:port` of the Console that said so: the primary's, at that time.
    pub console: &'a str,
}

/// True if this data folder is that of a host that is to join.
pub fn wanted(data: &Path) -> bool {
    data.join(super::JOIN_FILE).exists()
}

/// Joins: returns when this host is a member and its data folder has everything that a start needs. `fetch` brings the
/// snapshot into the data folder. May be given up at any time, and begun again.
///
/// # Errors
/// When the data folder holds another node's data, or the disk fails: neither waiting nor a new join script would help.
pub async fn run(
    data: &DataDir,
    host: Host,
    stage: &watch::Sender<Stage>,
    fetch: impl AsyncFn(Newcomer<'_>) -> Result<()>,
) -> Result<Identity> {
    ensure_empty(data)?;
    let certificates = data.path().join("certificates");
    let requests = Requests::prepare(&certificates, &host.name)?;
    let mut joining = Joining { data, host, requests, stage, refused: None, told: None, pause: ROUND };
    info!(host = joining.host.name, "asks to join a cluster");
    loop {
        if let Some(identity) = joining.round(&fetch).await? {
            info!(node = identity.node, cluster = %identity.cluster, "this host has joined");
            return Ok(identity);
        }
        sleep(joining.pause).await;
    }
}

/// Refuses a folder that holds data. Data without an identity belongs to a node that was here before: joining over it
/// would mix the two.
fn ensure_empty(data: &DataDir) -> Result<()> {
    data.check_unused()?;
    let found = ["raft-log", "membership.json"].into_iter().find(|name| data.path().join(name).exists());
    let path = data.path().display();
    ensure!(
        found.is_none(),
        "{path} holds {} of a node but no identity.json: the join script sets such a folder aside, run it again",
        found.unwrap_or_default()
    );
    Ok(())
}

struct Joining<'a> {
    data: &'a DataDir,
    host: Host,
    requests: Requests,
    stage: &'a watch::Sender<Stage>,
    /// The join file that was refused, and when: it is not tried again at once, another one is.
    refused: Option<(JoinFile, Instant)>,
    /// The join file with which the cluster was told about this host last, and when. None at each start of the process:
    /// name, address, port and version may be others than the cluster has.
    told: Option<(JoinFile, Instant)>,
    pause: Duration,
}

impl Joining<'_> {
    /// Looks at everything once. Returns the identity when this host is a member.
    async fn round(&mut self, fetch: &impl AsyncFn(Newcomer<'_>) -> Result<()>) -> Result<Option<Identity>> {
        let file = match JoinFile::read(self.data.path()) {
            Ok(file) => file,
            Err(error) => {
                self.trouble(format!("{error:#}"));
                return Ok(None);
            }
        };
        if self.refused.as_ref().is_some_and(|(old, since)| *old == file && since.elapsed() < AFTER_REFUSAL) {
            return Ok(None);
        }
        let asked = Asked::read(self.data.path())?;
        let (console, answer) = self.question(&file, asked.as_ref()).await?;
        match answer {
            Answer::State(state) => match *state {
                RequestState::Pending { id, fingerprint, .. } => {
                    if asked.as_ref().is_none_or(|asked| asked.id != id) {
                        // Durable before anybody can see the request and click APPLY, which makes the token worthless.
                        Asked { id }.save(self.data.path())?;
                    }
                    self.show(Stage::Waiting { name: self.host.name.clone(), fingerprint, console });
                    (self.refused, self.pause) = (None, ROUND);
                }
                RequestState::Rejected { reason } => {
                    Asked::forget(self.data.path())?;
                    self.refuse(file, format!("turned down: {reason}"));
                }
                state @ RequestState::Admitted { .. } => return self.take_over(state, &file, &console, fetch).await,
            },
            Answer::Denied(reason) => self.refuse(file, reason),
            // The request has expired, or this host was removed before it was complete: the token decides what is next.
            Answer::NotFound => Asked::forget(self.data.path())?,
            Answer::Refused(why) | Answer::Nobody(why) => self.trouble(why),
        }
        Ok(None)
    }

    /// Makes the request, or makes it again when that is due; otherwise asks where it stands.
    async fn question(&mut self, file: &JoinFile, asked: Option<&Asked>) -> Result<(String, Answer)> {
        let told = self.told.as_ref().is_some_and(|(with, at)| with == file && at.elapsed() < AGAIN);
        if asked.is_some() && (told || file.adopted) {
            return self.poll(file, asked).await;
        }
        let answered = self.ask(file).await?;
        let heard = !matches!(answered.1, Answer::Nobody(_) | Answer::Refused(_));
        self.told = heard.then(|| (file.clone(), Instant::now()));
        match answered.1 {
            // The token is good for an hour, the request for a day: it may wait although it can no longer be made.
            Answer::Denied(_) | Answer::Nobody(_) if asked.is_some() => self.poll(file, asked).await,
            _ => Ok(answered),
        }
    }

    async fn ask(&self, file: &JoinFile) -> Result<(String, Answer)> {
        let (client, host) = (Client::new(file)?, self.host.clone());
        let requests = Requests { node: self.requests.node.clone(), console: self.requests.console.clone() };
        let question = move || {
            client.ask(|own: Option<IpAddr>| {
                let address = host.address.clone().or_else(|| own.map(|own| own.to_canonical().to_string()));
                host.request(&requests, &address.unwrap_or_else(|| host.name.clone()), unix_time_ms())
            })
        };
        task::spawn_blocking(question).await.context("ask the cluster")
    }

    async fn poll(&self, file: &JoinFile, asked: Option<&Asked>) -> Result<(String, Answer)> {
        let (client, id) = (Client::new(file)?, asked.map(|asked| asked.id.clone()).unwrap_or_default());
        task::spawn_blocking(move || client.poll(&id)).await.context("ask the cluster")
    }

    async fn take_over(
        &mut self,
        state: RequestState,
        file: &JoinFile,
        console: &str,
        fetch: &impl AsyncFn(Newcomer<'_>) -> Result<()>,
    ) -> Result<Option<Identity>> {
        let admitted = Admitted::save(state, file, &self.data.path().join("certificates"))?;
        let (node, membership) = (admitted.node, &admitted.membership);
        let shown = |problem| Stage::Admitted { node, membership: Box::new(membership.clone()), problem };
        self.show(shown(None));
        match fetch(Newcomer { node, membership, console }).await {
            Ok(()) => admitted.become_member(self.data).map(Some),
            Err(error) => {
                warn!("admitted, but the database could not be fetched: {error:#}; trying again");
                let stage = shown(Some(format!("{error:#}")));
                self.show(stage);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                Ok(None)
            }
        }
    }

    fn refuse(&mut self, file: JoinFile, reason: String) {
        warn!(reason, "this host may not join; it waits for a new join script");
        self.show(Stage::Refused { name: self.host.name.clone(), reason });
        (self.refused, self.pause) = (Some((file, Instant::now())), ROUND);
    }

    fn trouble(&mut self, problem: String) {
        // Logged when it begins and when it changes, not at every attempt.
        let stage = Stage::Asking { name: self.host.name.clone(), problem: Some(problem.clone()) };
        if *self.stage.borrow() != stage {
            warn!(problem, "this host has not reached the cluster yet; trying again");
        }
        self.show(stage);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn show(&self, stage: Stage) {
        self.stage.send_if_modified(|shown| {
            let changed = *shown != stage;
            if let (true, Stage::Waiting { fingerprint, console, .. }) = (changed, &stage) {
                info!(fingerprint, console, "the cluster has the request; an administrator has to APPLY");
            }
            *shown = stage;
            changed
        });
    }
}
