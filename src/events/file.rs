//! The events of this node in a file, one JSON object a line, beside the file before it: both together are bounded.
//! Must never refuse to be read because a line is torn: a full disk or a power failure may have cut it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::{Event, Wanted};

/// Name of the file in the data folder.
pub const FILE: &str = "events.jsonl";
/// Name of the file before it.
const BEFORE: &str = "events.jsonl.1";
/// Length at which a file becomes the one before, in bytes.
const ROTATE: u64 = 1 << 20;
/// Longest line that is looked at.
const MAX_LINE: u64 = 32 << 10;

/// The file, open for more events.
pub(super) struct EventFile {
    folder: PathBuf,
    file: File,
    length: u64,
    /// The last line may be incomplete.
    torn: bool,
}

impl EventFile {
    /// Opens the file in this folder, or makes it.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join(FILE);
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path)?;
        let length = file.seek(SeekFrom::End(0))?;
        let mut last = [b'\n'];
        if length > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        Ok(Self { folder: folder.to_owned(), file, length, torn: last != [b'\n'] })
    }

    /// Adds one event. It outlives the process at once, and a power failure within seconds.
    pub fn add(&mut self, event: &Event) -> io::Result<()> {
        if self.length >= ROTATE {
            fs::rename(self.folder.join(FILE), self.folder.join(BEFORE))?;
            *self = Self::open(&self.folder)?;
        }
        let mut line = Vec::new();
        if self.torn {
            line.push(b'\n');
        }
        serde_json::to_writer(&mut line, event)?;
        line.push(b'\n');
        // Until the whole line is there.
        self.torn = true;
        self.file.write_all(&line)?;
        self.torn = false;
        self.length += line.len() as u64;
        Ok(())
    }
}

/// The events in this data folder that are wanted, newest first. Lines that are not events are skipped.
///
/// # Errors
/// When a file is there and cannot be read. `InvalidInput` when too many are wanted.
pub fn read(folder: &Path, wanted: &Wanted) -> io::Result<Vec<Event>> {
    let (limit, offset) = wanted.page().map_err(|why| io::Error::new(ErrorKind::InvalidInput, why))?;
    let mut events = Vec::new();
    for name in [BEFORE, FILE] {
        match File::open(folder.join(name)) {
            Ok(file) => lines(file, |event| {
                if wanted.admits(&event) {
                    events.push(event);
                }
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(events.into_iter().rev().skip(offset as usize).take(limit as usize).collect())
}

fn lines(file: File, mut each: impl FnMut(Event)) -> io::Result<()> {
    // One line more than fits: whatever else somebody put there is not read.
    let mut reader = BufReader::new(file.take(ROTATE + MAX_LINE));
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if let Ok(event) = serde_json::from_slice(&line) {
            each(event);
        }
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Kind, Severity};

    fn event(sentence: &str) -> Event {
        Event::new(Kind::Backup, Severity::Info, sentence)
    }

    fn sentences(folder: &Path, wanted: &Wanted) -> Vec<String> {
        read(folder, wanted).unwrap().into_iter().map(|event| event.sentence).collect()
    }

    #[test]
    fn a_torn_line_costs_nothing_but_itself() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path(), &Wanted::default()).unwrap(), []);
        EventFile::open(folder.path()).unwrap().add(&event("first")).unwrap();
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for cut in [1, 5, whole.len() - 1] {
            fs::write(&path, [&whole[..], &whole[..cut]].concat()).unwrap();
            EventFile::open(folder.path()).unwrap().add(&event("last")).unwrap();
            // A line that lacks its end only is whole.
            let kept = if cut == whole.len() - 1 { 3 } else { 2 };
            let read = sentences(folder.path(), &Wanted::default());
            assert_eq!((read.len(), read[0].as_str(), read[kept - 1].as_str()), (kept, "last", "first"));
        }
    }

    #[test]
    fn both_files_together_are_bounded_and_paged_newest_first() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        let long = "x".repeat(400);
        for number in 0..8000 {
            file.add(&event(&format!("{number} {long}"))).unwrap();
        }
        let length = |name| fs::metadata(folder.path().join(name)).unwrap().len();
        assert!(length(FILE) <= ROTATE + MAX_LINE && length(BEFORE) <= ROTATE + MAX_LINE);
        let number = |text: &String| text.split(' ').next().unwrap().parse::<u32>().unwrap();
        let page = |offset| {
            let wanted = Wanted { limit: Some(400), offset: Some(offset), ..Wanted::default() };
            sentences(folder.path(), &wanted).iter().map(number).collect::<Vec<_>>()
        };
        assert_eq!(page(0), (7600..8000).rev().collect::<Vec<_>>());
        assert_eq!(page(400), (7200..7600).rev().collect::<Vec<_>>());
        assert_eq!(page(8000), Vec::<u32>::new());
    }

    #[test]
    fn kind_and_time_are_filters() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        let other = Event::new(Kind::Pause, Severity::Info, "other");
        file.add(&event("first")).unwrap();
        file.add(&other).unwrap();
        let kind = Wanted { kind: Some(Kind::Pause), ..Wanted::default() };
        assert_eq!(sentences(folder.path(), &kind), ["other"]);
        let later = other.time + jiff::SignedDuration::from_secs(1);
        let since = |since| Wanted { since: Some(since), ..Wanted::default() };
        assert_eq!(sentences(folder.path(), &since(later)), Vec::<String>::new());
        assert!(sentences(folder.path(), &since(other.time)).contains(&"other".to_owned()));
    }
}
