//! Which pages of a snapshot the receiver has already. The receiver reads its own file and gives each page a tag, the
//! primary does the same, and only pages whose tags differ are sent. Owns the tags, the comparison, and how what is
//! sent and what is there become a chunk again.
//!
//! The content alone decides, and not what anybody remembers of it. So a copy that is damaged, has diverged or is of
//! unknown age serves as well as any other: its wrong pages have other tags. The bytes that were compared are the bytes
//! that are stored, so it does not matter what happens to the file afterwards.
//!
//! A tag is not the checksum of [`page_checksum`](super::super::checksum::page_checksum). That one finds accidents, but
//! whoever chooses the content of a page can make another one with the same CRC, and a member that missed the change
//! would keep the old page unseen. A tag is made with a key that is drawn for one transfer and that nobody else knows
//! (GMAC), so nobody can prepare two pages with the same tag. What is put together must have the right checksums as
//! well: those of the chunk and of the database are verified as in any snapshot.

use std::{fs::File, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::{CHUNK, Manifest};
use crate::storage::{
    checkpoint::Record,
    checksum::read_chunk,
    folder::{catalogue::Catalogue, places::Places},
    transaction::CONSOLE_DATABASE,
};

/// Bytes of a tag.
pub const TAG: usize = 8;
/// Bytes of a key.
pub const KEY: usize = 32;

/// Makes the tags of one transfer.
pub struct Tagger(LessSafeKey);

impl Tagger {
    /// Of the key that both sides use for this transfer, and for no other.
    pub fn new(key: &[u8; KEY]) -> Self {
        Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("the key is as long as AES-256 wants")))
    }

    /// The page's number is the nonce. Both sides use it, for pages that may differ. Whoever saw both tags could learn
    /// the key, but they go through TLS, and the key is of no use once the transfer is over.
    fn tag(&self, number: u32, image: &[u8]) -> [u8; TAG] {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&number.to_le_bytes());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let whole =
            self.0.seal_in_place_separate_tag(nonce, Aad::from(image), &mut []).expect("a page is short enough");
        *whole.as_ref().first_chunk().expect("it is longer")
    }

    /// The tags of the pages in `bytes`, the first of which has the number `done + 1`.
    pub fn tags(&self, done: u32, page_size: u32, bytes: &[u8]) -> Vec<u8> {
        let pages = bytes.chunks_exact(page_size as usize);
        (done + 1..).zip(pages).flat_map(|(number, image)| self.tag(number, image)).collect()
    }

    /// Leaves only those pages in `bytes` whose tags are not among `theirs`. Returns which pages these are: a bit for
    /// each, the lowest of the first byte for the first page. `None` if there are more or fewer tags than pages.
    pub fn keep_different(&self, done: u32, page_size: u32, theirs: &[u8], bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
        let ours = self.tags(done, page_size, bytes);
        if ours.len() != theirs.len() {
            return None;
        }
        let (page, mut kept) = (page_size as usize, 0);
        let mut map = vec![0; map_bytes((ours.len() / TAG) as u32)];
        for (at, (ours, theirs)) in ours.chunks_exact(TAG).zip(theirs.chunks_exact(TAG)).enumerate() {
            if ours != theirs {
                map[at / 8] |= 1 << (at % 8);
                bytes.copy_within(at * page..(at + 1) * page, kept);
                kept += page;
            }
        }
        bytes.truncate(kept);
        Some(map)
    }
}

/// The database files that a node has already, whatever is in them.
#[derive(Debug)]
pub struct Own {
    console: Arc<File>,
    places: Places,
    /// Where it has them. One that it does not know may have been left at its place of now.
    known: Catalogue,
    now: Catalogue,
}

impl Own {
    /// Those of a data folder, for a snapshot that this describes. `console` is the Console's file, which is open.
    pub fn new(data: &Path, console: Arc<File>, manifest: &Manifest) -> Self {
        let places = Places::of(data);
        let known = Catalogue::read(&places.catalogue()).unwrap_or_default();
        Self { console, places, known, now: manifest.service.catalogue.clone() }
    }

    /// The file of a database, if it can be read.
    pub fn file(&self, id: u32) -> Option<Arc<File>> {
        if id == CONSOLE_DATABASE {
            return Some(Arc::clone(&self.console));
        }
        let path = self.known.path(id).or_else(|| self.now.path(id))?;
        self.places.open(path).ok().map(Arc::new)
    }
}

/// Pages in the chunk after page `done`.
pub fn chunk_pages(record: &Record, done: u32) -> u32 {
    record.pages.saturating_sub(done).min(CHUNK as u32 / record.page_size)
}

/// Bytes that say which of so many pages differ.
pub fn map_bytes(pages: u32) -> usize {
    pages.div_ceil(8) as usize
}

/// Reads the chunk after page `done` from this node's own file. `None` if nothing of it is there. What cannot be read
/// counts as zeros: should the page consist of zeros, that is what it has to be.
pub fn read_own(file: &File, record: &Record, done: u32) -> Option<Vec<u8>> {
    let begin = u64::from(done) * u64::from(record.page_size);
    if done >= record.pages || file.metadata().ok()?.size() <= begin {
        return None;
    }
    let mut bytes = Vec::new();
    if read_chunk(file, record.page_size, record.pages, done, &mut bytes).is_err() {
        bytes.fill(0);
    }
    Some(bytes)
}

