//! The raft log over a disk that is stopped at every operation. `SEED=n` replays one seed.

mod model;
mod script;

use model::{Image, Model, Random};
use script::{Content, Script, describe, open};
use twistlock_ha::storage::raft_log::{LogError, MIN_SEGMENT};

const STEPS: usize = 60;
const SEEDS: u64 = 20;

/// Runs a test for every seed, or for the one that is asked for.
fn for_each_seed(count: u64, test: impl Fn(u64)) {
    match std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => test(seed),
        // 103: a batch that began in the oldest segment and ended in the next lost the state that the oldest began with.
        None => (1..=count).chain([103]).for_each(test),
    }
}

fn found(model: &Model, what: &str) -> Content {
    match open(model) {
        Ok(log) => Content::read(&log),
        Err(error) => panic!("{what}: does not open: {error}"),
    }
}

/// The log goes on from an image, and is stopped again somewhere, its recovery included.
fn second_life(image: Image, first: &Content, what: &str, random: &mut Random) {
    let model = Model::new(image);
    let log = open(&model).unwrap();
    let mut script = Script::new(log, &model, first.clone(), Random(random.next()));
    let opened = model.ops();
    script.run(6).unwrap_or_else(|error| panic!("{what}: the second life failed: {error}"));
    let trace = model.trace();
    let crash = random.below(trace.len() as u64 + 1) as usize;
    let mut platter = model.platter();
    trace[..crash].iter().for_each(|op| platter.apply(op));
    let image = platter.power_loss(trace.get(crash), random);
    let content = found(&Model::new(image), what);
    if crash < opened {
        assert!(content == *first, "{what}: stopped again during recovery at {crash}: {}", describe(&content));
    } else if let Err(error) = script.history.check(&content, crash, false) {
        panic!("{what}: stopped again at {crash} of {} (opened at {opened}): {error}", trace.len());
    }
}

#[test]
fn every_stop_leaves_a_state_of_the_log() {
    for_each_seed(SEEDS, |seed| {
        let model = Model::default();
        let log = open(&model).unwrap();
        let mut script = Script::new(log, &model, Content::fresh(), Random(seed));
        script.run(STEPS).unwrap();
        let trace = model.trace();
        let mut random = Random(!seed);
        let mut platter = model.platter();
        for crash in 0..=trace.len() {
            let torn = trace.get(crash);
            for sample in 0..4 {
                let image = platter.power_loss(torn, &mut random);
                let what = format!("SEED={seed}, power lost at operation {crash}, sample {sample}");
                let content = found(&Model::new(image.clone()), &what);
                if let Err(error) = script.history.check(&content, crash, false) {
                    panic!("{what}: {error}");
                }
                second_life(image, &content, &what, &mut random);
            }
            torn.into_iter().for_each(|op| platter.apply(op));
        }
    });
}

#[test]
fn a_killed_process_loses_nothing_it_had_written() {
    for_each_seed(SEEDS, |seed| {
        let model = Model::default();
        let log = open(&model).unwrap();
        let mut script = Script::new(log, &model, Content::fresh(), Random(seed));
        for _ in 0..STEPS {
            script.step().unwrap();
            let what = format!("SEED={seed}, killed after operation {}", model.ops());
            let content = found(&Model::new(model.live()), &what);
            if let Err(error) = script.history.check(&content, model.ops(), true) {
                panic!("{what}: {error}");
            }
        }
    });
}

