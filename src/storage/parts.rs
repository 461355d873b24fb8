//! The pages of one transaction on their way into the raft log: cut into parts, each with its checksums. Both gates use
//! it, so that the same pages are the same entries, whichever way they came. Pure.

use super::{
    checksum::{PageTable, Preview, page_checksum},
    transaction::{Commit, PagesBuilder},
};

/// A transaction that is being encoded. Push its pages in ascending order.
pub(super) struct Parts {
    database: u32,
    transaction: u64,
    page_size: u32,
    part: u32,
    builder: PagesBuilder,
    checksums: Vec<(u32, u64)>,
}

impl Parts {
    /// A transaction without pages. `expected` is how many there will be, if that is known.
    pub fn new(database: u32, transaction: u64, page_size: u32, expected: usize) -> Self {
        let builder = PagesBuilder::new(database, transaction, 0, page_size);
        Self { database, transaction, page_size, part: 0, builder, checksums: Vec::with_capacity(expected) }
    }

    /// Pages so far.
    pub fn count(&self) -> usize {
        self.checksums.len()
    }

    /// Adds a page. Returns a part that is full without it, to be proposed at once.
    pub fn push(&mut self, number: u32, image: &[u8]) -> Option<Vec<u8>> {
        self.push_summed(number, page_checksum(number, image), image)
    }

    /// As [`Self::push`], of a page whose checksum is known.
    pub fn push_summed(&mut self, number: u32, checksum: u64, image: &[u8]) -> Option<Vec<u8>> {
        let full = self.builder.is_full().then(|| {
            self.part += 1;
            let next = PagesBuilder::new(self.database, self.transaction, self.part, self.page_size);
            std::mem::replace(&mut self.builder, next).finish(None)
        });
        self.checksums.push((number, checksum));
        self.builder.push(number, image);
        full
    }

    /// What the transaction makes of a database whose pages have these checksums, and which has `pages` pages then.
    /// There is one preview of each transaction.
    pub fn preview(&mut self, table: &PageTable, pages: u32) -> Preview {
        table.preview(pages, std::mem::take(&mut self.checksums))
    }

    /// The last part.
    pub fn finish(self, preview: &Preview) -> Vec<u8> {
        self.builder.finish(Some(Commit { database_pages: preview.pages, checksum: preview.checksum }))
    }
}
