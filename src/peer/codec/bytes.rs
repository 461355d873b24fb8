//! Bytes of one frame: put together and taken apart. Must never read beyond what has arrived, nor know what the bytes
//! mean.

use super::{
    CodecError::{self, Malformed, TooLarge},
    LENGTH, MAX_FRAME,
};

/// Builds one frame; the length is filled in at the end.
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn new(kind: u8, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(LENGTH + 1 + capacity);
        bytes.extend_from_slice(&[0, 0, 0, 0, kind]);
        Self(bytes)
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, value: &[u8], limit: usize, what: &'static str) -> Result<(), CodecError> {
        if value.len() > limit {
            return Err(TooLarge(what));
        }
        self.u32(value.len() as u32);
        self.0.extend_from_slice(value);
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Vec<u8>, CodecError> {
        let length = self.0.len() - LENGTH;
        if length > MAX_FRAME {
            return Err(TooLarge("frame"));
        }
        self.0[..LENGTH].copy_from_slice(&(length as u32).to_le_bytes());
        Ok(self.0)
    }
}

/// Takes a body apart. Every read is checked against what is left.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], CodecError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed("frame too short"))?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed("frame too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    /// What came with a later version, if it is there.
    pub(super) fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, CodecError>,
    ) -> Result<Option<T>, CodecError> {
        if self.0.is_empty() { Ok(None) } else { read(self).map(Some) }
    }

    pub(super) fn u8(&mut self) -> Result<u8, CodecError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, CodecError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn u128(&mut self) -> Result<u128, CodecError> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    pub(super) fn bool(&mut self) -> Result<bool, CodecError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("neither true nor false")),
        }
    }

    /// A number of items that follow, `size` bytes each at least: never more than the rest can hold.
    pub(super) fn count(&mut self, limit: usize, size: usize) -> Result<usize, CodecError> {
        let count = self.u32()? as usize;
        if count > limit || count > self.0.len() / size {
            return Err(Malformed("impossible count"));
        }
        Ok(count)
    }

    pub(super) fn bytes(&mut self, limit: usize) -> Result<&'a [u8], CodecError> {
        let length = self.u32()? as usize;
        if length > limit {
            return Err(Malformed("byte string too long"));
        }
        self.take(length)
    }

    pub(super) fn text(&mut self, limit: usize) -> Result<String, CodecError> {
        let text = std::str::from_utf8(self.bytes(limit)?).map_err(|_| Malformed("text is not UTF-8"))?;
        Ok(text.to_owned())
    }
}
