//! Random SQL through the folder in all modes and page sizes, with refusals, ends and crashes: whatever it is, the
//! members end with the same files. `SEED=n` replays one run.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use twistlock_ha::storage::{ReplicateError, Replicator};

use super::{
    super::{
        support::{Answer, Log, Sql},
        workload::Random,
    },
    MODES, Member, Site,
};

const NAMES: [&str; 2] = ["first.db", "folder of the/second.db"];
const DIGEST: &str = "SELECT count(*) || ':' || coalesce(sum(length(data)), 0) || ':' || coalesce(sum(id), 0) FROM t0";

/// The raft log; the folder of the service is copied at some of its calls, as a crash at that moment would leave it.
struct Crashing {
    log: Arc<Log>,
    from: PathBuf,
    to: PathBuf,
    every: u64,
    calls: Mutex<u64>,
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

impl Crashing {
    fn image(&self) {
        let mut calls = self.calls.lock().unwrap();
        *calls += 1;
        if calls.is_multiple_of(self.every) {
            copy(&self.from, &self.to.join(calls.to_string()));
        }
    }
}

impl Replicator for Crashing {
    fn replicate(&self, part: Vec<u8>, last: bool) -> Result<u64, ReplicateError> {
        self.image();
        let result = self.log.replicate(part, last);
        self.image();
        result
    }
}

struct World {
    random: Random,
    site: Site,
    page_size: u64,
    connections: Vec<(usize, Sql)>,
    commits: u64,
    refused: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let page_size = 512 << random.below(8);
        let mut site = Site::new();
        std::fs::create_dir(site.root.path().join("images")).unwrap();
        let (from, to) = (site.primary.root.clone(), site.root.path().join("images"));
        let (log, calls) = (Arc::clone(&site.log), Mutex::new(0));
        site.serve_by(Arc::new(Crashing { log, from, to, every: 1 + random.below(40), calls }));
        std::fs::create_dir_all(site.path("folder of the")).unwrap();
        let mut world = Self { random, site, page_size, connections: Vec::new(), commits: 0, refused: 0 };
        for name in NAMES {
            let sql = world.site.open(name);
            sql.run(&format!("PRAGMA page_size={page_size}; PRAGMA auto_vacuum={}", world.random.below(3))).unwrap();
            for table in 0..3 {
                sql.run(&format!("CREATE TABLE t{table}(id INTEGER PRIMARY KEY, k, data)")).unwrap();
            }
        }
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.connections.clear();
        for (number, name) in NAMES.iter().enumerate() {
            // Alone, it can change the mode.
            let sql = self.site.open(name);
            let mode = MODES[self.random.below(4) as usize];
            assert_eq!(sql.text(&format!("PRAGMA journal_mode={mode}")), mode.to_lowercase());
            self.connections.push((number, sql));
            self.connections.push((number, self.site.open(name)));
        }
        for (_, sql) in &self.connections {
            let cache = [1, 5, 30, 2000][self.random.below(4) as usize];
            let mode = ["TRUNCATE", "PERSIST", "DELETE"][self.random.below(3) as usize];
            // A database in WAL mode stays in it while another one has it open.
            let _ = sql.run(&format!("PRAGMA cache_size={cache}; PRAGMA journal_mode={mode}"));
            let checkpoint = [1000, 10, 0][self.random.below(3) as usize];
            sql.run(&format!("PRAGMA wal_autocheckpoint={checkpoint}")).unwrap();
        }
    }

