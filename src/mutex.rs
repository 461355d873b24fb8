//! How a mutex is taken here: one that is poisoned as any other. A panic ends the process, so that nobody sees what it
//! left.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes it, and waits for it as long as it takes.
pub fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
