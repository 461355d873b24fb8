//! A datagram between two members: its bytes, its key and its number. Pure; has the one writer ([`Sealer`]) and the one
//! reader ([`Opener`]). Must never take a datagram twice, nor one that was not sealed by the other end of the link that
//! it belongs to.
//!
//! A session belongs to one link and has its direction: who dialled seals, who was dialled opens. Name and key of the
//! session are exported from the link's TLS connection, so nobody else has them, and none is used for two links.
//!
//! Layout, integers little-endian: `session u64, number u64`, and sealed with AES-256-GCM (the number is the nonce,
//! what is before it is authenticated with it): `heard session u64, heard number u64, gaps u8, frame u32, piece u8,
//! pieces u8`, bytes of the frame without its length field; then the tag of 16 bytes. A number is used once. A frame
//! that is too long for one datagram goes in pieces. The label of the key has the version of all this.

use std::collections::VecDeque;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey};
use rustls::Connection;

use crate::little_endian::{find_u64, u32_at, u64_at};

/// Largest datagram, in bytes: it passes every network that carries IPv6, and is not cut up on its way.
pub(super) const LARGEST: usize = 1200;
const LABEL: &[u8] = b"EXPORTER-twistlock-ha-datagrams-1";
const HEAD: usize = 8 + 8;
const NOTES: usize = 8 + 8 + 1 + 4 + 1 + 1;
/// Bytes of a frame in one datagram.
const PIECE: usize = LARGEST - HEAD - NOTES - MAX_TAG_LEN;
/// Pieces of a frame at most.
const PIECES: usize = 16;
/// Frames that are put together at one time; the oldest is given up first.
const FRAMES: usize = 16;
/// Numbers that are looked at for [`Heard::gaps`], behind those that may just be out of order.
const COUNTED: u64 = 64;
const OUT_OF_ORDER: u64 = 4;

/// What both ends of a link know, and nobody else.
#[derive(Clone)]
pub(super) struct Secret {
    session: u64,
    key: [u8; 32],
}

impl Secret {
    /// Exports it from a TLS connection; none if TLS has none to give.
    pub fn of(tls: &Connection) -> Option<Self> {
        let bytes = tls.export_keying_material([0; 40], LABEL, None).ok()?;
        let (session, key) = bytes.split_first_chunk()?;
        Some(Self { session: u64::from_le_bytes(*session), key: key.try_into().ok()? })
    }

    fn key(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &self.key).expect("the key is as long as AES-256 wants"))
    }
}

/// What one end has heard of the other in the other direction: goes with each datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// The session of the other direction, 0 for none, and its highest number.
    pub session: u64,
    pub number: u64,
    /// How many of the last numbers before it did not come.
    pub gaps: u8,
}

/// Why bytes are not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// Too short, or of no session that is known.
    Unknown,
    /// Not sealed with the key of its session.
    Forged,
    /// Its number was there before, or is too old to tell.
    Repeated,
    /// Sealed by the other end, and not what this program understands.
    Malformed,
}

