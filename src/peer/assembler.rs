//! From pieces of a stream to frames. Must never hold more than one incomplete frame and the last piece.

use super::codec::{CodecError, Frame, LENGTH, frame_length};

/// Puts frames together from the pieces in which they arrive. Holds one incomplete frame and the last piece at most.
#[derive(Default)]
pub struct Assembler {
    buffer: Vec<u8>,
    start: usize,
}

/// Capacity that an idle [`Assembler`] keeps, in bytes.
const IDLE_CAPACITY: usize = 64 << 10;

impl Assembler {
    /// Takes the next piece. Call [`Assembler::next_frame`] until it has nothing more before the next piece.
    pub fn push(&mut self, piece: &[u8]) {
        self.buffer.extend_from_slice(piece);
    }

    /// The next complete frame.
    ///
    /// # Errors
    /// [`CodecError::Version`] for a hello in another protocol version, [`CodecError::Malformed`] for anything else
    /// that is not a frame. The stream cannot be used any more then.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, CodecError> {
        let rest = &self.buffer[self.start..];
        if let Some((header, body)) = rest.split_first_chunk() {
            let length = frame_length(*header)?;
            if let Some(body) = body.get(..length) {
                let frame = Frame::decode(body)?;
                self.start += LENGTH + length;
                return Ok(Some(frame));
            }
        }
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.is_empty() {
            self.buffer.shrink_to(IDLE_CAPACITY);
        }
        Ok(None)
    }
}
