//! JSON in the data folder that shows when it is damaged: an object with one more member, the checksum of all others.
//! An older program ignores that member. Its own files have no checksum, and are accepted without one. Must never hide
//! that a file has a newer format.

use std::io;

use serde_json::Value;

/// Name of the member with the checksum: the CRC-32C of the others as compact JSON, sorted by name.
const CHECKSUM: &str = "crc32c";

/// The object with its checksum, in lines that people can read.
///
/// # Errors
/// When the object cannot be written as JSON.
pub(super) fn encode(mut object: Value) -> io::Result<Vec<u8>> {
    let sum = checksum(&object)?;
    if let Some(members) = object.as_object_mut() {
        members.insert(CHECKSUM.to_owned(), sum.into());
    }
    Ok(serde_json::to_vec_pretty(&object)?)
}

/// The inverse of [`encode`], without the checksum.
///
/// # Errors
/// A sentence that says what is wrong: the bytes are no JSON object, or its checksum is wrong.
pub(super) fn decode(bytes: &[u8]) -> Result<Value, String> {
    let mut object: Value = serde_json::from_slice(bytes).map_err(|error| format!("it is not JSON ({error})"))?;
    let members = object.as_object_mut().ok_or("it is not a JSON object")?;
    let stated = members.remove(CHECKSUM);
    let computed = checksum(&object).map_err(|error| error.to_string())?;
    match stated {
        Some(stated) if stated.as_u64() != Some(computed.into()) => Err("its checksum is wrong".to_owned()),
        _ => Ok(object),
    }
}

/// True if the object in these bytes has a checksum.
pub(super) fn has_checksum(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Value>(bytes).is_ok_and(|object| object.get(CHECKSUM).is_some())
}

fn checksum(object: &Value) -> io::Result<u32> {
    Ok(crc32c::crc32c(&serde_json::to_vec(object)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_flipped_bit_is_seen_or_changes_nothing() {
        let object = json!({"format": 1, "name": "node1", "list": [1, 2, {"a": "b"}]});
        let bytes = encode(object.clone()).unwrap();
        assert_eq!(decode(&bytes).unwrap(), object);
        let mut taken = 0;
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // The checksum under another name is one more member, which nobody reads.
            if let Ok(mut read) = decode(&damaged) {
                read.as_object_mut().unwrap().retain(|name, _| object.get(name).is_some());
                assert_eq!(read, object, "bit {bit}");
                taken += 1;
            }
        }
        assert!(taken < bytes.len(), "{taken} taken");
    }

    #[test]
    fn a_file_without_a_checksum_is_taken() {
        assert_eq!(decode(b"{\"a\": 1}").unwrap(), json!({"a": 1}));
        assert!(decode(b"[1]").is_err() && decode(b"{").is_err() && decode(b"").is_err());
    }
}
