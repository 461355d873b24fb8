//! The time of day, for what people read and other hosts compare. Must never measure how long something takes: it
//! jumps.

use std::time::{Duration, SystemTime};

/// Since 1970. A clock that stands before that counts as 1970.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Whole seconds since 1970.
pub fn unix_time() -> u64 {
    since_1970().as_secs()
}

/// Milliseconds since 1970.
pub fn unix_time_ms() -> u64 {
    since_1970().as_millis() as u64
}
