//! A call of the kernel that no crate wraps. Must never do more than that.

use std::{fs::File, io, os::fd::AsRawFd};

use nix::{errno::Errno, libc};

/// Has the disk write what is dirty in a part of a file, and waits until it has done so. That is not durable: a disk
/// may keep it in its cache, and the file's size may be missing. Does nothing where the file system cannot do this.
///
/// # Errors
/// When it could not be written. The file's next sync does not report that again.
pub(in crate::storage) fn write_back(file: &File, from: u64, bytes: u64) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: an open descriptor and three numbers.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), from as i64, bytes as i64, flags) };
    match Errno::result(result) {
        Err(Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(()),
        result => Ok(result.map(|_| ())?),
    }
}
