//! The frames of a WebSocket (RFC 6455) as a Defender sends them, piece by piece: no message in parts, no extension.
//! Must never ask for bytes that are not of the frame that comes, nor keep memory for one that was taken away.

use std::{io::Cursor, mem};

use tokio_tungstenite::tungstenite::protocol::frame::{
    FrameHeader,
    coding::{Control, Data, OpCode},
};

/// The longest head of a frame.
const HEAD: usize = 14;
/// The shortest one: two bytes and a mask.
const SHORTEST: usize = 6;
/// The longest frame that is no message.
const CONTROL: usize = 125;

/// A whole frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Text(String),
    /// A message that is no text, and its length.
    Binary(usize),
    Ping(Vec<u8>),
    Pong,
    Close,
}

/// What has become of the frame that comes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    /// The head of a message is there: so many bytes follow.
    Message(usize),
    Frame(Frame),
}

/// The frame that comes.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    head: [u8; HEAD],
    filled: usize,
    body: Option<Body>,
}

#[derive(Debug)]
struct Body {
    kind: OpCode,
    mask: [u8; 4],
    length: usize,
    /// Made when the first byte is asked for.
    bytes: Vec<u8>,
    filled: usize,
}

impl Incoming {
    /// True if the rest of a message is to come.
    pub(super) fn is_message(&self) -> bool {
        self.body.as_ref().is_some_and(|body| matches!(body.kind, OpCode::Data(_)))
    }

    /// Where the next bytes go.
    pub(super) fn space(&mut self) -> &mut [u8] {
        match &mut self.body {
            Some(body) => {
                body.bytes.resize(body.length, 0);
                &mut body.bytes[body.filled..]
            }
            None => {
                let whole = match self.head[1] & 0x7f {
                    _ if self.filled < 2 => SHORTEST,
                    126 => SHORTEST + 2,
                    127 => HEAD,
                    _ => SHORTEST,
                };
                &mut self.head[self.filled..whole]
            }
        }
    }

    /// So many bytes are there: at most those that were asked for. No message may have more than `most`.
    ///
    /// # Errors
    /// Why no Defender sends that.
    pub(super) fn fill(&mut self, count: usize, most: usize) -> Result<Progress, String> {
        if let Some(body) = &mut self.body {
            body.filled += count;
            return if body.filled < body.length { Ok(Progress::More) } else { self.finish() };
        }
        self.filled += count;
        let head =
            FrameHeader::parse(&mut Cursor::new(&self.head[..self.filled])).map_err(|error| error.to_string())?;
        let Some((FrameHeader { is_final, rsv1, rsv2, rsv3, opcode, mask }, length)) = head else {
            return Ok(Progress::More);
        };
        let Some(mask) = mask.filter(|_| is_final && !(rsv1 || rsv2 || rsv3)) else {
            return Err("a frame has no mask, or is a part of something".to_owned());
        };
        let message = match opcode {
            OpCode::Data(Data::Text | Data::Binary) => true,
            OpCode::Control(Control::Ping | Control::Pong | Control::Close) => false,
            _ => return Err("a frame is of a kind that no Defender sends".to_owned()),
        };
        let most = if message { most } else { CONTROL };
        let length = usize::try_from(length).ok().filter(|length| *length <= most);
        let length = length.ok_or_else(|| format!("a frame has more than {most} bytes"))?;
        self.filled = 0;
        self.body = Some(Body { kind: opcode, mask, length, bytes: Vec::new(), filled: 0 });
        match (message, length) {
            (true, 1..) => Ok(Progress::Message(length)),
            (false, 1..) => Ok(Progress::More),
            (_, 0) => self.finish(),
        }
    }

    fn finish(&mut self) -> Result<Progress, String> {
        let Some(Body { kind, mask, mut bytes, length, .. }) = mem::take(&mut self.body) else {
            return Ok(Progress::More);
        };
        bytes.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        Ok(Progress::Frame(match kind {
            OpCode::Data(Data::Text) => Frame::Text(String::from_utf8(bytes).map_err(|error| error.to_string())?),
            OpCode::Control(Control::Ping) => Frame::Ping(bytes),
            OpCode::Control(Control::Pong) => Frame::Pong,
            OpCode::Control(_) => Frame::Close,
            OpCode::Data(_) => Frame::Binary(length),
        }))
    }
}

/// The head of a frame for a Defender, behind what is there already.
pub(super) fn begin(kind: OpCode, length: usize, out: &mut Vec<u8>) {
    let header = FrameHeader { is_final: true, opcode: kind, mask: None, ..FrameHeader::default() };
    // Nothing can fail that is written into memory.
    let _ = header.format(length as u64, out);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: usize = 70_000;

    /// A frame as a client sends it.
    fn sent(kind: OpCode, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 250];
        let header = FrameHeader { is_final: true, opcode: kind, mask: Some(mask), ..FrameHeader::default() };
        let mut out = Vec::new();
        header.format(payload.len() as u64, &mut out).unwrap();
        out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        out
    }

    /// Gives it these bytes, so many at once, and returns all frames.
    fn taken(mut bytes: &[u8], at_once: usize) -> Result<Vec<Frame>, String> {
        let (mut incoming, mut frames) = (Incoming::default(), Vec::new());
        while !bytes.is_empty() {
            let space = incoming.space();
            let count = space.len().min(at_once).min(bytes.len());
            assert!(count > 0, "it asks for nothing");
            space[..count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if let Progress::Frame(frame) = incoming.fill(count, MOST)? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_are_found_however_they_come() {
        let (text, ping) = (OpCode::Data(Data::Text), OpCode::Control(Control::Ping));
        let (short, long, longest) = ("a".repeat(125), "ä".repeat(500), "c".repeat(MOST));
        let all = [
            sent(text, short.as_bytes()),
            sent(ping, b"beat"),
            sent(text, long.as_bytes()),
            sent(ping, b""),
            sent(text, b""),
            sent(text, longest.as_bytes()),
            sent(OpCode::Data(Data::Binary), b"later"),
            sent(OpCode::Control(Control::Pong), b""),
            sent(OpCode::Control(Control::Close), b"\x03\xe8"),
        ];
        let expected = || {
            let ping = |text: &str| Frame::Ping(text.into());
            let text = |text: &str| Frame::Text(text.to_owned());
            let first = [text(&short), ping("beat"), text(&long), ping(""), text(""), text(&longest)];
            first.into_iter().chain([Frame::Binary(5), Frame::Pong, Frame::Close]).collect::<Vec<_>>()
        };
        for at_once in [1, 2, 5, 1000, usize::MAX] {
            assert_eq!(taken(&all.concat(), at_once).unwrap(), expected(), "{at_once}");
        }
    }

    #[test]
    fn what_no_defender_sends_is_refused() {
        let text = OpCode::Data(Data::Text);
        let whole = sent(text, b"abc");
        let changed = |place: usize, bits: u8| {
            let mut bytes = whole.clone();
            bytes[place] ^= bits;
            bytes
        };
        for (bad, why) in [
            (changed(0, 0x80), "a part of something"),
            (changed(0, 0x40), "a part of something"),
            (changed(0, 0x01), "a kind that no Defender sends"),
            (changed(1, 0x80), "no mask"),
            (sent(text, &vec![b'a'; MOST + 1]), "more than 70000 bytes"),
            (sent(OpCode::Control(Control::Ping), &[b'a'; CONTROL + 1]), "more than 125 bytes"),
            (sent(text, b"\xff"), "utf-8"),
        ] {
            let error = taken(&bad, usize::MAX).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), at_once in 1_usize..20) {
            let _ = taken(&bytes, at_once);
        }
    }
}
