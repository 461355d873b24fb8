//! Lines of the log that say the same again and again: counted, and told of once in a while. One place for all of them,
//! so that no place in the program can fill the log, whatever strangers send. Must never keep a line back that says
//! something new, but for a place that says something new all the time.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Mutex,
    time::{Duration, Instant},
};

use tracing::{Event, Level, Subscriber, callsite::Identifier};
use tracing_subscriber::{Layer, layer::Context};

use super::{LOG_LINES_REPEATED, Text};
use crate::mutex::locked;

/// How long a line is not repeated.
const WINDOW: Duration = Duration::from_secs(60);
/// How often the same line of the same place is written in that time.
const SAME: u32 = 3;
/// How many lines one place in the program writes in that time, whatever they say.
const PLACE: u32 = 120;
/// Lines and places that are watched; when there are more, the oldest windows end early.
const WATCHED: usize = 1024;
/// What is told is not counted itself.
const TELLER: &str = "twistlock_ha::telemetry::repeats";

/// One text of a place, or all texts of it.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key(Identifier, Option<u64>);

struct Window {
    began: Instant,
    written: u32,
    kept_back: u64,
    level: Level,
    text: String,
}

/// What the windows have.
#[derive(Default)]
struct Table(HashMap<Key, Window>);

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

impl Table {
    /// True if the line is to be written.
    fn permits(&mut self, key: Key, most: u32, line: (Level, &str), now: Instant) -> bool {
        if self.0.len() >= WATCHED && !self.0.contains_key(&key) {
            self.forget(now);
        }
        let window = match self.0.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let (level, text) = line;
                free.insert(Window { began: now, written: 0, kept_back: 0, level, text: text.to_owned() })
            }
        };
        // One that has ended is told of by `ended`; until then it goes on.
        if window.written < most || (window.kept_back == 0 && now.duration_since(window.began) >= WINDOW) {
            if now.duration_since(window.began) >= WINDOW {
                (window.began, window.written) = (now, 0);
            }
            window.written += 1;
            return true;
        }
        window.kept_back += 1;
        false
    }

    /// Makes room: for want of better ones, the oldest window that has kept nothing back goes.
    fn forget(&mut self, now: Instant) {
        self.0.retain(|_, window| window.kept_back > 0 || now.duration_since(window.began) < WINDOW);
        while self.0.len() >= WATCHED {
            let oldest = self.0.iter().min_by_key(|(_, window)| (window.kept_back > 0, window.began));
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { return };
            self.0.remove(&oldest);
        }
    }

    /// Windows that have ended and have kept lines back.
    fn ended(&mut self, now: Instant) -> Vec<(bool, Window)> {
        let over = |_: &Key, window: &mut Window| now.duration_since(window.began) >= WINDOW;
        let ended = self.0.extract_if(over).filter(|(_, window)| window.kept_back > 0);
        ended.map(|(Key(_, text), window)| (text.is_some(), window)).collect()
    }
}

/// Stands before whatever writes lines.
pub(super) struct Repeats;

impl<S: Subscriber> Layer<S> for Repeats {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let (level, place) = (*event.metadata().level(), event.metadata().callsite());
        // Whoever asks for more than the usual wants all of it.
        if level > Level::INFO || event.metadata().target() == TELLER {
            return true;
        }
        let mut text = Text::default();
        event.record(&mut text);
        let text = text.finish();
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let mut table = locked(&TABLE);
        let table = table.get_or_insert_default();
        let now = Instant::now();
        let permitted = table.permits(Key(place.clone(), Some(hasher.finish())), SAME, (level, &text), now)
            && table.permits(Key(place, None), PLACE, (level, &text), now);
        if !permitted {
            metrics::counter!(LOG_LINES_REPEATED).increment(1);
        }
        permitted
    }
}

/// Tells of the lines that were kept back, once their time is over. Is called every few seconds.
pub(super) fn tell() {
    let ended = locked(&TABLE).as_mut().map(|table| table.ended(Instant::now()));
    for (same, Window { kept_back, level, text, began, .. }) in ended.into_iter().flatten() {
        let (seconds, like) = (began.elapsed().as_secs(), if same { "" } else { " of this kind" });
        let line = format!("{text} ... {kept_back} more{like} in the last {seconds} s");
        match level {
            Level::ERROR => tracing::error!(target: TELLER, "{line}"),
            Level::WARN => tracing::warn!(target: TELLER, "{line}"),
            _ => tracing::info!(target: TELLER, "{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing::Callsite;
    use tracing_subscriber::{layer::SubscriberExt, registry};

    use super::*;

    struct Lines(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Lines {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut text = Text::default();
            event.record(&mut text);
            self.0.lock().unwrap().push(text.finish());
        }
    }

    #[test]
    fn what_says_the_same_is_counted_and_what_says_something_new_is_written() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let written = |work: &dyn Fn()| {
            let log = registry().with(Repeats).with(Lines(Arc::clone(&lines)));
            tracing::subscriber::with_default(log, work);
            std::mem::take(&mut *lines.lock().unwrap())
        };
        let complain = |error: &str| tracing::error!("cannot accept: {error}");
        assert_eq!(written(&|| (0..500).for_each(|_| complain("full"))).len(), SAME as usize);
        assert_eq!(written(&|| complain("something else")), ["cannot accept: something else"]);
        let strangers = || (0..500).for_each(|port| tracing::warn!(port, "refused"));
        assert_eq!(written(&strangers).len(), PLACE as usize);
        assert_eq!(written(&|| (0..5).for_each(|_| tracing::info!("another place"))).len(), SAME as usize);
        assert_eq!(written(&|| (0..500).for_each(|_| tracing::debug!("asked for"))).len(), 500);
        let mut table = TABLE.lock().unwrap();
        let (now, table) = (Instant::now(), table.as_mut().unwrap());
        let told = |table: &mut Table, at| {
            let mut told: Vec<_> = table.ended(at).into_iter().map(|(_, window)| window.kept_back).collect();
            told.sort_unstable();
            told
        };
        assert!(told(table, now).is_empty(), "not before its time");
        let own: &[u64] = &[2, 500 - u64::from(PLACE), 500 - u64::from(SAME)];
        let told = told(table, now + WINDOW);
        assert!(own.iter().all(|kept| told.contains(kept)), "{told:?}");
    }

    #[test]
    fn what_is_watched_is_bounded() {
        let (mut table, now) = (Table::default(), Instant::now());
        let place =
            tracing::callsite!(name: "place", kind: tracing::metadata::Kind::EVENT, fields: ).metadata().callsite();
        for number in 0..2 * WATCHED as u64 {
            let key = Key(place.clone(), Some(number));
            assert!(table.permits(key, 1, (Level::INFO, "x"), now));
        }
        assert_eq!(table.0.len(), WATCHED);
    }
}
