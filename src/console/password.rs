//! Passwords: what a new one must be like, and their hashes: argon2id with random salts, a bounded number at once,
//! never on a thread that serves requests.

use std::{
    collections::{HashSet, VecDeque},
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use argon2::{
    Algorithm, Argon2, Block, Params, Version,
    password_hash::{
        self,
        phc::{Output, ParamsString, PasswordHash, Salt},
    },
};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use super::errors::ApiError;
use crate::{mutex::locked, scheduling};

/// Hashes at once: each takes 19 MiB and a core for some ten milliseconds.
const AT_ONCE: usize = 2;
/// Largest memory of a hash, in KiB: a restored database may ask for anything.
const LARGEST: usize = 64 << 10;
/// How long a thread keeps its memory for the next hash.
const KEPT: Duration = Duration::from_secs(10);
/// Blocks that are reserved, of 1 KiB. Memory of more than 32 MiB goes back to the system as soon as it is freed
/// (`M_MMAP_THRESHOLD` in mallopt(3)), and what is not used of it takes none.
const RESERVED: usize = 33 << 10;
/// Hashes that may be handed to the threads: those of one Console, and of the one before it that ends.
const HANDED_OVER: usize = 2 * AT_ONCE;
/// Requests that may wait for their turn; more are refused.
const WAITING: usize = 96;
/// Further places for users who have logged in from the same network before: strangers must not take all of them.
const WAITING_KNOWN: usize = 32;
/// Longest wait for a turn.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest name and password that are looked at, in bytes.
pub(super) const LONGEST: usize = 1024;
/// Shortest new password in characters. Length is what makes guessing hard, so nothing else is asked for unless an
/// administrator wants it.
const SHORTEST: usize = 12;
/// What must be left of a password without the words below: so many characters, and so many different ones.
const LEFT: (usize, usize) = (6, 4);
/// What those who guess try first; longer ones before what they contain.
const COMMON: &str = "administrator abcdefghijkl 1q2w3e4r5t6y qwertyuiop 1234567890 0987654321 twistlock 123456789 \
     asdfghjkl 987654321 1q2w3e4r qazwsxedc iloveyou passw0rd p@ssw0rd p@ssword password passwort \
     changeme 12345678 superman baseball football sunshine princess trustno1 letmein welcome default \
     console 1234567 qwerty zxcvbn abcdef monkey dragon secret 123456 admin 1234";

/// Refuses a new password that is too easy to guess: of every user, the first one too.
pub(super) fn check(name: &str, password: &str, strong: bool) -> Result<(), ApiError> {
    if password.chars().count() < SHORTEST {
        return Err(ApiError::bad(format!("password must have at least {SHORTEST} characters")));
    }
    if password.len() > LONGEST {
        return Err(ApiError::bad(format!("password must have at most {LONGEST} bytes")));
    }
    if is_easy(name, password) {
        let (all, different) = LEFT;
        return Err(ApiError::bad(format!(
            "password is too easy to guess: without the user name and words that everybody uses, at least {all} characters \
             must be left, {different} of them different"
        )));
    }
    if !strong {
        return Ok(());
    }
    let kinds: [(&str, fn(char) -> bool); 4] = [
        ("an upper-case letter", char::is_uppercase),
        ("a lower-case letter", char::is_lowercase),
        ("a digit", |c| c.is_ascii_digit()),
        ("a special character", |c| !c.is_alphanumeric()),
    ];
    if let Some((missing, _)) = kinds.iter().find(|(_, is)| !password.contains(*is)) {
        return Err(ApiError::bad(format!("password must have {missing}")));
    }
    if password.to_lowercase().contains(&name.to_lowercase()) {
        return Err(ApiError::bad("password must not contain the user name"));
    }
    Ok(())
}

/// True if little is left of it without the user name and very common words.
fn is_easy(name: &str, password: &str) -> bool {
    let (mut left, name) = (password.to_lowercase(), name.to_lowercase());
    // A shorter name is in many good passwords.
    let own = Some(name.as_str()).filter(|name| name.chars().count() > 2);
    for word in own.into_iter().chain(COMMON.split(' ')) {
        left = left.replace(word, "");
    }
    let different: HashSet<_> = left.chars().collect();
    left.chars().count() < LEFT.0 || different.len() < LEFT.1
}

/// What a hash is computed in. Each thread has its own, and keeps it while there are logins.
type Memory = Vec<Block>;
type Job = Box<dyn FnOnce(&mut Memory) + Send>;

/// Computes a hash into `out`.
fn derive(
    memory: &mut Memory,
    argon2: &Argon2<'_>,
    password: &str,
    salt: &[u8],
    out: &mut [u8],
) -> password_hash::Result<()> {
    let blocks = argon2.params().block_count();
    if blocks > LARGEST {
        return Err(password_hash::Error::OutOfMemory);
    }
    if memory.len() < blocks {
        memory.reserve(RESERVED.max(blocks) - memory.len());
        memory.resize(blocks, Block::new());
    }
    Ok(argon2.hash_password_into_with_memory(password.as_bytes(), salt, out, &mut memory[..blocks])?)
}

/// The PHC string of a new password.
fn make(memory: &mut Memory, password: &str) -> password_hash::Result<String> {
    let (mut salt, mut out) = ([0; 16], [0; Params::DEFAULT_OUTPUT_LEN]);
    SystemRandom::new().fill(&mut salt).map_err(|_| password_hash::Error::Crypto)?;
    let argon2 = Argon2::default();
    derive(memory, &argon2, password, &salt, &mut out)?;
    let hash = PasswordHash {
        algorithm: Algorithm::default().ident(),
        version: Some(Version::default().into()),
        params: ParamsString::try_from(argon2.params())?,
        salt: Some(Salt::new(&salt)?),
        hash: Some(Output::new(&out)?),
    };
    Ok(hash.to_string())
}

/// Whether a password belongs to a PHC string.
fn belongs(memory: &mut Memory, password: &str, stored: &str) -> password_hash::Result<bool> {
    let stored = PasswordHash::new(stored)?;
    let (Some(salt), Some(hash)) = (&stored.salt, &stored.hash) else {
        return Err(password_hash::Error::EncodingInvalid);
    };
    let version = stored.version.map(Version::try_from).transpose()?.unwrap_or_default();
    let argon2 = Argon2::new(Algorithm::try_from(stored.algorithm.as_str())?, version, Params::try_from(&stored)?);
    let mut out = vec![0; hash.len()];
    derive(memory, &argon2, password, salt, &mut out)?;
    // This takes a time that does not depend on them.
    Ok(Output::new(&out)? == *hash)
}

/// What the threads have to do.
#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    filled: Condvar,
}