/// The session that a datagram names.
pub(super) fn session_of(datagram: &[u8]) -> Option<u64> {
    find_u64(datagram, 0)
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Makes the datagrams of a session.
pub(super) struct Sealer {
    secret: Secret,
    key: LessSafeKey,
    number: u64,
    frame: u32,
}

impl Sealer {
    pub fn new(secret: Secret) -> Self {
        Self { key: secret.key(), secret, number: 0, frame: 0 }
    }

    pub fn session(&self) -> u64 {
        self.secret.session
    }

    /// The number of the last datagram.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// True if a frame of this length can go by datagrams.
    pub fn fits(length: usize) -> bool {
        length <= PIECE * PIECES
    }

    /// Gives `send` the datagrams of a frame, each `copies` times; none if the frame is too long.
    pub fn seal(&mut self, heard: Heard, frame: &[u8], copies: usize, mut send: impl FnMut(&[u8])) {
        if !Self::fits(frame.len()) {
            return;
        }
        self.frame = self.frame.wrapping_add(1);
        let pieces = frame.len().div_ceil(PIECE) as u8;
        let mut datagram = Vec::with_capacity(LARGEST);
        for _ in 0..copies {
            for (piece, bytes) in frame.chunks(PIECE).enumerate() {
                self.number += 1;
                datagram.clear();
                for number in [self.secret.session, self.number, heard.session, heard.number] {
                    datagram.extend_from_slice(&number.to_le_bytes());
                }
                datagram.push(heard.gaps);
                datagram.extend_from_slice(&self.frame.to_le_bytes());
                datagram.extend_from_slice(&[piece as u8, pieces]);
                datagram.extend_from_slice(bytes);
                let (head, rest) = datagram.split_at_mut(HEAD);
                let tag = self.key.seal_in_place_separate_tag(nonce(self.number), Aad::from(head), rest);
                datagram.extend_from_slice(tag.expect("far shorter than the cipher's limit").as_ref());
                send(&datagram);
            }
        }
    }
}

/// What is in a datagram.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opened {
    /// What the other end has heard of this one.
    pub heard: Heard,
    /// A datagram with a higher number came before it.
    pub overtaken: bool,
    /// A frame without its length field, if one is whole now.
    pub frame: Option<Vec<u8>>,
}

/// Takes the datagrams of a session.
pub(super) struct Opener {
    secret: Secret,
    key: LessSafeKey,
    window: Window,
    assembler: Assembler,
}

impl Opener {
    pub fn new(secret: Secret) -> Self {
        Self { key: secret.key(), secret, window: Window::default(), assembler: Assembler::default() }
    }

    pub fn session(&self) -> u64 {
        self.secret.session
    }

    /// What the other end is to be told of its datagrams.
    pub fn heard(&self) -> Heard {
        Heard { session: self.session(), number: self.window.newest, gaps: self.window.gaps() }
    }

    /// Takes a datagram apart.
    ///
    /// # Errors
    /// A [`Flaw`] that says why the datagram is of no use. It is dropped.
    pub fn open(&mut self, datagram: &mut [u8]) -> Result<Opened, Flaw> {
        let (head, rest) = datagram.split_at_mut_checked(HEAD).ok_or(Flaw::Unknown)?;
        if session_of(head) != Some(self.session()) {
            return Err(Flaw::Unknown);
        }
        let number = u64_at(head, 8);
        if !self.window.admits(number) {
            return Err(Flaw::Repeated);
        }
        let plain = self.key.open_in_place(nonce(number), Aad::from(head), rest).map_err(|_| Flaw::Forged)?;
        let overtaken = number < self.window.newest;
        self.window.take(number);
        let (notes, bytes) = plain.split_first_chunk::<NOTES>().ok_or(Flaw::Malformed)?;
        let heard = Heard { session: u64_at(notes, 0), number: u64_at(notes, 8), gaps: notes[16] };
        let frame = self.assembler.take(u32_at(notes, 17), (notes[21], notes[22]), bytes)?;
        Ok(Opened { heard, overtaken, frame })
    }
}

/// Which numbers came. A datagram that is older than all that it remembers counts as one that came.
#[derive(Default)]
struct Window {
    newest: u64,
    /// Bit n: the number n before the newest one.
    came: u128,
}

impl Window {
    fn admits(&self, number: u64) -> bool {
        match self.newest.checked_sub(number) {
            None => true,
            Some(age) => number > 0 && age < u64::from(u128::BITS) && self.came & (1 << age) == 0,
        }
    }

    fn take(&mut self, number: u64) {
        match number.checked_sub(self.newest) {
            Some(ahead) => {
                self.came = u32::try_from(ahead).ok().and_then(|ahead| self.came.checked_shl(ahead)).unwrap_or(0) | 1;
                self.newest = number;
            }
            None => self.came |= 1 << (self.newest - number),
        }
    }

    fn gaps(&self) -> u8 {
        let counted = self.newest.saturating_sub(OUT_OF_ORDER).min(COUNTED);
        let looked_at = ((1u128 << counted) - 1) << OUT_OF_ORDER;
        (looked_at & !self.came).count_ones() as u8
    }
}

