//! Somebody between the PRIMARY of a pool and a host that waits. [`Between`] passes on what the two say, and stops before any word
//! of either, so that a fault hits one step of a meeting; [`impostor`] ends both connections with keys of his own; [`parrot`]
//! repeats what a host has said. Must never depend on time.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex},
    thread,
};

use tokio::io::copy_bidirectional;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use twistlock_ha::{
    cluster::ClusterId,
    pki::{self, Authority},
};

use super::{
    cluster::LIMIT,
    network::{self, HA_PORT},
};

/// Where they stand, and what their way there is called.
const PLACE: &str = "127.0.0.200";
const DETOUR: &str = "between";
/// TLS: the type of a record with content, and the bytes of one that has the length of a word (4, its type, its tag).
const CONTENT: u8 = 23;
const LENGTH: usize = 4 + 1 + 16;

/// Who says a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Caller,
    Host,
}

/// A word of a meeting, from 1: greeting, proof, and then offer, reserve, adopt of the caller, or candidate, ready, adopted
/// of the host.
pub type Word = (Side, usize);

#[derive(Default)]
struct Meeting {
    stop_before: Option<Word>,
    stopped: bool,
    over: bool,
    sockets: Vec<TcpStream>,
    /// What the caller and what the host has said in the last connection, byte for byte.
    said: [Vec<u8>; 2],
}

#[derive(Default)]
struct Shared {
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// Stands between an address and a host until it is dropped.
pub struct Between {
    shared: Arc<Shared>,
    place: SocketAddr,
}

impl Between {
    /// From now on calls from one address to a host come here first, and stop before that word.
    pub fn stand(from: &str, host: &str, stop_before: Word) -> Self {
        let shared = Arc::<Shared>::default();
        shared.meeting.lock().unwrap().stop_before = Some(stop_before);
        let (accepts, to) = (Arc::clone(&shared), host.to_owned());
        let place = listen(from, host, move |caller| accepts.connect(caller, &to));
        Self { shared, place }
    }

    /// Waits until the word is about to be said.
    #[track_caller]
    pub fn wait_stopped(&self) {
        let meeting = self.shared.meeting.lock().unwrap();
        let waited = self.shared.changed.wait_timeout_while(meeting, LIMIT, |meeting| !meeting.stopped).unwrap();
        assert!(!waited.1.timed_out(), "{:?} is never said", waited.0.stop_before);
    }

    /// Ends the connections: the word is never said. Returns what the caller and what the host has said.
    pub fn cut(&self) -> [Vec<u8>; 2] {
        let mut meeting = self.shared.meeting.lock().unwrap();
        meeting.over = true;
        // Whoever is gone already need not be told.
        meeting.sockets.drain(..).for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
        self.shared.changed.notify_all();
        meeting.said.clone()
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        self.cut();
        leave(self.place);
    }
}

impl Shared {
    /// Stands in one connection. False when nobody stands here any more.
    fn connect(self: &Arc<Self>, caller: TcpStream, host: &str) -> bool {
        let mut meeting = self.meeting.lock().unwrap();
        if meeting.over {
            return false;
        }
        let host = TcpStream::connect((host, HA_PORT)).unwrap();
        meeting.said = Default::default();
        meeting.sockets.extend([caller.try_clone().unwrap(), host.try_clone().unwrap()]);
        let ways = [(Side::Caller, caller.try_clone(), host.try_clone()), (Side::Host, Ok(host), Ok(caller))];
        for (side, from, to) in ways {
            let (shared, from, to) = (Arc::clone(self), from.unwrap(), to.unwrap());
            thread::spawn(move || shared.pass(side, from, to));
        }
        true
    }

    /// Passes on what one side says, record by record.
    fn pass(&self, side: Side, mut from: TcpStream, mut to: TcpStream) {
        let mut words = 0;
        let mut record = vec![0; 5];
        while from.read_exact(&mut record[..5]).is_ok() {
            let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
            record.resize(5 + length, 0);
            if from.read_exact(&mut record[5..]).is_err() {
                break;
            }
            if (record[0], length) == (CONTENT, LENGTH) {
                words += 1;
                self.wait_allowed((side, words));
            }
            self.meeting.lock().unwrap().said[side as usize].extend(&record);
            if to.write_all(&record).is_err() {
                break;
            }
        }
        [from, to].iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }

    fn wait_allowed(&self, word: Word) {
        let mut meeting = self.meeting.lock().unwrap();
        if meeting.stop_before == Some(word) {
            meeting.stopped = true;
            self.changed.notify_all();
            drop(self.changed.wait_while(meeting, |meeting| !meeting.over).unwrap());
        }
    }
}

/// Leads the calls of one address to a host to this function, for as long as it returns true.
fn listen(from: &str, host: &str, accept: impl FnMut(TcpStream) -> bool + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind((PLACE, 0)).unwrap();
    let place = listener.local_addr().unwrap();
    thread::spawn(move || listener.incoming().map_while(Result::ok).all(accept));
    network::detour(DETOUR, from, host, place);
    place
}

/// Ends the way to whoever listens there, and has them notice it.
fn leave(place: SocketAddr) {
    network::remove(DETOUR);
    drop(TcpStream::connect(place));
}

/// Has somebody with keys of his own, and all else that TLS needs, stand between an address and a host while this runs.
pub fn impostor<T>(from: &str, host: &str, folder: &Path, meanwhile: impl FnOnce() -> T) -> T {
    let authority = Authority::create(ClusterId(9)).unwrap();
    authority.issue_node(1, "one", &[from]).unwrap().save_node(folder).unwrap();
    let own = pki::calling_tls(folder).unwrap();
    let acceptor = TlsAcceptor::from(pki::waiting_tls(&pki::new_key().unwrap()).unwrap());
    let over = Arc::new(Mutex::new(false));
    let (ended, to) = (Arc::clone(&over), host.to_owned());
    let place = listen(from, host, move |caller| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            caller.set_nonblocking(true).unwrap();
            let caller = acceptor.accept(tokio::net::TcpStream::from_std(caller).unwrap()).await;
            let host = tokio::net::TcpStream::connect((to.as_str(), HA_PORT)).await.unwrap();
            let host = TlsConnector::from(Arc::clone(&own)).connect(pki::waiting_name(), host).await;
            if let (Ok(mut caller), Ok(mut host)) = (caller, host) {
                // Either end may go at any time.
                drop(copy_bidirectional(&mut caller, &mut host).await);
            }
        });
        !*ended.lock().unwrap()
    });
    let result = meanwhile();
    *over.lock().unwrap() = true;
    leave(place);
    result
}

/// Has somebody answer in a host's place, while this runs, with what that host has said before.
pub fn parrot<T>(from: &str, host: &str, said: Vec<u8>, meanwhile: impl FnOnce() -> T) -> T {
    let over = Arc::new(Mutex::new(false));
    let ended = Arc::clone(&over);
    let place = listen(from, host, move |mut caller| {
        let mut hello = [0; 5];
        if caller.read_exact(&mut hello).is_ok() {
            // The caller may have heard enough.
            drop(caller.write_all(&said));
            drop(caller.read_to_end(&mut Vec::new()));
        }
        !*ended.lock().unwrap()
    });
    let result = meanwhile();
    *over.lock().unwrap() = true;
    leave(place);
    result
}
