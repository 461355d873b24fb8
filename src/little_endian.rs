//! Numbers in bytes, in the order in which all our formats have them. Must never know what they mean.

/// The number at a place that the caller has made sure of.
///
/// # Panics
/// Behind the end.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    find_u32(bytes, at).expect("four bytes")
}

/// The number at a place that the caller has made sure of.
///
/// # Panics
/// Behind the end.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    find_u64(bytes, at).expect("eight bytes")
}

/// The number at this place; none if the bytes end before.
pub fn find_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

/// The number at this place; none if the bytes end before.
pub fn find_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}
