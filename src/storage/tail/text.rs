//! What people read about a dropped tail: its transactions, the pages that they write, and the rows in which those
//! differ from this node's database. Must never claim more than the page images show.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
};

use raft::eraftpb::Entry;

use super::{
    Header,
    rows::{rows, tables},
};
use crate::storage::{
    folder::catalogue,
    transaction::{CONSOLE_DATABASE, Pages},
};

/// Lines about single entries and transactions; further ones are only counted.
const MAX_LINES: usize = 1000;
/// Bytes of page images whose rows are listed. Rows in further images are not.
const MAX_IMAGES: usize = 64 << 20;

#[derive(Debug)]
struct Transaction {
    /// Rows are listed of the Console's alone: what a service has is not ours to show.
    database: u32,
    id: u64,
    first: u64,
    last: u64,
    page_size: u32,
    pages: BTreeSet<u32>,
    /// The images whose rows are listed. The last one of each page counts.
    images: BTreeMap<u32, Vec<u8>>,
    complete: bool,
}

/// Collects the summary, entry by entry.
#[derive(Debug, Default)]
pub(super) struct Summary {
    transactions: Vec<Transaction>,
    /// Entries that are not part of a transaction.
    others: Vec<String>,
    /// Bytes of all images.
    bytes: usize,
}

/// Rows, by table and by what identifies them in it.
type Content = BTreeMap<(String, String), String>;

impl Summary {
    /// Adds the next entry.
    pub fn add(&mut self, entry: &Entry) {
        let index = entry.index;
        if !entry.context.is_empty() {
            return self.others.push(format!("entry {index}: a change of the membership"));
        }
        if entry.data.is_empty() {
            return self
                .others
                .push(format!("entry {index}: without content, the first entry of epoch {}", entry.term));
        }
        if catalogue::is_change(&entry.data) {
            return self.others.push(format!("entry {index}: a database of the service is added or removed"));
        }
        let pages = match Pages::decode(&entry.data) {
            Ok(pages) => pages,
            Err(error) => return self.others.push(format!("entry {index}: {error}")),
        };
        let (database, id, page_size) = (pages.database, pages.transaction, pages.page_size);
        // Parts of other databases may stand between those of a transaction.
        let continues = |last: &&Transaction| last.database == database;
        let last = self.transactions.iter().rev().find(continues);
        if pages.part == 0 || last.is_none_or(|last| last.id != id) {
            let (pages, images) = Default::default();
            let (first, last, complete) = (index, index, false);
            self.transactions.push(Transaction { database, id, first, last, page_size, pages, images, complete });
        }
        if let Some(open) = self.transactions.iter_mut().rev().find(|last| last.database == database) {
            open.last = index;
            open.complete |= pages.commit.is_some();
            for (number, image) in pages.iter() {
                open.pages.insert(number);
                if database == CONSOLE_DATABASE {
                    self.bytes += image.len();
                }
                if database == CONSOLE_DATABASE && self.bytes <= MAX_IMAGES {
                    open.images.insert(number, image.to_vec());
                }
            }
        }
    }

    /// How many transactions there are, complete or not.
    pub fn transactions(&self) -> u64 {
        self.transactions.len() as u64
    }