/// Makes a chunk of this node's own one, with the pages that differ in their places.
///
/// # Errors
/// A sentence, when they do not fit together.
pub fn patch(own: &mut [u8], page_size: u32, map: &[u8], pages: &[u8]) -> Result<(), String> {
    let page = page_size as usize;
    let count = own.len() / page;
    let differs = |at: usize| map.get(at / 8).is_some_and(|byte| byte & (1 << (at % 8)) != 0);
    let wanted: Vec<usize> = (0..8 * map.len()).filter(|at| differs(*at)).collect();
    if pages.len() != wanted.len() * page || wanted.last().is_some_and(|last| *last >= count) {
        let (named, sent) = (wanted.len(), pages.len());
        return Err(format!("{named} of {count} pages are said to differ, and {sent} bytes were sent"));
    }
    for (at, image) in wanted.into_iter().zip(pages.chunks_exact(page)) {
        own[at * page..(at + 1) * page].copy_from_slice(image);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const KEYS: [[u8; KEY]; 2] = [[1; KEY], [2; KEY]];

    #[test]
    fn a_tag_depends_on_key_number_and_content() {
        let tag = |key: usize, number, byte| Tagger::new(&KEYS[key]).tag(number, &[byte; 512]);
        assert_eq!(tag(0, 1, 7), tag(0, 1, 7));
        assert_ne!(tag(0, 1, 7), tag(1, 1, 7));
        assert_ne!(tag(0, 1, 7), tag(0, 2, 7));
        assert_ne!(tag(0, 1, 7), tag(0, 1, 8));
    }

    /// Two pages with the same checksum: this is how anybody who may write can have one that looks like another.
    #[test]
    fn pages_with_the_same_checksum_have_different_tags() {
        use crate::storage::checksum::page_checksum;
        // A CRC is linear: changes of 8 bytes at the end undo any change before them.
        let (old, mut new) = ([7; 512], [7; 512]);
        new[0] ^= 1;
        let wanted = page_checksum(1, &old);
        let base = page_checksum(1, &new);
        let mut rows: Vec<(u64, u64)> = (0..64)
            .map(|bit| {
                let mut other = new;
                other[504 + bit / 8] ^= 1 << (bit % 8);
                (page_checksum(1, &other) ^ base, 1 << bit)
            })
            .collect();
        let (mut difference, mut flips) = (wanted ^ base, 0);
        for bit in 0..64 {
            let Some(at) = rows.iter().position(|(effect, _)| effect & (1 << bit) != 0) else { continue };
            let (effect, which) = rows.swap_remove(at);
            for row in rows.iter_mut().filter(|row| row.0 & (1 << bit) != 0) {
                *row = (row.0 ^ effect, row.1 ^ which);
            }
            if difference & (1 << bit) != 0 {
                (difference, flips) = (difference ^ effect, flips ^ which);
            }
        }
        new[504..].iter_mut().zip(flips.to_le_bytes()).for_each(|(byte, flip)| *byte ^= flip);
        assert!(old != new && page_checksum(1, &new) == wanted, "they collide");
        let tagger = Tagger::new(&KEYS[0]);
        assert_ne!(tagger.tag(1, &old), tagger.tag(1, &new));
    }

    #[test]
    fn what_differs_and_what_is_there_make_the_chunk_again() {
        let tagger = Tagger::new(&KEYS[0]);
        let theirs: Vec<u8> = (0..11 * 512).map(|at| (at / 512) as u8).collect();
        for different in [vec![], vec![0], vec![10], vec![1, 2, 8, 9], (0..11).collect::<Vec<usize>>()] {
            let mut own = theirs.clone();
            different.iter().for_each(|at| own[at * 512 + 99] ^= 1);
            let mut sent = theirs.clone();
            let map = tagger.keep_different(5, 512, &tagger.tags(5, 512, &own), &mut sent).unwrap();
            assert_eq!((map.len(), sent.len()), (map_bytes(11), different.len() * 512));
            patch(&mut own, 512, &map, &sent).unwrap();
            assert!(own == theirs);
        }
        let few = tagger.tags(5, 512, &theirs[512..]);
        assert_eq!(tagger.keep_different(5, 512, &few, &mut theirs.clone()), None);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let mut own = vec![0; 11 * 512];
        for (map, bytes) in [([1, 0], 0), ([1, 0], 511), ([0, 0], 512), ([0, 8], 512), ([255, 255], 16 * 512)] {
            assert!(patch(&mut own, 512, &map, &vec![1; bytes]).is_err(), "{map:?} and {bytes} bytes");
        }
        assert!(own.iter().all(|byte| *byte == 0));
        patch(&mut own, 512, &[0, 4], &[1; 512]).unwrap();
    }

    #[test]
    fn an_own_file_is_read_as_far_as_it_goes() {
        let file = tempfile::tempfile().unwrap();
        let pages = CHUNK as u32 / 512;
        let record = Record { index: 9, page_size: 512, pages: 2 * pages + 3, checksum: 0 };
        assert!(read_own(&file, &record, 0).is_none());
        file.write_all_at(&[7; 700], 0).unwrap();
        let first = read_own(&file, &record, 0).unwrap();
        assert!(first.len() == CHUNK && first[..700].iter().all(|byte| *byte == 7) && first[700] == 0);
        assert!(read_own(&file, &record, pages).is_none());
        file.set_len(10 << 20).unwrap();
        assert_eq!(read_own(&file, &record, 2 * pages).unwrap().len(), 3 * 512);
        assert!(read_own(&file, &record, record.pages).is_none());
        assert_eq!([0, pages, 2 * pages, record.pages].map(|done| chunk_pages(&record, done)), [pages, pages, 3, 0]);
    }
}