/// Frames of which some pieces have come, newest last.
#[derive(Default)]
struct Assembler(VecDeque<Partial>);

struct Partial {
    frame: u32,
    /// Empty: the frame was whole already.
    pieces: Vec<Option<Vec<u8>>>,
}

impl Assembler {
    fn take(&mut self, frame: u32, (piece, pieces): (u8, u8), bytes: &[u8]) -> Result<Option<Vec<u8>>, Flaw> {
        let (piece, pieces) = (usize::from(piece), usize::from(pieces));
        if pieces == 0 || pieces > PIECES || piece >= pieces {
            return Err(Flaw::Malformed);
        }
        let partial = match self.0.iter().position(|partial| partial.frame == frame) {
            Some(at) => &mut self.0[at],
            None => {
                if self.0.len() >= FRAMES {
                    self.0.pop_front();
                }
                self.0.push_back(Partial { frame, pieces: vec![None; pieces] });
                self.0.back_mut().expect("it was just pushed")
            }
        };
        if partial.pieces.is_empty() {
            return Ok(None);
        }
        *partial.pieces.get_mut(piece).ok_or(Flaw::Malformed)? = Some(bytes.to_vec());
        if partial.pieces.iter().any(Option::is_none) {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut partial.pieces).into_iter().flatten().flatten().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(session: u64) -> Secret {
        Secret { session, key: [session as u8; 32] }
    }

    fn pair() -> (Sealer, Opener) {
        (Sealer::new(secret(7)), Opener::new(secret(7)))
    }

    fn sealed(sealer: &mut Sealer, frame: &[u8], copies: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        sealer.seal(Heard { session: 5, number: 9, gaps: 3 }, frame, copies, |datagram| all.push(datagram.to_vec()));
        all
    }

    #[test]
    fn what_one_end_seals_the_other_opens_once() {
        let (mut sealer, mut opener) = pair();
        let [datagram] = &sealed(&mut sealer, b"frame", 1)[..] else { panic!("one") };
        assert_eq!(datagram.len(), HEAD + NOTES + 5 + MAX_TAG_LEN);
        let heard = Heard { session: 5, number: 9, gaps: 3 };
        let opened = opener.open(&mut datagram.clone());
        assert_eq!(opened, Ok(Opened { heard, overtaken: false, frame: Some(b"frame".to_vec()) }));
        assert_eq!(opener.open(&mut datagram.clone()), Err(Flaw::Repeated));
        assert_eq!(opener.heard(), Heard { session: 7, number: 1, gaps: 0 });
    }

    #[test]
    fn no_bit_can_be_changed_and_no_byte_be_missing_and_nothing_is_spoilt_by_trying() {
        let (mut sealer, mut opener) = pair();
        let [good] = &sealed(&mut sealer, b"frame", 1)[..] else { panic!("one") };
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let flaw = opener.open(&mut bad).unwrap_err();
            assert!(
                flaw == if bit < 64 { Flaw::Unknown } else { Flaw::Forged } || flaw == Flaw::Repeated,
                "{bit}: {flaw:?}"
            );
        }
        for length in 0..good.len() {
            assert!(opener.open(&mut good[..length].to_vec()).is_err(), "{length}");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert_eq!(opener.open(&mut longer), Err(Flaw::Forged));
        assert!(opener.open(&mut good.clone()).is_ok(), "a forged number has not taken the place of the true one");
    }

    #[test]
    fn another_session_is_not_heard_not_even_with_the_right_name() {
        let (mut sealer, _) = pair();
        let [datagram] = &sealed(&mut sealer, b"frame", 1)[..] else { panic!("one") };
        let named = |session, key: u8| Opener::new(Secret { session, key: [key; 32] }).open(&mut datagram.clone());
        assert_eq!(named(8, 7), Err(Flaw::Unknown));
        assert_eq!(named(7, 8), Err(Flaw::Forged));
        assert!(named(7, 7).is_ok());
    }

    #[test]
    fn each_number_is_taken_once_in_any_order_and_old_ones_never() {
        let (mut sealer, mut opener) = pair();
        let datagrams: Vec<_> = (0..400u32).flat_map(|n| sealed(&mut sealer, &n.to_le_bytes(), 1)).collect();
        let mut take = |number: usize| opener.open(&mut datagrams[number - 1].clone()).map(|opened| opened.overtaken);
        for number in [3, 1, 2, 200, 73, 199] {
            assert!(take(number).is_ok(), "{number}");
            assert_eq!(take(number), Err(Flaw::Repeated), "{number}");
        }
        assert_eq!(take(72), Err(Flaw::Repeated), "128 behind the newest");
        assert_eq!(take(198), Ok(true));
        assert_eq!(take(400), Ok(false));
        assert_eq!(take(201), Err(Flaw::Repeated), "all of the window is forgotten");
        assert_eq!(take(273), Ok(true));
    }

    #[test]
    fn what_is_missing_is_counted_and_what_is_only_late_is_not() {
        let (mut sealer, mut opener) = pair();
        let datagrams: Vec<_> = (0..300u32).flat_map(|n| sealed(&mut sealer, &n.to_le_bytes(), 1)).collect();
        let mut take = |number: usize| {
            opener.open(&mut datagrams[number - 1].clone()).unwrap();
            opener.heard().gaps
        };
        assert!((1..=100).all(|number| take(number) == 0));
        assert_eq!([take(104), take(105), take(106)], [0, 1, 2], "101 and 102, for now");
        assert_eq!([take(101), take(102), take(103)], [1, 0, 0], "they were late");
        let every_tenth_lost = (107..300).filter(|number| number % 10 != 0).map(take).last();
        assert_eq!(every_tenth_lost, Some(6), "of those from 232 to 295");
    }

    #[test]
    fn long_frames_go_in_pieces_in_any_order_and_twice() {
        let (mut sealer, mut opener) = pair();
        let frame: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        let mut datagrams = sealed(&mut sealer, &frame, 2);
        assert_eq!(datagrams.len(), 2 * frame.len().div_ceil(PIECE));
        assert!(datagrams.iter().all(|datagram| datagram.len() <= LARGEST));
        datagrams.reverse();
        let whole: Vec<_> = datagrams.iter_mut().filter_map(|datagram| opener.open(datagram).unwrap().frame).collect();
        assert_eq!(whole, [frame], "once");
        assert!(sealed(&mut sealer, &vec![0; PIECE * PIECES], 1).len() == PIECES && Sealer::fits(PIECE * PIECES));
        assert!(sealed(&mut sealer, &vec![0; PIECE * PIECES + 1], 1).is_empty() && !Sealer::fits(PIECE * PIECES + 1));
    }

    #[test]
    fn what_never_becomes_whole_is_forgotten() {
        let (mut sealer, mut opener) = pair();
        let parts: Vec<_> = (0..3 * FRAMES).map(|_| sealed(&mut sealer, &[1; 2 * PIECE], 1)).collect();
        for part in &parts {
            assert_eq!(opener.open(&mut part[0].clone()).unwrap().frame, None);
            assert!(opener.assembler.0.len() <= FRAMES);
        }
        assert_eq!(
            opener.open(&mut parts[3 * FRAMES - 1][1].clone()).unwrap().frame.map(|frame| frame.len()),
            Some(2 * PIECE)
        );
        assert_eq!(opener.open(&mut parts[0][1].clone()).unwrap().frame, None, "its first piece is gone");
    }

    #[test]
    fn impossible_pieces_are_refused() {
        let mut assembler = Assembler::default();
        for place in [(0, 0), (1, 1), (0, PIECES as u8 + 1), (255, 255)] {
            assert_eq!(assembler.take(1, place, b"x"), Err(Flaw::Malformed), "{place:?}");
        }
        assert_eq!(assembler.take(1, (0, 2), b"x"), Ok(None));
        assert_eq!(assembler.take(1, (2, 3), b"x"), Err(Flaw::Malformed), "of two");
    }
}
