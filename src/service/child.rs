//! Runs a service: carries out what its [course](super::course) decides. Owns the keeper, the readiness question and
//! the report. Must never wait for the service without a limit, and never start a second one beside it.

use std::{
    io,
    path::Path,
    pin::Pin,
    process::Stdio,
    time::{Duration, Instant},
};

use nix::unistd::{User, geteuid, getgrouplist};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::{sleep_until, timeout},
};

use super::{
    Order, Report, Settings,
    course::{Action, Course, Event, State},
    environment::environment,
    group::{DEATH, Group},
    keeper::{Account, ENDED, KEEPER, KILL, RUNS, TERMINATE, Task},
    output::{Journal, follow},
    ready::{self, Word},
};
use crate::{
    clock::unix_time_ms,
    config::service::Readiness,
    descriptors,
    guard::Charge,
    telemetry::{SERVICE_RESTARTS, SERVICE_UP},
};

/// How long the keeper may need to take an order.
const ORDER: Duration = Duration::from_secs(1);

/// A keeper and its service.
#[derive(Debug)]
struct Kept {
    keeper: Child,
    orders: ChildStdin,
    reports: Lines<BufReader<ChildStdout>>,
    group: Group,
    /// When it must be gone after it was told to kill.
    doomed: Option<tokio::time::Instant>,
    /// How the service has ended, once nothing of it is left.
    ended: Option<String>,
}

/// Runs one service for as long as the node lives.
pub struct Runner {
    settings: Settings,
    orders: mpsc::Receiver<Order>,
    publish: watch::Sender<Report>,
    asks: watch::Sender<Option<String>>,
    journal: Journal,
    course: Course,
    begin: Instant,
    kept: Option<Kept>,
    /// Returns when the service can be used.
    question: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// The epoch in which this node is PRIMARY.
    epoch: Option<u64>,
    held: bool,
    /// Who waits until nothing of it is left.
    waiting: Vec<oneshot::Sender<()>>,
    /// The folder is there.
    served: bool,
    /// It was said that there are no cgroups.
    warned: bool,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("course", &self.course).field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Runner {
    pub(super) fn new(
        settings: Settings,
        orders: mpsc::Receiver<Order>,
        (publish, asks): (watch::Sender<Report>, watch::Sender<Option<String>>),
        journal: Journal,
    ) -> Self {
        let course = Course::new(settings.limits);
        Self {
            settings,
            orders,
            publish,
            asks,
            journal,
            course,
            begin: Instant::now(),
            kept: None,
            question: None,
            epoch: None,
            held: false,
            waiting: Vec::new(),
            served: false,
            warned: false,
        }
    }

    /// Obeys until the last [handle](super::Service) is gone; nothing of the service is left then.
    pub async fn run(mut self) {
        loop {
            let alarm = self.course.alarm().map(|at| tokio::time::Instant::from_std(self.begin + at));
            let event = tokio::select! {
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => break,
                },
                event = next(&mut self.kept) => {
                    self.kept = None;
                    Some(event)
                }
                () = answered(&mut self.question) => {
                    self.question = None;
                    Some(Event::Ready)
                }
                () = due(alarm) => Some(Event::Alarm),
            };
            self.take(event).await;
        }
        // Its keeper ends it, too, when it sees that this end is closed.
        if let Some(kept) = &mut self.kept {
            kill(kept).await;
        }
    }

    /// What an order means for the course.
    fn obey(&mut self, order: Order) -> Option<Event> {
        match order {
            Order::Run(epoch) => {
                self.epoch = Some(epoch);
                (!self.held).then_some(Event::Wanted)
            }
            Order::End { in_order, done } => {
                self.epoch = None;
                self.waiting.push(done);
                Some(if in_order { Event::Unwanted } else { Event::Doomed })
            }
            Order::Restart => Some(Event::Renewed),
            Order::Hold(held) => {
                self.held = held;
                match (held, self.epoch) {
                    (true, _) => Some(Event::Unwanted),
                    (false, Some(_)) => Some(Event::Wanted),
                    (false, None) => None,
                }
            }
        }
    }

    async fn take(&mut self, event: Option<Event>) {
        let mut next = event;
        let mut ended = None;
        while let Some(event) = next.take() {
            if let Event::Ended(how) = &event {
                self.question = None;
                ended = Some(how.clone());
            }
            for action in self.course.on(self.begin.elapsed(), event) {
                if let Some(event) = self.carry_out(action).await {
                    next = Some(event);
                }
            }
        }
        let stopped = self.course.state() == State::Stopped;
        if stopped
            && std::mem::take(&mut self.served)
            && let Err(error) = self.settings.folder.withdraw().await
        {
            tracing::error!("the folder of the service cannot be taken away: {error}");
        }
        let over = stopped || ended.is_some();
        self.tell(ended);
        if over {
            for done in self.waiting.drain(..) {
                let _ = done.send(()); // it may have given up
            }
        }
    }

