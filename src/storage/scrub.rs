//! Reads a database file for a scrub: from the disk and not from memory, and only to compare. Must never write.

use std::{fs::File, io};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::checksum::{page_checksum, read_pages};

/// Has `read` read `count` pages after page `done` from the disk and not from the cache. What has not been written to
/// the disk yet stays in the cache.
///
/// Nothing is read ahead: the next call would drop it, and read it a second time. Disks with a long read-ahead would
/// read many times what is wanted, and keep the raft log waiting meanwhile.
pub fn from_disk<T>(file: &File, page_size: u32, done: u32, count: u32, read: impl FnOnce() -> T) -> T {
    let (at, length) = (i64::from(done) * i64::from(page_size), i64::from(count) * i64::from(page_size));
    // A file system that does not support this reads from memory: a scrub finds less then, but nothing goes wrong.
    let advise = |from, length, advice| {
        let _ = posix_fadvise(file, from, length, advice);
    };
    advise(at, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    advise(0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    let found = read();
    advise(0, 0, PosixFadviseAdvice::POSIX_FADV_NORMAL);
    found
}

/// The checksums of `count` pages after page `done`.
///
/// # Errors
/// When the file cannot be read.
pub fn page_checksums(file: &File, page_size: u32, done: u32, count: u32) -> io::Result<Vec<u64>> {
    let mut bytes = Vec::new();
    read_pages(file, page_size, done, count, &mut bytes)?;
    let pages = bytes.chunks_exact(page_size as usize);
    Ok((done + 1..).zip(pages).map(|(number, image)| page_checksum(number, image)).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn one_flipped_bit_changes_the_checksum_of_its_page_alone() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5 * 512], 0).unwrap();
        let before = page_checksums(&file, 512, 1, 4).unwrap();
        assert_eq!(before.len(), 4);
        file.write_all_at(&[6], 2 * 512 + 9).unwrap();
        let after = from_disk(&file, 512, 1, 4, || page_checksums(&file, 512, 1, 4)).unwrap();
        let differ: Vec<_> = before.iter().zip(&after).map(|(a, b)| a != b).collect();
        assert_eq!(differ, [false, true, false, false]);
    }
}
