//! The events that the Console has not acknowledged: a log on disk, bounded in bytes. Owns the numbers of events. Must
//! never give a number twice, never show an event that is not synced, and never let one go unseen: what is dropped or
//! cut is told by an event of its own.
//!
//! Segments are named for the number of their first event, and numbers in them go on without a gap. Between two of them
//! there may be one: after a cut, the numbers that the cut bytes could have held are passed over. So a record that only
//! looked torn, and had been sent, shares its number with nobody.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::wire::Numbered;
use crate::{
    clock::unix_time_ms,
    little_endian::{u32_at, u64_at},
};

/// A segment that is longer than this gets a successor.
const SEGMENT: u64 = 1 << 20;
/// What a segment begins with: its kind and version, the number of its first event, and a checksum of both.
const MAGIC: &[u8; 8] = b"TWDQ\0\0\0\x01";
const HEADER: usize = 20;
/// What stands before the text of an event: its length, a checksum of number and text, its number.
const RECORD: usize = 16;
/// More records than any segment has.
const RECORDS: u64 = 2 * SEGMENT / RECORD as u64;
/// Longest text of an event with its time and kind.
const TEXT: usize = super::wire::EVENT + 256;

/// An event that has no number yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// In milliseconds since 1970.
    pub time: u64,
    pub kind: &'static str,
    pub event: Value,
}

/// The log.
#[derive(Debug)]
pub struct Queue {
    folder: PathBuf,
    /// Bytes of all segments, at most.
    limit: u64,
    /// Never empty. The last one is written to.
    segments: VecDeque<Segment>,
    file: File,
    /// All up to this number are acknowledged, as far as this process knows.
    released: u64,
    /// Where the last read ended.
    reading: Option<Cursor>,
    /// A write failed: what is on disk is not known.
    broken: bool,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    /// The number of its first event, and the one behind its last.
    first: u64,
    end: u64,
    bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Cursor {
    /// The segment, by its first number.
    segment: u64,
    next: u64,
    offset: u64,
}

impl Queue {
    /// Opens the log in this folder, or begins one.
    ///
    /// # Errors
    /// When a file cannot be read, written or synced.
    pub fn open(folder: &Path, limit: u64) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let (mut segments, mut bad) = (VecDeque::new(), Vec::new());
        let (mut next, mut cut) = (1, None);
        for first in names(folder)? {
            let path = path_of(folder, first);
            let length = fs::metadata(&path)?.len();
            let (end, good) = scan(&path, first)?;
            next = end;
            if good < length || good == 0 {
                // Of a segment without a header nobody knows how much there was.
                next += if good == 0 { RECORDS } else { (length - good) / RECORD as u64 + 1 };
                cut = Some(cut.unwrap_or(0) + length - good);
                bad.push((path, good));
            }
            if good > 0 {
                segments.push_back(Segment { first, end, bytes: good });
            }
        }
        let fits = segments.back().is_some_and(|last: &Segment| last.end == next);
        let file = match segments.back() {
            Some(last) if fits => OpenOptions::new().append(true).open(path_of(folder, last.first))?,
            _ => {
                segments.push_back(Segment { first: next, end: next, bytes: HEADER as u64 });
                begin(folder, next)?
            }
        };
        // What an earlier process wrote and did not sync is taken now.
        file.sync_all()?;
        sync_folder(folder)?;
        let folder = folder.to_owned();
        let mut queue = Self { folder, limit, segments, file, released: 0, reading: None, broken: false };
        if let Some(cut) = cut {
            queue.append(&[Draft { time: unix_time_ms(), kind: "cut", event: json!({ "bytes": cut }) }])?;
        }
        // It is told, and the numbers go on behind it.
        bad.into_iter().try_for_each(|(path, good)| shorten(&path, good))?;
        Ok(queue)
    }

    /// The number of the next event.
    pub fn next(&self) -> u64 {
        self.last().end
    }

    /// The number of the first event that is here, or of the next one.
    pub fn oldest(&self) -> u64 {
        self.segments.iter().find(|segment| segment.end > segment.first).map_or(self.next(), |segment| segment.first)
    }

