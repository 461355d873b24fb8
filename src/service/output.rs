//! What a service writes: as lines of our log, and the last ones in memory for whoever asks. Reads on whatever comes
//! and however much, so that the service never waits for us. Must never keep more than it says, nor let a flood fill
//! the log.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{clock::unix_time_ms, mutex::locked};

/// Lines that are kept in memory.
pub const KEPT: usize = 2000;
/// Longest line, in bytes; the rest is cut.
pub const LONGEST_LINE: usize = 2048;
/// Lines a second that go into the log in the long run, and at once.
const RATE: (f64, f64) = (50.0, 500.0);
/// How often it is said that lines were left out of the log.
const TOLD: Duration = Duration::from_secs(10);

/// One line that the service has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputLine {
    /// Its number on this node, from 1: to go on behind it.
    pub number: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// Without control characters.
    pub text: String,
}

/// The last lines.
#[derive(Clone, Debug, Default)]
pub struct Journal(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<OutputLine>,
    written: u64,
}

impl Journal {
    /// At most `most` lines behind this number, the oldest first: the last ones if there are more.
    pub fn behind(&self, number: u64, most: usize) -> Vec<OutputLine> {
        let kept = locked(&self.0);
        let newer = kept.lines.iter().rev().take_while(|line| line.number > number).take(most);
        let mut lines: Vec<_> = newer.cloned().collect();
        lines.reverse();
        lines
    }

    fn add(&self, text: &str) {
        let mut kept = locked(&self.0);
        kept.written += 1;
        if kept.lines.len() >= KEPT {
            kept.lines.pop_front();
        }
        let number = kept.written;
        kept.lines.push_back(OutputLine { number, time_ms: unix_time_ms(), text: text.to_owned() });
    }
}

/// Lets so many through, and counts the others.
struct Valve {
    tokens: f64,
    at: Instant,
    left_out: u64,
    told: Instant,
}

impl Valve {
    fn new(now: Instant) -> Self {
        Self { tokens: RATE.1, at: now, left_out: 0, told: now }
    }

    /// Whether this line goes into the log.
    fn admits(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(std::mem::replace(&mut self.at, now)).as_secs_f64();
        self.tokens = (self.tokens + passed * RATE.0).min(RATE.1);
        let admitted = self.tokens >= 1.0;
        if admitted {
            self.tokens -= 1.0;
        } else {
            self.left_out += 1;
        }
        admitted
    }

    /// How many were left out, when it is time to say so.
    fn left_out(&mut self, now: Instant) -> Option<u64> {
        let due = self.left_out > 0 && now.saturating_duration_since(self.told) >= TOLD;
        due.then(|| {
            self.told = now;
            std::mem::take(&mut self.left_out)
        })
    }
}

/// Cuts bytes into lines.
#[derive(Debug, Default)]
struct Cutter {
    line: Vec<u8>,
    /// The line is too long: the rest of it is left out.
    cut: bool,
}

impl Cutter {
    fn take(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = piece.strip_suffix(b"\n").map_or((piece, false), |text| (text, true));
            let room = LONGEST_LINE - self.line.len();
            self.cut |= text.len() > room;
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if ends {
                self.end(&mut line);
            }
        }
    }

    fn end(&mut self, line: &mut impl FnMut(&str)) {
        let mut text = String::new();
        for c in String::from_utf8_lossy(&self.line).trim_end_matches('\r').chars() {
            if c.is_control() && c != '\t' { text.extend(c.escape_default()) } else { text.push(c) }
        }
        if std::mem::take(&mut self.cut) {
            text.push_str(" ...");
        }
        self.line.clear();
        if !text.is_empty() {
            line(&text);
        }
    }
}

/// Follows what a service writes until its end.
pub(super) async fn follow(mut source: impl AsyncRead + Unpin, journal: Journal) {
    let (mut bytes, mut cutter, mut valve) = (vec![0; 16 << 10], Cutter::default(), Valve::new(Instant::now()));
    loop {
        let length = source.read(&mut bytes).await.unwrap_or(0);
        let now = Instant::now();
        let mut one = |line: &str| {
            journal.add(line);
            if valve.admits(now) {
                tracing::info!(target: "service", "{line}");
            }
        };
        if length == 0 {
            cutter.end(&mut one);
            return;
        }
        cutter.take(&bytes[..length], &mut one);
        if let Some(lines) = valve.left_out(now) {
            tracing::warn!(lines, "the service writes more than fits into this log: these lines were left out");
        }
        // One that never stops must not keep a thread of the runtime.
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_lines_wherever_they_are_cut() {
        let (mut cutter, mut lines) = (Cutter::default(), Vec::new());
        let mut add = |line: &str| lines.push(line.to_owned());
        for piece in ["fir", "st\r\nsecond\n\n", "\u{1b}[31mred\u{7}\n", "rest"] {
            cutter.take(piece.as_bytes(), &mut add);
        }
        cutter.take(&vec![b'x'; 5000], &mut add);
        cutter.take(b"\nlast", &mut add);
        cutter.end(&mut add);
        assert_eq!(lines[..3], ["first", "second", "\\u{1b}[31mred\\u{7}"]);
        assert!(lines[3].starts_with("restxxx") && lines[3].ends_with("xxx ...") && lines[3].len() == LONGEST_LINE + 4);
        assert_eq!(lines[4..], ["last"]);
    }

    #[test]
    fn a_flood_fills_neither_the_log_nor_the_memory() {
        let now = Instant::now();
        let mut valve = Valve::new(now);
        let admitted = (0..10_000).filter(|_| valve.admits(now)).count();
        assert_eq!(admitted, 500);
        assert_eq!(valve.left_out(now), None);
        let later = now + TOLD;
        assert!(valve.admits(later));
        assert_eq!(valve.left_out(later), Some(9500));
        let journal = Journal::default();
        for number in 0..KEPT + 10 {
            journal.add(&number.to_string());
        }
        let all = journal.behind(0, usize::MAX);
        assert_eq!((all.len(), all[0].text.as_str(), all[0].number), (KEPT, "10", 11));
        let last = journal.behind(all[0].number, 2);
        assert_eq!(last.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["2008", "2009"]);
        assert!(journal.behind(last[1].number, 9).is_empty());
    }

    #[tokio::test]
    async fn what_comes_is_kept_to_its_last_byte() {
        let journal = Journal::default();
        follow(&b"one\ntwo"[..], journal.clone()).await;
        let texts: Vec<String> = journal.behind(0, 9).into_iter().map(|line| line.text).collect();
        assert_eq!(texts, ["one", "two"]);
    }
}