#[test]
fn after_a_failed_operation_nothing_is_promised_that_is_not_kept() {
    for_each_seed(SEEDS, |seed| {
        for fail in 0.. {
            let model = Model::default();
            model.fail_at(Some(fail));
            let Ok(log) = open(&model) else { continue };
            let mut script = Script::new(log, &model, Content::fresh(), Random(seed));
            let what = format!("SEED={seed}, operation {fail} failed");
            match script.run(STEPS) {
                Ok(()) => break,
                Err(error) => assert!(matches!(error, LogError::Io { .. }), "{what}: {error}"),
            }
            assert!(script.log.poison().is_some(), "{what}");
            assert!(matches!(script.log.append(&[], Some(&script.history.now().hard)), Err(LogError::Poisoned(_))));
            let Script { log, history, .. } = script;
            drop(log);
            // The process starts again on what the kernel still shows, and relies on what it finds from then on.
            let stopped = model.ops();
            let content = found(&model, &what);
            history.check(&content, stopped, false).unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut platter = model.platter();
            model.trace().iter().for_each(|op| platter.apply(op));
            let image = platter.power_loss(None, &mut Random(seed));
            let after = found(&Model::new(image), &what);
            assert!(after == content, "{what}: {} became {}", describe(&content), describe(&after));
        }
    });
}

#[test]
fn damage_is_told_from_a_torn_tail() {
    for_each_seed(SEEDS, |seed| {
        let model = Model::default();
        let log = open(&model).unwrap();
        let mut script = Script::new(log, &model, Content::fresh(), Random(seed));
        script.run(STEPS).unwrap();
        // Three synced batches in a row: the later ones prove the earlier ones.
        let mut states = vec![script.history.now().clone()];
        for _ in 0..3 {
            let mut hard = script.history.now().hard.clone();
            hard.term += states.len() as u64;
            script.log.append(&[], Some(&hard)).unwrap().sync().unwrap();
            states.push(Content { hard, ..states[0].clone() });
        }
        let image = model.live();
        let mut random = Random(seed);
        let mut refused = 0;
        for _ in 0..400 {
            let mut damaged = image.clone();
            let file = random.below(image.len() as u64) as usize;
            let bytes = damaged.values_mut().nth(file).unwrap();
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
            match open(&Model::new(damaged)) {
                Ok(log) => {
                    let content = Content::read(&log);
                    // At most the very last batch may be lost to damage unseen.
                    assert!(states[2..].contains(&content), "SEED={seed} byte {at}: {}", describe(&content));
                }
                Err(LogError::Damaged { .. } | LogError::Newer { .. }) => refused += 1,
                Err(error) => panic!("SEED={seed} byte {at}: {error}"),
            }
        }
        assert!(refused > 0, "SEED={seed}: no damage was found");
    });
}

#[test]
fn a_full_disk_refuses_whole_batches_and_compaction_helps() {
    for_each_seed(SEEDS, |seed| {
        let model = Model::default();
        model.set_quota(Some(4 * MIN_SEGMENT));
        let log = open(&model).unwrap();
        let mut random = Random(seed);
        let mut content = Content::fresh();
        for _ in 0..30 {
            // Fill the disk.
            loop {
                let last = content.last();
                let entry =
                    |index| raft::eraftpb::Entry { index, term: 1, data: vec![1; 3000].into(), ..Default::default() };
                let entries: Vec<_> = (last + 1..last + 2 + random.below(12)).map(entry).collect();
                match log.append(&entries, None) {
                    Ok(pending) => {
                        pending.sync().unwrap();
                        content.entries.extend(entries);
                    }
                    Err(LogError::Full { .. }) => break,
                    Err(error) => panic!("SEED={seed}: {error}"),
                }
            }
            assert!(log.poison().is_none());
            assert_eq!(Content::read(&log), content);
            assert_eq!(found(&Model::new(model.live()), "full"), content);
            content.hard.commit = content.last();
            if log.append(&[], Some(&content.hard)).and_then(|pending| pending.sync()).is_err() {
                // There may be no space even for that; a caller waits for an entry that fits.
                content.hard.commit = log.hard_state().commit;
            }
            let gone = (content.hard.commit - content.compacted.0) as usize;
            log.compact(content.hard.commit).unwrap();
            if gone > 0 {
                content.compacted = (content.hard.commit, 1);
                content.entries.drain(..gone);
            }
        }
        let written = content.last();
        assert!(written > 100, "SEED={seed}: only {written} entries after compaction");
    });
}