    /// Takes events, a mebibyte at most: when it returns, they are on disk and have their numbers.
    ///
    /// # Errors
    /// When they cannot be written. The log is of no use any more then: what of it is on disk shows at the next start.
    pub fn append(&mut self, drafts: &[Draft]) -> io::Result<()> {
        self.intact()?;
        self.broken = true;
        let mut bytes = Vec::new();
        let mut end = self.next();
        for draft in drafts {
            record(end, draft, &mut bytes)?;
            end += 1;
        }
        if bytes.len() as u64 > SEGMENT {
            self.broken = false;
            return Err(io::Error::other("too many events at once"));
        }
        let going = self.going(bytes.len() as u64);
        if let Some((first, last)) = going.range {
            let event = json!({ "first": first, "last": last, "count": last - first + 1 });
            let draft = Draft { time: unix_time_ms(), kind: "dropped", event };
            record(end, &draft, &mut bytes)?;
            end += 1;
        }
        if self.last().bytes >= SEGMENT {
            self.file = begin(&self.folder, self.next())?;
            let first = self.next();
            self.segments.push_back(Segment { first, end: first, bytes: HEADER as u64 });
        }
        self.file.write_all(&bytes)?;
        self.file.sync_data()?;
        if let Some(last) = self.segments.back_mut() {
            last.end = end;
            last.bytes += bytes.len() as u64;
        }
        // It is told; now it may go.
        (0..going.segments).try_for_each(|_| self.remove_oldest())?;
        self.broken = false;
        Ok(())
    }

    /// True if events would have to go for so many bytes more.
    pub fn is_full(&self, bytes: usize) -> bool {
        self.going(bytes as u64).segments > 0
    }

    /// Events from this number on, as far as they are here: so many, and of so many bytes, at most; one in any case.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(&mut self, from: u64, events: usize, bytes: usize) -> io::Result<Vec<Numbered>> {
        self.intact()?;
        let mut found = Vec::new();
        let mut length = 0;
        let mut next = from.max(self.oldest());
        while let Some(segment) = self.segments.iter().find(|segment| segment.end > next).copied() {
            next = next.max(segment.first);
            let mut cursor = match self.reading {
                Some(cursor) if cursor.segment == segment.first && cursor.next <= next => cursor,
                _ => Cursor { segment: segment.first, next: segment.first, offset: HEADER as u64 },
            };
            let mut file = File::open(path_of(&self.folder, segment.first))?;
            file.seek(SeekFrom::Start(cursor.offset))?;
            let mut file = io::BufReader::new(file.take(segment.bytes - cursor.offset));
            while cursor.next < segment.end {
                let Some(text) = read_record(&mut file, cursor.next)? else {
                    return Err(damaged(&self.folder, cursor.next));
                };
                if cursor.next >= next {
                    length += text.len();
                    if found.len() >= events || (length > bytes && !found.is_empty()) {
                        return Ok(found);
                    }
                    found.push(parse(cursor.next, &text)?);
                    next += 1;
                }
                cursor.offset += (RECORD + text.len()) as u64;
                cursor.next += 1;
                self.reading = Some(cursor);
            }
        }
        Ok(found)
    }

    /// The time of an event, if it is here.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn time_of(&mut self, number: u64) -> io::Result<Option<u64>> {
        let first = self.read(number, 1, 0)?.into_iter().next();
        Ok(first.filter(|event| event.sequence == number).map(|event| event.time))
    }

    /// All events up to this number may go: the Console has them.
    ///
    /// # Errors
    /// When a file cannot be made or removed.
    pub fn release(&mut self, through: u64) -> io::Result<()> {
        self.intact()?;
        self.released = self.released.max(through.min(self.next() - 1));
        self.broken = true;
        let last = self.last();
        // The last segment carries the count on; it goes when it has a successor.
        if last.end > last.first && last.end - 1 <= self.released && last.bytes >= SEGMENT / 4 {
            self.file = begin(&self.folder, last.end)?;
            self.segments.push_back(Segment { first: last.end, end: last.end, bytes: HEADER as u64 });
        }
        while self.segments.len() > 1 && self.segments[0].end - 1 <= self.released {
            self.remove_oldest()?;
        }
        self.broken = false;
        Ok(())
    }

    /// Goes on with this number: the ones before it are the Console's already. What is here up to it goes.
    ///
    /// # Errors
    /// When a file cannot be made or removed.
    pub fn skip_to(&mut self, next: u64) -> io::Result<()> {
        self.intact()?;
        if next > self.next() {
            self.broken = true;
            self.file = begin(&self.folder, next)?;
            self.segments.push_back(Segment { first: next, end: next, bytes: HEADER as u64 });
            self.broken = false;
        }
        self.release(next - 1)
    }

    fn last(&self) -> Segment {
        *self.segments.back().expect("a log has a segment")
    }

    fn intact(&self) -> io::Result<()> {
        if self.broken { Err(io::Error::other("an earlier write to the queue failed")) } else { Ok(()) }
    }

    /// What has to go for so many bytes more.
    fn going(&self, more: u64) -> Going {
        let mut bytes = self.segments.iter().map(|segment| segment.bytes).sum::<u64>() + more;
        let mut going = Going { segments: 0, range: None };
        for segment in self.segments.iter().take(self.segments.len() - 1) {
            if bytes <= self.limit {
                break;
            }
            bytes -= segment.bytes;
            going.segments += 1;
            let first = segment.first.max(self.released + 1);
            if first < segment.end {
                going.range = Some((going.range.map_or(first, |(first, _)| first), segment.end - 1));
            }
        }
        going
    }

    fn remove_oldest(&mut self) -> io::Result<()> {
        if let Some(segment) = self.segments.pop_front() {
            fs::remove_file(path_of(&self.folder, segment.first))?;
            sync_folder(&self.folder)?;
        }
        Ok(())
    }
}

