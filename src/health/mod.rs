//! The health port: plain HTTP on every member, also where the Console's ports are closed: a status page for people,
//! checks for load balancers and monitors. Owns its listener, its thread and what it answers. Must never say that this
//! node serves unless it does while the bytes leave, never take part in a decision, and never show secrets or data.
//!
//! It has a thread of its own from the first moment of the process to the last: it answers while the host asks to join,
//! while the node starts, and while everything else is busy. Each connection carries one request: a check opens one,
//! gets its answer and is done, and an idle client holds nothing.

mod access;
mod answers;
mod checks;
mod claim;
mod metrics;
mod page;
mod report;

use std::{fmt, io, net::SocketAddr, path::PathBuf, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result};
use axum::{Router, extract::ConnectInfo};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};
use tower::ServiceExt;

use crate::{
    clients::{
        self,
        places::{Acquaintances, Place, Places},
    },
    config::Audience,
    descriptors,
    node::{Lease, Pulse, Status},
};
use access::AccessList;
use claim::{Claim, ClaimedStream};

pub use metrics::{MetricsPage, Permission};

/// Longest time for the head of a request.
const HEAD: Duration = Duration::from_secs(2);
/// Longest life of a connection.
const CONNECTION: Duration = Duration::from_secs(10);
/// Largest head of a request in bytes, and the size of the buffers: the smallest that hyper takes.
const BUFFER: usize = 8 << 10;
/// Connections that the kernel keeps waiting.
const BACKLOG: i32 = 128;
/// Wait before the next attempt to open the port.
const RETRY: Duration = Duration::from_secs(1);
/// Pause after an error of accept that does not pass at once, as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Threads for small files, and for names to be looked up.
const HELPERS: usize = 4;

/// What stays the same as long as the process runs.
#[derive(Debug)]
pub struct Settings {
    /// Where to listen.
    pub address: SocketAddr,
    /// This port is only the default: if it is taken, the daemon says so once and runs without it.
    pub optional: bool,
    /// Who is answered.
    pub allow: Audience,
    /// Folder of the certificates.
    pub certificates: PathBuf,
    pub metrics: MetricsPage,
    /// The Console's HTTPS port, which all members are assumed to share.
    pub console_port: Option<u16>,
}

/// What the answers are about at the moment.
#[derive(Clone)]
pub struct Subject {
    pub status: watch::Receiver<Arc<Status>>,
    /// None while no node runs: its host asks to join, or the node starts.
    pub life: Option<Life>,
}

/// What is known of a running node, besides its status.
#[derive(Clone)]
pub struct Life {
    pub lease: Lease,
    pub pulse: Pulse,
    /// Whether the Console's ports are open.
    pub open: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl Subject {
    /// A host without a node, which stays like this until another subject is shown.
    pub fn still(status: Status) -> Self {
        Self { status: watch::channel(Arc::new(status)).1, life: None }
    }
}

/// What the answers are made of.
#[derive(Clone)]
struct Sources {
    settings: Arc<Settings>,
    subject: watch::Receiver<Subject>,
}

impl Sources {
    fn status(&self) -> Arc<Status> {
        let status = self.subject.borrow().status.clone();
        let status = status.borrow();
        Arc::clone(&status)
    }

    /// How long ago the node's loop turned; none while no node runs.
    fn turned(&self) -> Option<Duration> {
        self.subject.borrow().life.as_ref().map(|life| life.pulse.age())
    }

    /// The epoch in which this node serves clients at this very moment: it is PRIMARY, its lease is valid and its ports
    /// are open.
    fn serves(&self) -> Option<u64> {
        let Subject { status, life } = self.subject.borrow().clone();
        let (life, epoch) = (life?, status.borrow().serving()?);
        ((life.open)() && life.lease.is_valid()).then_some(epoch)
    }
}

/// The health port of this process. Goes on after this value is dropped.
pub struct HealthPort {
    subject: watch::Sender<Subject>,
    problem: watch::Receiver<Option<String>>,
}

impl fmt::Debug for HealthPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthPort").finish_non_exhaustive()
    }
}