impl Queue {
    /// Waits for the next job. Frees the memory if there is none for [`KEPT`].
    fn next(&self, memory: &mut Memory) -> Job {
        let mut jobs = locked(&self.jobs);
        loop {
            if let Some(job) = jobs.pop_front() {
                return job;
            }
            if memory.is_empty() {
                jobs = self.filled.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (again, waited) = self.filled.wait_timeout(jobs, KEPT).unwrap_or_else(PoisonError::into_inner);
            jobs = again;
            if waited.timed_out() {
                *memory = Memory::new();
            }
        }
    }
}

/// Gives a hash to one of the threads for it, which live as long as the process: they have its memory and their own
/// priority.
fn hand_over(job: Job) -> io::Result<()> {
    static THREADS: Mutex<Option<Arc<Queue>>> = Mutex::new(None);
    let mut threads = locked(&THREADS);
    let queue = match &*threads {
        Some(queue) => queue,
        None => {
            let queue = Arc::<Queue>::default();
            for _ in 0..AT_ONCE {
                let queue = Arc::clone(&queue);
                let work = move || {
                    // Logins must never cost the role.
                    scheduling::leisurely();
                    let mut memory = Memory::new();
                    loop {
                        queue.next(&mut memory)(&mut memory);
                    }
                };
                thread::Builder::new().name("password".to_owned()).spawn(work)?;
            }
            threads.insert(queue)
        }
    };
    let mut jobs = locked(&queue.jobs);
    if jobs.len() == HANDED_OVER {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    jobs.push_back(job);
    queue.filled.notify_one();
    Ok(())
}

/// Computes and checks password hashes.
#[derive(Debug)]
pub(super) struct Hasher {
    turn: Arc<Semaphore>,
    waiting: Semaphore,
    waiting_known: Semaphore,
}

/// The right to compute one hash.
#[derive(Debug)]
pub(super) struct Turn(OwnedSemaphorePermit);

impl Hasher {
    pub(super) fn new() -> Self {
        let turn = Arc::new(Semaphore::new(AT_ONCE));
        Self { turn, waiting: Semaphore::new(WAITING), waiting_known: Semaphore::new(WAITING_KNOWN) }
    }

    /// Waits until a hash may be computed, for a bounded time, among a bounded number.
    pub(super) async fn turn(&self, known: bool) -> Result<Turn, ApiError> {
        let busy = || ApiError::Busy("too many logins at once: try again".into());
        let place = self.waiting.try_acquire();
        let _place =
            if known { place.or_else(|_| self.waiting_known.try_acquire()) } else { place }.map_err(|_| busy())?;
        let turn = timeout(PATIENCE, Arc::clone(&self.turn).acquire_owned()).await;
        Ok(Turn(turn.map_err(|_| busy())?.map_err(|_| busy())?))
    }
}

impl Turn {
    /// The PHC string to store.
    pub(super) async fn hash(self, password: String) -> Result<String, ApiError> {
        self.compute(move |memory| make(memory, &password)).await
    }

    /// True if the password belongs to the stored PHC string. Without one (no such user) it takes as long and is false,
    /// so that the time does not tell which users exist.
    pub(super) async fn verify(self, password: String, stored: Option<String>) -> Result<bool, ApiError> {
        self.compute(move |memory| match stored {
            Some(stored) => belongs(memory, &password, &stored),
            None => make(memory, &password).map(|_| false),
        })
        .await
    }

    async fn compute<T: Send + 'static>(
        self,
        work: impl FnOnce(&mut Memory) -> password_hash::Result<T> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (tell, told) = oneshot::channel();
        let job = move |memory: &mut Memory| {
            // The permit moves along: a client that goes away does not let a third hash start.
            let _turn = self.0;
            let _ = tell.send(work(memory));
        };
        if let Err(error) = hand_over(Box::new(job)) {
            tracing::error!("no thread can be started for a password hash: {error}");
            return Err(ApiError::Busy("the system has no thread for a login: try again".into()));
        }
        match told.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                tracing::error!("cannot compute a password hash: {error}");
                Err(ApiError::Internal)
            }
            Err(_) => Err(ApiError::Unavailable("the Console is stopping".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_long_and_not_what_everybody_tries_first() {
        for good in
            ["correct horse", "Join-test-1234", "tr0ub4dor und 3", "密码密码-одиннадцать", &"xyza".repeat(LONGEST / 4)]
        {
            check("admin", good, false).unwrap();
        }
        for bad in [
            "correct hor",
            &"x".repeat(LONGEST + 1),
            "passwordpassword",
            "Password2026!",
            "123456789012",
            "qwertyuiop12",
            "aaaaaaaaaaaaaaaa",
            "ababcabcabcabc",
            "twistlock-2026",
            "Admin-Admin-Admin",
            "jörg müller 1",
        ] {
            check("Jörg Müller", bad, false).unwrap_err();
        }
        check("jo", "jolly joker jo", false).unwrap();
    }

    #[test]
    fn hashes_are_those_that_others_make_and_understand() {
        use argon2::{PasswordHasher, PasswordVerifier};
        let mut memory = Memory::new();
        let ours = make(&mut memory, "correct horse").unwrap();
        assert_ne!(ours, make(&mut memory, "correct horse").unwrap(), "the salt is random");
        let parsed = PasswordHash::new(&ours).unwrap();
        Argon2::default().verify_password(b"correct horse", &parsed).unwrap();
        let theirs: PasswordHash = Argon2::default().hash_password(b"correct horse").unwrap();
        let theirs = theirs.to_string();
        for stored in [&ours, &theirs] {
            assert!(belongs(&mut memory, "correct horse", stored).unwrap());
            assert!(!belongs(&mut memory, "correct horsf", stored).unwrap());
        }
        let large = ours.replace("m=19456", "m=4000000");
        assert!(large != ours && belongs(&mut memory, "correct horse", &large).is_err());
    }

    #[test]
    fn a_strong_password_has_all_kinds_and_is_unlike_the_name() {
        check("admin", "Correct-Horse7", true).unwrap();
        for weak in
            ["Correct-Hor7", "correct-horse7", "CORRECT-HORSE7", "Correct-Horse", "CorrectHorse77", "My-Admin-is-7!"]
        {
            let weak = if weak.len() == 12 { &weak[1..] } else { weak };
            check("admin", weak, true).unwrap_err();
        }
    }
}