    /// Does one thing; what comes of it at once.
    async fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Spawn => {
                if let Err(why) = self.spawn().await {
                    if let Some(mut kept) = self.kept.take() {
                        kill(&mut kept).await;
                    }
                    return Some(Event::Ended(why));
                }
                None
            }
            Action::Terminate => {
                tracing::info!("the service is told to end: it has {:?}", self.settings.limits.stop);
                self.question = None;
                order(self.kept.as_mut(), TERMINATE).await;
                None
            }
            Action::Kill => {
                self.question = None;
                if let Some(kept) = &mut self.kept {
                    kill(kept).await;
                }
                None
            }
            Action::Open => {
                tracing::info!("the service is ready");
                None
            }
            Action::Close => None,
            Action::Failed(why, wait) => {
                metrics::counter!(SERVICE_RESTARTS).increment(1);
                tracing::error!("the service has ended ({why}); it is started again in {wait:?}");
                None
            }
            Action::HandOver(why) => {
                tracing::error!("{why}: another member is to try");
                self.asks.send_replace(Some(why));
                None
            }
        }
    }

    /// Says how it is.
    fn tell(&mut self, ended: Option<String>) {
        let now = self.begin.elapsed();
        let (state, given_up) = (self.course.state(), self.course.is_given_up(now));
        let word = match state {
            State::Stopped => "stopped",
            State::Waiting { .. } => "waiting",
            State::Starting { .. } => "starting",
            State::Ready { .. } => "ready",
            State::Stopping { .. } => "stopping",
            State::Killing => "killing",
        };
        metrics::gauge!(SERVICE_UP).set(f64::from(u8::from(matches!(state, State::Ready { .. }))));
        let (held, restarts) = (self.held, self.course.restarts());
        let pid = self.kept.as_ref().and_then(|kept| kept.keeper.id());
        self.publish.send_if_modified(|report| {
            let before = report.clone();
            if report.state != word {
                (report.state, report.since_ms) = (word.to_owned(), unix_time_ms());
            }
            if let Some(ended) = ended {
                report.ended = Some(ended);
            }
            if pid.is_none() {
                report.pid = None;
            }
            (report.held, report.restarts) = (held, restarts);
            let last = report.ended.clone().unwrap_or_default();
            report.problem = match state {
                State::Waiting { .. } if given_up => Some(format!(
                    "the service does not stay up: {last}; no other member is asked any more, and it is tried again"
                )),
                State::Waiting { .. } => Some(format!("the service has ended: {last}; it is started again")),
                _ => None,
            };
            *report != before
        });
    }

    /// Starts a keeper and its service.
    async fn spawn(&mut self) -> Result<(), String> {
        let what = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let epoch = self.epoch.unwrap_or_default();
        let name = self.settings.user.clone();
        let account = spawn_blocking(move || account(name.as_deref())).await.map_err(|error| error.to_string())??;
        let own = (geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let owner = account.as_ref().map_or(own, |account| (account.user, account.group));
        self.served = true;
        self.settings.folder.serve(epoch, owner).await.map_err(what("its folder cannot be served"))?;
        let group = self.group().await?;
        let word = match self.settings.ready {
            Readiness::Notify => Some(Word::listen(owner.0).map_err(what("no socket for sd_notify"))?),
            _ => None,
        };
        let folder = self.settings.folder.path().to_owned();
        let mut told = vec![
            ("TWISTLOCK_NODE".to_owned(), self.settings.node.clone()),
            ("TWISTLOCK_EPOCH".to_owned(), epoch.to_string()),
            ("TWISTLOCK_FOLDER".to_owned(), folder.display().to_string()),
        ];
        told.extend(word.as_ref().map(|word| ("NOTIFY_SOCKET".to_owned(), word.variable())));
        let environment = environment(self.settings.environment_file.as_deref(), &folder, told)?;
        let cgroup = match &group {
            Group::Cgroup(path) => Some(path.clone()),
            Group::Descendants => None,
        };
        let (files, words) = (descriptors::original(), self.settings.words.clone());
        let task = Task { cgroup, user: account, files, folder, words, environment };
        let mut task = serde_json::to_vec(&task).map_err(|error| error.to_string())?;
        task.push(b'\n');
        let mut kept = keeper(&self.settings.program, group).map_err(what("its keeper cannot be started"))?;
        if let Some(output) = kept.keeper.stderr.take() {
            tokio::spawn(follow(output, self.journal.clone()));
        }
        // Whoever ends it has to be there before it begins.
        if let Some(guard) = &self.settings.guard {
            let charge = charge(&kept).map_err(what("it has nothing to be ended by"))?;
            guard.charge(charge).await.map_err(what("the port guard does not take it over"))?;
        }
        let sent = timeout(DEATH, kept.orders.write_all(&task)).await;
        let kept = self.kept.insert(kept);
        sent.map_err(|_| "its keeper does not take the task".to_owned())?.map_err(what("its keeper"))?;
        let said = timeout(DEATH, kept.reports.next_line()).await;
        let line = said.ok().and_then(Result::ok).flatten().unwrap_or_default();
        let pid = line.strip_prefix(RUNS).and_then(|pid| pid.parse().ok());
        let pid: u32 = pid.ok_or_else(|| "its keeper could not start it".to_owned())?;
        tracing::info!(pid, epoch, "the service is started: {}", self.settings.words.join(" "));
        self.publish.send_modify(|report| report.pid = Some(pid));
        self.question = Some(Box::pin(ready::wait(self.settings.ready.clone(), word)));
        Ok(())
    }

    async fn group(&mut self) -> Result<Group, String> {
        let mark = self.settings.mark.clone();
        let group = if self.settings.cgroups {
            let prepared = spawn_blocking(move || Group::prepare(&mark)).await.map_err(|error| error.to_string())?;
            prepared.map_err(|error| format!("its cgroup cannot be prepared: {error}"))?
        } else {
            Group::Descendants
        };
        if group == Group::Descendants && !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                "there is no cgroup v2 for the service: its processes are found one by one to be ended, and some may live \
                 on if its keeper is killed"
            );
        }
        Ok(group)
    }
}