impl HealthPort {
    /// Serves from now on. A port that cannot be opened is tried again and again: a cluster must not lose a member
    /// because a monitor's port is taken.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn open(settings: Settings, subject: Subject) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(HELPERS)
            .build()
            .context("start the runtime of the health port")?;
        let (subject, shown) = watch::channel(subject);
        let (told, problem) = watch::channel(None);
        let sources = Sources { settings: Arc::new(settings), subject: shown };
        thread::Builder::new()
            .name("health".to_owned())
            .spawn(move || runtime.block_on(serve(sources, told)))
            .context("start the thread of the health port")?;
        Ok(Self { subject, problem })
    }

    /// Answers about this one from now on.
    pub fn show(&self, subject: Subject) {
        self.subject.send_replace(subject);
    }

    /// Why the port is not open, for the status of the node.
    pub fn problem(&self) -> watch::Receiver<Option<String>> {
        self.problem.clone()
    }
}

async fn serve(sources: Sources, told: watch::Sender<Option<String>>) {
    let Settings { address, optional, .. } = *sources.settings;
    let mut shown = None;
    let listener = loop {
        let problem = match listen(address) {
            Ok(listener) => break listener,
            Err(error) if optional => format!(
                "port {address} cannot be opened ({error}): there is no status page on this host until it is free; for another \
                 port, or none, set HEALTH_PORT in twistlock.cfg"
            ),
            Err(error) => format!("the health port {address} is not open: {error}; does another program use it?"),
        };
        if shown.as_ref() != Some(&problem) {
            tracing::warn!("{problem}");
            told.send_replace(Some(problem.clone()).filter(|_| !optional));
            shown = Some(problem);
        }
        sleep(RETRY).await;
    };
    told.send_replace(None);
    tracing::info!(%address, "the health port is open");
    accept(&listener, sources).await;
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = clients::bind(address)?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: &TcpListener, sources: Sources) {
    let (room, members) = (descriptors::room(descriptors::budget().health), Acquaintances::new());
    let places = Places::new("health", room, Arc::clone(&members));
    let (friends, strangers) = (answers::router(sources.clone()), answers::for_strangers(sources.clone()));
    let access = Arc::new(AccessList::new(sources.settings.allow.clone()));
    tokio::spawn(Arc::clone(&access).run(sources.clone()));
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                members.set_members(sources.status().membership.addresses());
                let Some(place) = places.enter(from.ip()).await else { continue };
                let own = stream.local_addr().map(|to| to.ip()).ok();
                let router = if access.lets_in(from.ip(), own) { friends.clone() } else { strangers.clone() };
                let claim = Claim::new(sources.clone());
                tokio::spawn(async move {
                    // A client that is too slow is dropped; what it missed is not worth a line.
                    let _ = timeout(CONNECTION, connection(stream, from, &place, claim, router)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection to the health port: {error}");
                if descriptors::are_short(&error) {
                    places.make_room();
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, from: SocketAddr, place: &Place, claim: Arc<Claim>, router: Router) {
    // Small answers leave at once. It fails only if the client is gone.
    let _ = stream.set_nodelay(true);
    let stream = ClaimedStream::new(stream, Arc::clone(&claim));
    let visit = place.visit();
    let service = router.map_request(move |mut request: axum::extract::Request<_>| {
        request.extensions_mut().insert(Arc::clone(&claim));
        request.extensions_mut().insert(ConnectInfo(from));
        visit.busy();
        request
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(BUFFER)
        // An answer that claims the role is checked as its connection's; see `claim`.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::select! {
        () = place.ended() => {}
        served = served => if let Err(error) = served {
            tracing::debug!("a connection to the health port ended: {:#}", anyhow::Error::from(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv4Addr, TcpListener as StdListener, TcpStream as StdStream},
        time::Instant,
    };

    use axum::{
        body::Body,
        http::{Request, StatusCode, header},
    };

    use super::*;
    use crate::cluster::{ClusterId, Membership, Role};

    const TOKEN: &str = "a-token-of-enough-length";

    fn starting() -> Subject {
        let nobody = Membership::founded(ClusterId(1), Vec::new());
        Subject::still(Status::without_node("host7".into(), "1", nobody, Role::Startup, "reads its disk".into()))
    }

    fn settings(address: SocketAddr, optional: bool) -> Settings {
        let metrics = MetricsPage::new(Some(TOKEN)).unwrap();
        let (allow, certificates) = (Audience::default(), PathBuf::from("/nowhere"));
        Settings { address, optional, allow, certificates, metrics, console_port: None }
    }

    fn ask(address: SocketAddr, path: &str) -> io::Result<String> {
        let mut stream = StdStream::connect(address)?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: health\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn wait_for(address: SocketAddr, path: &str, what: &str) -> String {
        let begin = Instant::now();
        loop {
            match ask(address, path) {
                Ok(answer) if answer.contains(what) => return answer,
                other => assert!(begin.elapsed() < Duration::from_secs(30), "{path}: {other:?}"),
            }
            thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// The page is there before there is a node, also where the port is free only later, and a check never says yes.
    #[test]
    fn a_host_without_a_node_has_a_page_as_soon_as_the_port_is_free() {
        let taken = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = taken.local_addr().unwrap();
        let without = HealthPort::open(settings(address, true), starting()).unwrap();
        drop(taken);
        let page = wait_for(address, "/status", "STARTUP: host7 starts: reads its disk");
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("text/html"), "{page}");
        assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
        assert_eq!(*without.problem().borrow(), None, "nobody has asked for this port");
        for (path, code) in [("/", 503), ("/primary", 503), ("/secondary", 503), ("/livez", 503), ("/readyz", 503)] {
            assert!(ask(address, path).unwrap().starts_with(&format!("HTTP/1.1 {code}")), "{path}");
        }
        for (path, code) in
            [("/livez?waiting=200", 200), ("/livez?waiting=200&within=50", 200), ("/livez?waiting=503", 400)]
        {
            assert!(ask(address, path).unwrap().starts_with(&format!("HTTP/1.1 {code}")), "{path}");
        }
        assert!(ask(address, "/?format=json").unwrap().contains("\"state\":\"STARTUP\""));
        assert!(ask(address, "/status?format=xml").unwrap().starts_with("HTTP/1.1 400"));
        let other = Status { role: Role::RequestJoin, ..(**starting().status.borrow()).clone() };
        without.show(Subject::still(other));
        wait_for(address, "/status?format=json", "\"state\":\"REQUEST_JOIN\"");
    }

    #[test]
    fn a_port_that_somebody_asked_for_is_missed_in_the_status() {
        let taken = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let wanted = HealthPort::open(settings(taken.local_addr().unwrap(), false), starting()).unwrap();
        let begin = Instant::now();
        while wanted.problem().borrow().as_ref().is_none_or(|problem| !problem.contains("is not open")) {
            assert!(begin.elapsed() < Duration::from_secs(30));
            thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[tokio::test]
    async fn strangers_learn_nothing_but_what_to_do() {
        let subject = watch::channel(starting()).1;
        let settings = settings(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), true);
        let sources = Sources { settings: Arc::new(settings), subject };
        let from = SocketAddr::from(([192, 0, 2, 1], 4711));
        let ask = async |path: &str, name: header::HeaderName, value: &str| {
            let request =
                Request::get(path).header(name, value).extension(ConnectInfo(from)).body(Body::empty()).unwrap();
            let response = answers::for_strangers(sources.clone()).oneshot(request).await.unwrap();
            let (status, body) = (response.status(), response.into_body());
            let text = axum::body::to_bytes(body, 1 << 20).await.unwrap();
            (status, String::from_utf8(text.to_vec()).unwrap())
        };
        for path in ["/", "/status", "/primary", "/readyz", "/status?format=json"] {
            for accept in ["text/html", "application/json"] {
                let (status, text) = ask(path, header::ACCEPT, accept).await;
                assert_eq!(status, StatusCode::FORBIDDEN, "{path}");
                assert!(text.contains("HEALTH_ALLOW") && !text.contains("host7"), "{text}");
            }
        }
        assert_eq!(ask("/metrics", header::ACCEPT, "*/*").await.0, StatusCode::UNAUTHORIZED);
        let (status, _) = ask("/metrics", header::AUTHORIZATION, &format!("Bearer {TOKEN}")).await;
        assert_eq!(status, StatusCode::OK, "its token lets a reader in from anywhere");
    }
}
