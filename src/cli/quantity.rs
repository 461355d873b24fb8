//! Sizes, dates and spans as people read them. Pure.

use jiff::Timestamp;

pub(super) use crate::node::verdict::duration;

/// Bytes in the unit that reads best.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A date from seconds since 1970.
pub(super) fn date(seconds: u64) -> String {
    let known = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    known.map_or_else(|| format!("second {seconds}"), |time| time.strftime("%Y-%m-%d %H:%M UTC").to_string())
}

/// A time to the second, from milliseconds since 1970.
pub(super) fn moment(ms: u64) -> String {
    let known = i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    known.map_or_else(|| format!("millisecond {ms}"), |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

/// A clock's difference from the primary's.
pub(super) fn clock(ahead_ms: i64) -> String {
    match ahead_ms {
        0 => "exact".to_owned(),
        1.. => format!("{} ahead", duration(ahead_ms.unsigned_abs())),
        _ => format!("{} behind", duration(ahead_ms.unsigned_abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_clocks_read_well() {
        let texts = [0, 1_023, 1_024, 1_572_864, u64::MAX].map(size);
        assert_eq!(texts, ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "16777216.0 TiB"]);
        assert_eq!([0, 5, -2_000].map(clock), ["exact", "5 ms ahead", "2 s behind"]);
        assert_eq!(date(1_793_383_200), "2026-10-30 18:00 UTC");
        assert!(date(u64::MAX).starts_with("second"));
        assert_eq!(moment(1_793_383_207_999), "2026-10-30 18:00:07");
    }
}