/// Returns when nothing of the service is left. May be given up at any time.
async fn next(kept: &mut Option<Kept>) -> Event {
    let Some(kept) = kept else { return std::future::pending().await };
    while kept.ended.is_none() {
        let line = tokio::select! {
            line = kept.reports.next_line() => line,
            () = due(kept.doomed) => {
                // It hangs, or is frozen. What it has started is tied to it.
                let _ = kept.keeper.start_kill();
                kept.doomed = None;
                continue;
            }
        };
        match line {
            Ok(Some(line)) => match line.strip_prefix(ENDED) {
                Some(how) => kept.ended = Some(how.to_owned()),
                None => tracing::warn!("the keeper of the service says what is not understood: {line:?}"),
            },
            Ok(None) | Err(_) => {
                let group = kept.group.clone();
                // Without a cgroup, nobody but the keeper knows who belongs to it.
                if matches!(group, Group::Cgroup(_))
                    && let Ok(Err(error)) = spawn_blocking(move || group.kill()).await
                {
                    tracing::error!("{error}");
                }
                kept.ended = Some("its keeper was ended".to_owned());
            }
        }
    }
    // It ends by itself now; a frozen one would be waited for without an end.
    let _ = timeout(ORDER, kept.keeper.wait()).await;
    Event::Ended(kept.ended.take().unwrap_or_default())
}

async fn answered(question: &mut Option<Pin<Box<dyn Future<Output = ()> + Send>>>) {
    match question {
        Some(question) => question.await,
        None => std::future::pending().await,
    }
}

async fn due(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Whether it was taken, is seen by what the keeper says, or by its end.
async fn order(kept: Option<&mut Kept>, order: &[u8]) {
    if let Some(kept) = kept {
        let _ = timeout(ORDER, kept.orders.write_all(order)).await;
    }
}

/// Ends all of a service: by its keeper, and past it, which may hang.
async fn kill(kept: &mut Kept) {
    if let Ok(Some(file)) = kept.group.kill_file() {
        let _ = io::Write::write_all(&mut std::fs::File::from(file), b"1");
    }
    order(Some(kept), KILL).await;
    kept.doomed = Some(tokio::time::Instant::now() + DEATH + ORDER);
}

/// What the port guard ends the service by.
fn charge(kept: &Kept) -> io::Result<Charge> {
    if let Some(file) = kept.group.kill_file()? {
        return Ok(Charge::Cgroup(file));
    }
    let pid = kept.keeper.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let pid = pid.ok_or_else(|| io::Error::other("its keeper has ended"))?;
    Ok(Charge::Keeper(pidfd_open(pid, PidfdFlags::empty())?))
}

fn keeper(program: &Path, group: Group) -> io::Result<Kept> {
    let mut keeper = Command::new(program)
        .arg0("twistlockd")
        .arg(KEEPER)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // No signal of a terminal reaches it.
        .process_group(0)
        .spawn()?;
    let (Some(orders), Some(reports)) = (keeper.stdin.take(), keeper.stdout.take()) else {
        return Err(io::Error::other("it has no pipes"));
    };
    Ok(Kept { keeper, orders, reports: BufReader::new(reports).lines(), group, doomed: None, ended: None })
}

/// The user of this name; none for the daemon's own.
fn account(name: Option<&str>) -> Result<Option<Account>, String> {
    let Some(name) = name else { return Ok(None) };
    let found = User::from_name(name).map_err(|error| format!("SERVICE_USER {name} cannot be looked up: {error}"))?;
    let user = found.ok_or_else(|| format!("SERVICE_USER {name} is no user of this host: useradd --system {name}"))?;
    let c_name = std::ffi::CString::new(name).map_err(|error| error.to_string())?;
    let groups = getgrouplist(&c_name, user.gid).map_err(|error| format!("the groups of {name}: {error}"))?;
    let groups = groups.into_iter().map(nix::unistd::Gid::as_raw).collect();
    Ok(Some(Account { user: user.uid.as_raw(), group: user.gid.as_raw(), groups }))
}