    /// The text to put beside the file at `path`, which has `kept` entries, compared with the database file.
    pub fn render(&self, header: &Header, path: &Path, kept: u64, database: Option<&File>) -> String {
        let Header { cluster, node, first, last, epoch } = header;
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let mut text = format!(
            "Dropped tail of node {node} of cluster {cluster}: entries {first} to {last} of its raft log, the last one of \
             epoch {epoch}.\n\n\
             This node had them, but no majority did, and the next primary's entries took their place. No client was \
             told that these transactions are committed; a client that waited for one got an error (\"outcome unknown\"). \
             The database of the cluster does not contain them.\n\n\
             The complete page images are in {name} (its format: the head of src/storage/tail/mod.rs). Below, \
             \"+\" marks a row that a transaction's pages have, and \"-\" one that they no longer have, compared with the \
             transaction before it, or with this node's database file when this text was written. Where the cluster has \
             changed these pages since, its rows are marked \"-\", too.\n\n"
        );
        let dropped = last - first + 1;
        if kept < dropped {
            let left = dropped - kept;
            let _ = writeln!(
                text,
                "Only the first {kept} of {dropped} entries were kept. There was no room for the other {left}.\n"
            );
        }
        let differences = self.differences(database);
        for (transaction, rows) in self.transactions.iter().zip(differences).take(MAX_LINES) {
            let Transaction { database, id, first, last, page_size, pages, complete, .. } = transaction;
            let complete = if *complete { "" } else { ", incomplete (its last part is missing)" };
            let of = if *database == CONSOLE_DATABASE { String::new() } else { format!(" of database {database}") };
            let _ = writeln!(text, "transaction {id:016x}{of}, entries {first} to {last}{complete}");
            let _ = writeln!(text, "    pages {} ({} of {page_size} bytes)", ranges(pages), pages.len());
            rows.iter().take(MAX_LINES).for_each(|row| text.push_str(row));
            if rows.len() > MAX_LINES {
                let _ = writeln!(text, "    ... and {} more rows", rows.len() - MAX_LINES);
            }
        }
        for other in self.others.iter().take(MAX_LINES) {
            let _ = writeln!(text, "{other}");
        }
        let more = self.transactions.len().max(self.others.len()).saturating_sub(MAX_LINES);
        if more > 0 {
            let _ = writeln!(text, "... and {more} more");
        }
        text
    }
}

impl Summary {
    /// For each transaction, the rows in which its pages differ from what was there before.
    fn differences(&self, database: Option<&File>) -> Vec<Vec<String>> {
        let of_console = |transaction: &&Transaction| transaction.database == CONSOLE_DATABASE;
        let size = self.transactions.iter().find(of_console).map_or(0, |first| first.page_size as usize);
        let base = |number: u32| {
            let mut image = vec![0; size];
            let at = u64::from(number.checked_sub(1)?) * size as u64;
            database?.read_exact_at(&mut image, at).ok()?;
            Some(image)
        };
        let mut newest: HashMap<u32, &Vec<u8>> = HashMap::new();
        self.transactions.iter().for_each(|transaction| newest.extend(transaction.images.iter().map(|(n, i)| (*n, i))));
        let names = tables(&|number| newest.get(&number).map(|image| (*image).clone()).or_else(|| base(number)));
        let mut seen: HashMap<u32, &Vec<u8>> = HashMap::new();
        let mut all = Vec::new();
        for transaction in &self.transactions {
            // All its pages are compared together: a row that moves from one page to another has not changed.
            let (mut before, mut after) = (Content::new(), Content::new());
            for (number, image) in &transaction.images {
                let old = seen.get(number).map(|image| (*image).clone()).or_else(|| base(*number));
                let Some(name) = names.get(number) else { continue };
                let named = |(key, row)| ((name.clone(), key), row);
                before.extend(old.iter().flat_map(|old| rows(*number, old)).map(named));
                after.extend(rows(*number, image).into_iter().map(named));
            }
            let tell = |sign, from: &Content, to: &Content| {
                let odd = from.iter().filter(|(key, row)| to.get(*key) != Some(row));
                odd.map(|((table, id), row)| {
                    format!("    {sign} {table}: {id}{}{row}\n", if row.is_empty() { "" } else { ": " })
                })
                .collect::<Vec<_>>()
            };
            all.push([tell('-', &before, &after), tell('+', &after, &before)].concat());
            seen.extend(transaction.images.iter().map(|(number, image)| (*number, image)));
        }
        all
    }
}

/// Numbers as people write them, such as `2-4, 9`.
fn ranges(numbers: &BTreeSet<u32>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let run = |(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}
