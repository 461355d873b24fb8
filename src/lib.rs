//! The map of Twistlock HA: what it does, where to look, and what must always hold. No code here.
//!
//! # Bird's-eye view
//!
//! Three hosts run `twistlockd`. They elect one PRIMARY. Only there are the Console's ports open; on the two SECONDARY
//! hosts the kernel refuses connections to them, so that any load balancer finds the primary without being told. The
//! Console's database is SQLite; each of its transactions becomes an entry of a Raft log, and a COMMIT succeeds only
//! when a majority of the hosts has it on disk. When the primary dies, a secondary has everything that was
//! acknowledged.
//!
//! A write's way: a client's request reaches [`console`], which runs SQL through sqlx. SQLite writes the transaction's
//! pages to its `-wal` file through our VFS ([`storage::vfs`]). At the frame that would commit, the
//! [gate](storage::gate) collects the pages, encodes them ([`storage::transaction`]) and proposes them to the consensus
//! loop ([`node`]). The loop appends them to the raft log ([`storage::raft_log`]) and sends them to the others
//! ([`peer`]); when a majority has them on disk, SQLite's write is let through, COMMIT returns, and the response leaves
//! if the lease is still valid. On the others the database thread copies the page images into the database file. They
//! run no SQLite.
//!
//! A request's way: each resource of the Console lists its routes in one table (`console::table`): method, path, who
//! may, what goes in and comes out. The router, the check of roles before every handler and the OpenAPI document are
//! made from it. A change and its audit row are one transaction, so that neither is there without the other.
//!
//! A takeover's way: the primary's process dies; its links break and its host refuses connections to the HA port. The
//! survivors forget their leader and elect a new one ([`cluster`], pure, no clock and no sockets). The winner commits
//! an entry of its own, lets a majority confirm it, applies what it had not applied, and opens the database. The
//! [`supervisor`] sees the role and opens the ports.
//!
//! A heartbeat's way: it goes as a datagram, sealed with a key of the link that it goes beside, and now and then by
//! that link as well; by the link each time while the other end does not say that datagrams come. One lost segment of
//! TCP holds back all that is behind it for longer than half a lease; a lost datagram holds back nothing. While packets
//! get lost, small entries and their answers go as datagrams, too. `peer::udp` says why a datagram that is late or
//! doubled does no harm.
//!
//! A failing disk's way: each operation on a file of the data folder registers in a small table while it runs
//! ([`storage::watch`]). The consensus loop looks at it with each tick. It never waits for a disk itself: what has to
//! be synced goes to a thread of its own. A PRIMARY with an operation that failed or does not come back closes its
//! ports and lets another member begin, if the reports of the others name one whose disk works; its own database may be
//! closed when the disk answers again. A SECONDARY with such a disk stands back, and acknowledges nothing that it has
//! not on disk.
//!
//! A Defender's way: the agent of another host ([`defender`]) watches files, and writes what it finds into a queue on
//! its disk. It dials out to the one open port, and the Console stores its events, each with its number, in the
//! transaction that raises the number up to which they are stored. The acknowledgement leaves after the COMMIT; what
//! comes again by the next PRIMARY is known. `docs/defender.md` has the protocol.
//!
//! A viewer's way: the browser gets the page ([`console`], `src/console/ui`), logs in, and follows the status as a
//! stream of events. When the stream breaks off, the page knocks at the same host name until a PRIMARY opens; the
//! session is in the replicated database, so that nobody logs in again. While there is none, the page is grey and
//! dated, and leads to the status pages of the members ([`health`]), which answer from the first moment of a process to
//! its last.
//!
//! A newcomer's way: the join script fetches the program, which installs itself ([`host`]) and leaves a token; the
//! daemon makes its keys and asks ([`join`]). The request is part of the replicated membership
//! ([`cluster::membership`]): any primary knows it. APPLY ([`admin`]) signs the certificates and admits all hosts that
//! ask in one entry. Each fetches the whole database ([`snapshot`]) and begins as a member without a vote; when all
//! have caught up, whoever is primary gives them their votes in one joint change. A member that is too far behind or
//! does not trust its copy goes the same way from the fetching on.
//!
//! A pool's way: a host with an empty data folder waits. A sign-up makes one of them the seed of a pool; its PRIMARY
//! calls the others ([`meeting`]), both sides prove who they are, and one entry takes all of them in. From there on
//! each goes the way of a newcomer.
//!
//! An upgrade's way: hosts get the newer program one by one, and any of them may be primary meanwhile. When all members
//! have shown the next feature level for a while, the primary raises it ([`cluster::level`]); from then on an older
//! program does not start, is not linked with and does not become primary. What needs an understanding of all members
//! waits for its level.
//!
//! The way back of a member that forgot: it lost some of its raft log, or got an older copy of it. It sees that itself,
//! or the others do, who remember how far each member's memory had reached ([`cluster::reach`]). It takes part in
//! nothing then. The primary takes its vote, it fetches the database, begins a new raft log behind that, and gets its
//! vote again when it has caught up. `docs/memory.md` says which losses are found out by whom, which by nobody, and why
//! that is safe.
//!
//! A backup's way: each member copies its own databases, the PRIMARY from the file that rests between two checkpoints,
//! the others from the file that goes on changing ([`storage::online_copy`]); the copy must have the checksum that all
//! agreed on at its index. A restore ([`backup`]) puts the whole content of one in the database's place as a single
//! transaction. Copies go elsewhere on a thread of their own, after the backup is good.
//!
//! # Where things are
//!
//! | module | what it does | what it must not know |
//! |---|---|---|
//! | [`cluster`] | decides: election, lease, roles, who is a member; pure | files, sockets, clocks, threads |
//! | [`storage`] | remembers: raft log, format of a transaction, SQLite capture and replay, checkpoints | who is primary |
//! | [`pki`] | certificates and TLS settings | what is sent through them |
//! | [`peer`] | talks: links between the nodes | what the messages decide |
//! | [`node`] | drives: the one loop that joins the four above to the clock; publishes [`node::Status`] | ports and workloads |
//! | [`admin`] | every operation of an administrator: its checks, and the change it asks for | HTTP, sockets and terminals |
//! | [`heal`] | mends what a start finds damaged in the data folder (`docs/formats.md` has each file) | the raft log, other hosts |
//! | [`found`] | the first start of the first node: authority, certificates, identity | other hosts |
//! | [`certificates`] | renews and follows certificates; replaces what all members share: the cluster key, the certificate authority | how a change is agreed on |
//! | [`join`] | a host that is no member yet asks to become one | what the cluster decides |
//! | [`meeting`] | a pool and a host that waits for one prove themselves to each other | what the cluster decides |
//! | [`ask`] | a question of one member to another, and its answer | what is asked |
//! | [`snapshot`] | transfers: the whole database, from the primary to a node that needs it | why it is needed |
//! | [`backup`] | backups: made, kept, verified, brought back | HTTP, sockets and terminals |
//! | [`console`] | serves: the HTTP API and page | whether it is built in or a process of its own |
//! | [`workload`] | what a primary runs, and at which ports: start, ready, stop | why it is started |
//! | [`service`] | a program beside the Console: starts it, asks whether it is ready, ends it, carries its connections | who is primary, and why |
//! | [`defender`] | the agent on other hosts: watches files, keeps its events, hands them to the PRIMARY; `docs/defender.md` | the inside of a node |
//! | [`events`] | tells: what happened, to the history and to whoever is to be notified | what it is told for |
//! | [`guard`] | the port guard: a child process that closes the ports of a frozen supervisor | everything but a deadline and some sockets |
//! | [`supervisor`] | follows the role: opens ports and starts the workload, or closes and stops | how the role came about |
//! | [`health`] | the health port: the status page of each host, and what load balancers and monitors may know of a node | anything that it could decide |
//! | [`control`], [`cli`] | the Unix socket that serves the API on each host, and `twistcli` by it or by the Consoles | the inside of a node |
//! | [`recover`] | makes a new cluster of one out of a survivor's data, on the administrator's word | a running node |
//! | [`host`] | installs, upgrades, uninstalls the node of a host, and has it join | the inside of a node |
//! | [`dev`] | a whole cluster on loopback, to try out | anything a host would not do |
//! | [`http`] | what HTTP asks of a server before a handler sees a request | what is served |
//! | [`https`] | HTTPS clients: whom they trust, and what a failure means | what is asked |
//! | [`clients`] | the sockets that clients reach, who a connection comes from, the places for connections, patience with those who guess | what is served |
//! | [`descriptors`] | how many files and connections may be open, and who gets how many of them | what they are for |
//! | [`config`], [`telemetry`] | the configuration file; log and metrics | all of the above |
//! | [`clock`], [`mutex`], [`scheduling`], [`little_endian`] | the time of day; how a mutex is taken; which threads go first; numbers in bytes | everything |
//!
//! `tests/tidy` holds the permitted dependencies between them.
//!
//! # What to read next
//!
//! `docs/design.md`: how it works and why, what happens under each fault, and a COMMIT, an APPLY and a takeover as
//! places in the source. `docs/threads.md`: what each thread owns and may wait for. `docs/formats.md`: each file of a
//! data folder, every byte on a disk or a wire, versions and feature levels. `docs/adr/`: decisions, with their
//! figures. `CONTRIBUTING.md`: how to change it.
//!
//! # Words
//!
//! *Node*: a host running twistlockd. *Member*: a node that belongs to the cluster. *Epoch*: the Raft term in which a
//! primary serves. *Lease*: the span in which the primary may keep its ports open without hearing from a majority.
//! *Transaction*: one committed SQLite transaction, as page images in one or more raft log entries. *Raft log*: the
//! replicated entries on disk; the *WAL* is SQLite's `-wal` file. *Checkpoint*: the index up to which the database file
//! needs no entry of the raft log; a *snapshot* is the whole database as of a checkpoint, on its way to another node.
//! *Phase*: where a member stands between SECONDARY and PRIMARY.
//!
//! # Architecture invariants
//!
//! 1. **One primary's ports.** At no instant are Console ports open on two nodes. (A host that waits for a pool is no node:
//!    its HTTPS port takes a sign-up, and answers health checks with 503.) The lease (400 ms from the *sending* of a
//!    round that a majority answered) is shorter than the voters' promise (at least 475 ms from its receipt). The port
//!    guard keeps it when the supervisor is frozen. A node that gives the role up neither votes nor campaigns before its
//!    database is closed; no node serves twice in one epoch.
//! 2. **No acknowledged write is lost.** A COMMIT that was reported as successful is on disk in the raft logs of a majority.
//! 3. **No unacknowledged surprise.** A COMMIT whose outcome is unknown is an error; nobody reads data that is later undone.
//! 4. **Identical databases.** At the same applied index every database is the same byte for byte, and each transaction
//!    carries the checksum that proves it.
//! 5. **Derived state.** The raft log is the truth; `-wal` and `-shm` are a cache, deleted at every start and demotion.
//! 6. **Persist before send.** [`cluster::Output`] has its fields in the order in which they are carried out. The one
//!    exception is an answer to a heartbeat, which promises no entry. What came into force of the membership is on disk before
//!    anything of a later number counts as durable, and before a checkpoint passes its entry: a start from before comes by
//!    that entry again, and raft campaigns only when it has.
//! 7. **Secrets stay.** A node's private key never leaves its host, and what all members share leaves them only sealed or over
//!    mutual TLS; without a certificate of the cluster's CA nothing joins, reads or votes.
//!
//! Where they are checked: 1 to 4 and 6 after every step of `tests/sim`; 2 and 5 at every write in `tests/crash`; 3 and
//! 4 against SQLite itself in `tests/sqlite`; 1 to 3 with real processes and real signals in `tests/e2e`.
//!
//! # What the fast takeover assumes
//!
//! A voter normally keeps its promise to the primary for 500 ms. It breaks it early only when the primary's process is
//! proven dead: the link dropped without a farewell and the host's kernel refuses connections to the HA port. The port
//! guard holds that port as long as it holds a Console port, so a refusal proves that both processes are gone. This
//! assumes that a refusal comes from the member's own kernel: no other machine may answer at its address, and a
//! firewall must drop packets rather than reject them. Where that cannot be promised, an election takes its 600 ms as
//! usual.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod admin;
pub mod ask;
pub mod backup;
pub mod certificates;
pub mod cli;
pub mod clients;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod console;
pub mod control;
pub mod defender;
pub mod descriptors;
pub mod dev;
pub mod events;
pub mod found;
pub mod guard;
pub mod heal;
pub mod health;
pub mod host;
pub mod http;
pub mod https;
pub mod join;
pub mod little_endian;
pub mod meeting;
pub mod mutex;
pub mod node;
pub mod peer;
pub mod pki;
pub mod recover;
pub mod scheduling;
pub mod service;
pub mod snapshot;
pub mod storage;
pub mod supervisor;
pub mod telemetry;
pub mod workload;
