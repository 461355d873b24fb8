//! What people read about a dropped tail: its transactions and the pages they touch. Must never claim more than the page
//! images show: they are whole pages, with the rows beside the changed ones.

use std::{collections::BTreeSet, fmt::Write, path::Path};

use raft::eraftpb::Entry;

use super::tail::Header;
use crate::cluster::command::Pages;

/// Lines about single entries and transactions; more are only counted.
const MAX_LINES: usize = 1000;

#[derive(Debug)]
struct Transaction {
    id: u64,
    first: u64,
    last: u64,
    page_size: u32,
    pages: BTreeSet<u32>,
    complete: bool,
}

/// Collects the summary while the entries come by.
#[derive(Debug, Default)]
pub(super) struct Summary {
    transactions: Vec<Transaction>,
    /// Entries that are not part of a transaction.
    others: Vec<String>,
}

impl Summary {
    /// Takes in the next entry.
    pub fn add(&mut self, entry: &Entry) {
        let index = entry.index;
        if !entry.context.is_empty() {
            return self.others.push(format!("entry {index}: a change of the membership"));
        }
        if entry.data.is_empty() {
            return self.others.push(format!("entry {index}: without content, the first one of epoch {}", entry.term));
        }
        let pages = match Pages::decode(&entry.data) {
            Ok(pages) => pages,
            Err(error) => return self.others.push(format!("entry {index}: {error}")),
        };
        if pages.part == 0 || self.transactions.last().is_none_or(|last| last.id != pages.transaction) {
            let (id, page_size) = (pages.transaction, pages.page_size);
            let pages = BTreeSet::new();
            self.transactions.push(Transaction { id, first: index, last: index, page_size, pages, complete: false });
        }
        if let Some(open) = self.transactions.last_mut() {
            open.last = index;
            open.complete |= pages.commit.is_some();
            open.pages.extend(pages.iter().map(|(number, _)| number));
        }
    }

    /// How many transactions there are, whole or not.
    pub fn transactions(&self) -> u64 {
        self.transactions.len() as u64
    }

    /// The text beside the file at `path`, which has `kept` entries.
    pub fn render(&self, header: &Header, path: &Path, kept: u64) -> String {
        let Header { cluster, node, first, last, epoch } = header;
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let mut text = format!(
            "Dropped tail of node {node} of cluster {cluster}: entries {first} to {last} of its raft log, the last one of \
             epoch {epoch}.\n\n\
             This node had them, but no majority did, and the next primary's entries took their place. No client was \
             told that these transactions are committed; a client that waited for one got an error (\"outcome unknown\"). \
             The database of the cluster does not contain them.\n\n\
             The complete page images are in {name} (its format: the head of src/storage/tail.rs). This \
             text lists the pages of each transaction; it does not say which rows in them changed.\n\n"
        );
        let dropped = last - first + 1;
        if kept < dropped {
            let left = dropped - kept;
            let _ = writeln!(text, "Only the first {kept} of {dropped} entries were kept: {left} were too much.\n");
        }
        for transaction in self.transactions.iter().take(MAX_LINES) {
            let Transaction { id, first, last, page_size, pages, complete } = transaction;
            let complete = if *complete { "" } else { ", incomplete (its last part is missing)" };
            let _ = writeln!(text, "transaction {id:016x}, entries {first} to {last}{complete}");
            let _ = writeln!(text, "    {} pages of {page_size} bytes: pages {}", pages.len(), ranges(pages));
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

/// Numbers as people write them: 2-4, 9.
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