    fn statement(&mut self) {
        let random = &mut self.random;
        let (any, stays) = (random.below(4) as usize, !random.one_in(8));
        let open = self.connections.iter().position(|(_, sql)| sql.in_transaction()).filter(|_| stays);
        let (_, sql) = &self.connections[open.unwrap_or(any)];
        let (table, row) = (random.below(4), random.below(60));
        let largest = [20, self.page_size * 2, self.page_size * 12][random.below(3) as usize];
        let blob = format!("randomblob({})", random.below(largest).min(90_000) + 1);
        let text = match random.below(30) {
            0..9 => format!("INSERT INTO t{table}(k, data) VALUES ({row}, {blob})"),
            9..12 => format!("UPDATE t{table} SET data = {blob} WHERE id % 7 = {}", row % 7),
            12..14 => format!("UPDATE t{table} SET k = k + 1 WHERE k > {row}"),
            14..16 => format!("DELETE FROM t{table} WHERE id % 3 = {}", row % 3),
            16 => format!("DELETE FROM t{table}"),
            17..19 => ["BEGIN", "BEGIN IMMEDIATE"][random.below(2) as usize].to_owned(),
            19..22 => "COMMIT".to_owned(),
            22 => "ROLLBACK".to_owned(),
            23 => ["SAVEPOINT s", "ROLLBACK TO s", "RELEASE s"][random.below(3) as usize].to_owned(),
            24 => format!("CREATE INDEX IF NOT EXISTS i{table} ON t{table}(k, data)"),
            25 => format!("DROP INDEX IF EXISTS i{table}"),
            26 => ["CREATE TABLE IF NOT EXISTS t3(id INTEGER PRIMARY KEY, k, data)", "DROP TABLE IF EXISTS t3"]
                [random.below(2) as usize]
                .to_owned(),
            27 => format!("PRAGMA incremental_vacuum({row})"),
            28 => "PRAGMA wal_checkpoint(TRUNCATE)".to_owned(),
            _ => "VACUUM".to_owned(),
        };
        let before = self.site.log.last_commit();
        let _ = sql.run(&text);
        self.commits += u64::from(self.site.log.last_commit() > before);
    }

    fn refuse_next(&mut self) {
        let (number, sql) = &self.connections[self.random.below(4) as usize];
        if self.connections.iter().any(|(_, sql)| sql.in_transaction()) {
            return;
        }
        let before = sql.text(DIGEST);
        self.site.log.answer(Answer::Refuse);
        sql.run(&format!("INSERT INTO t0(data) VALUES (randomblob({}))", self.page_size * 3)).unwrap_err();
        self.site.log.answer(Answer::Accept);
        for (other, sql) in &self.connections {
            assert!(other != number || sql.text(DIGEST) == before, "a refused transaction left a trace");
        }
        self.refused += 1;
    }

    /// Ends all transactions and connections.
    fn close(&mut self) {
        for (_, sql) in &self.connections {
            if sql.in_transaction() && sql.run("COMMIT").is_err() {
                let _ = sql.run("ROLLBACK");
            }
        }
        self.connections.clear();
    }

    fn step(&mut self) {
        match self.random.below(60) {
            0 => {
                let committed = self.site.log.last_index();
                self.site.checkpoint(committed);
            }
            1..4 => self.site.follower.follow(&self.site.log),
            4..7 => self.refuse_next(),
            7 if self.random.one_in(3) => {
                self.close();
                self.site.compare();
                self.connect();
            }
            _ => self.statement(),
        }
    }
}

fn run(seed: u64, steps: u64) -> (u64, u64, usize) {
    println!("SEED={seed}");
    let mut world = World::new(seed);
    (0..steps).for_each(|_| world.step());
    world.close();
    world.site.compare();
    let site = &mut world.site;
    // Whatever a crash has left: with the log, it is what all have.
    let mut images = 0;
    for image in std::fs::read_dir(site.root.path().join("images")).unwrap() {
        let image = image.unwrap().path();
        let mut member = Member::open(image.clone(), &site.log);
        member.follow(&site.log);
        for (mine, theirs) in member.members.iter().zip(site.follower.members.iter()) {
            mine.verify().unwrap();
            assert_eq!(mine.checksum(), theirs.checksum(), "{}", image.display());
        }
        assert_eq!(member.members.catalogue(), site.follower.members.catalogue());
        images += 1;
    }
    (world.commits, world.refused, images)
}

#[test]
fn random_workloads_in_a_folder_end_in_the_same_files() {
    if let Ok(seed) = std::env::var("SEED") {
        run(seed.parse().expect("SEED is a number"), 200);
        return;
    }
    let (mut commits, mut refused, mut images) = (0, 0, 0);
    for seed in 0..12 {
        let done = run(seed, 200);
        (commits, refused, images) = (commits + done.0, refused + done.1, images + done.2);
    }
    println!("{commits} commits, {refused} refused, {images} images of crashes");
    assert!(commits > 500 && refused > 20 && images > 50, "the workload does not do its work");
}