/// The oldest segments that must go, and the events that nobody will see.
struct Going {
    segments: usize,
    range: Option<(u64, u64)>,
}

fn path_of(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:020}.seg"))
}

/// The first numbers of all segments, in their order.
fn names(folder: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".seg"));
        found.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Makes a segment. It has its name when its header is on disk.
fn begin(folder: &Path, first: u64) -> io::Result<File> {
    let temporary = folder.join("new");
    let mut header = MAGIC.to_vec();
    header.extend(first.to_le_bytes());
    header.extend(crc32c::crc32c(&header).to_le_bytes());
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&header)?;
    file.sync_all()?;
    fs::rename(&temporary, path_of(folder, first))?;
    sync_folder(folder)?;
    OpenOptions::new().append(true).open(path_of(folder, first))
}

/// Takes away what cannot be read. A segment without a header is gone as a whole.
fn shorten(path: &Path, good: u64) -> io::Result<()> {
    match good {
        0 => fs::remove_file(path),
        good => {
            let file = OpenOptions::new().write(true).open(path)?;
            file.set_len(good)?;
            file.sync_all()
        }
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The number behind the last event that can be read, and where that event ends.
fn scan(path: &Path, first: u64) -> io::Result<(u64, u64)> {
    let mut file = io::BufReader::new(File::open(path)?);
    let mut header = Vec::new();
    file.by_ref().take(HEADER as u64).read_to_end(&mut header)?;
    let mut expected = MAGIC.to_vec();
    expected.extend(first.to_le_bytes());
    expected.extend(crc32c::crc32c(&expected).to_le_bytes());
    if header != expected {
        return Ok((first, 0));
    }
    let (mut next, mut good) = (first, HEADER as u64);
    while let Some(text) = read_record(&mut file, next)? {
        good += (RECORD + text.len()) as u64;
        next += 1;
    }
    Ok((next, good))
}

/// The text of the record with this number; none if there is no such record that is whole.
fn read_record(file: &mut impl Read, number: u64) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    file.take(RECORD as u64).read_to_end(&mut head)?;
    if head.len() < RECORD {
        return Ok(None);
    }
    let (length, checksum) = (u32_at(&head, 0) as usize, u32_at(&head, 4));
    if length > TEXT || u64_at(&head, 8) != number {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(length as u64).read_to_end(&mut text)?;
    let good = text.len() == length && crc32c::crc32c_append(crc32c::crc32c(&head[8..]), &text) == checksum;
    Ok(good.then_some(text))
}

/// Appends the record of an event. One that is too long is replaced by one that says so.
fn record(number: u64, draft: &Draft, bytes: &mut Vec<u8>) -> io::Result<()> {
    let text = |event: &Value| serde_json::to_vec(&(draft.time, draft.kind, event)).map_err(io::Error::other);
    let mut whole = text(&draft.event)?;
    if whole.len() > super::wire::EVENT {
        whole = text(&json!({ "tooLong": whole.len() }))?;
    }
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), &whole);
    bytes.extend((whole.len() as u32).to_le_bytes());
    bytes.extend(checksum.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend(whole);
    Ok(())
}

fn parse(sequence: u64, text: &[u8]) -> io::Result<Numbered> {
    let (time, kind, event) = serde_json::from_slice(text).map_err(io::Error::other)?;
    Ok(Numbered { sequence, time, kind, event })
}

fn damaged(folder: &Path, number: u64) -> io::Error {
    io::Error::other(format!("event {number} of the queue in {} cannot be read any more", folder.display()))
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
