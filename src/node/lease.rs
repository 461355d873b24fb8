//! The lease as the rest of the process sees it: one deadline on CLOCK_BOOTTIME, readable at any time from any thread
//! and, through a memory file, from the port guard process. Must never be extended by anything but the consensus loop.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    sys::memfd::{MFdFlags, memfd_create},
    time::{ClockId, clock_gettime},
};

use crate::little_endian::u64_at;

/// Nanoseconds on CLOCK_BOOTTIME. This clock goes on while the host is suspended, never jumps, and is the same for all
/// processes of a host.
pub fn boottime() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// A shared lease: a deadline, or 0 for none.
#[derive(Clone, Debug)]
pub struct Lease {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    deadline: AtomicU64,
    memory: File,
}

impl Lease {
    /// A lease that has not begun.
    ///
    /// # Errors
    /// When the kernel refuses an anonymous memory file.
    pub fn new() -> std::io::Result<Self> {
        let memory = File::from(memfd_create(c"twistlock-lease", MFdFlags::MFD_CLOEXEC)?);
        memory.write_all_at(&[0; 16], 0)?;
        Ok(Self { inner: Arc::new(Inner { deadline: AtomicU64::new(0), memory }) })
    }

    /// True while the ports may be open and responses may leave.
    pub fn is_valid(&self) -> bool {
        boottime() < self.deadline()
    }

    /// The deadline in nanoseconds of [`boottime`]; 0 if there is no lease.
    pub fn deadline(&self) -> u64 {
        self.inner.deadline.load(Ordering::Acquire)
    }

    /// Sets the deadline; 0 revokes the lease. Only the consensus loop calls this, and tests that stand in for it.
    ///
    /// # Errors
    /// When the memory file cannot be written: the port guard still goes by the deadline before. This process goes by
    /// the new one in any case.
    pub fn set(&self, deadline: u64) -> std::io::Result<()> {
        self.inner.deadline.store(deadline, Ordering::Release);
        self.inner.memory.write_all_at(&encode(deadline), 0)
    }

    /// The memory file that the port guard reads: see [`read_shared`].
    pub fn shared(&self) -> impl AsFd + '_ {
        &self.inner.memory
    }
}

fn encode(deadline: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&deadline.to_le_bytes());
    bytes[8..].copy_from_slice(&(!deadline).to_le_bytes());
    bytes
}

/// Reads the deadline in another process; 0 if there is no lease. If the two halves do not match, a write was under
/// way: it is read again, 16 times at most, and then counts as no lease.
///
/// # Errors
/// When the memory file cannot be read.
pub fn read_shared(memory: &File) -> std::io::Result<u64> {
    let mut bytes = [0; 16];
    for _ in 0..16 {
        memory.read_exact_at(&mut bytes, 0)?;
        let deadline = u64_at(&bytes, 0);
        if bytes == encode(deadline) {
            return Ok(deadline);
        }
    }
    Ok(0)
}
