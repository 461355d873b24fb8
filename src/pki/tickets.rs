//! Tickets by which a Defender resumes its TLS session, also at a member that it has never met. Their keys come from
//! the cluster key, which all members have, and from the time, so that nobody has to be told when they change. Must
//! never let a ticket outlive the trust that it stands for: TLS checks no certificate again in a resumed session.
//!
//! A ticket is worth nothing any more when the members trust other authorities, or the cluster key is another one:
//! both are in the key. Who it is for is in the ticket, as the certificate that was shown; whether that one is
//! withdrawn or has expired, whoever serves the Defender looks up at each connection.

use std::fmt;

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf,
};
use rustls::server::ProducesTickets;

use super::{ClusterKey, sealed::digest_of};
use crate::{
    clock::unix_time,
    cluster::{ClusterId, trust::KeyId},
};

/// How long tickets are made with one key, in seconds. Those of the period before are good, and those of the next one,
/// too: clocks differ.
const PERIOD: u64 = 6 * 3600;
/// Goes before the cluster key: what is made of it here is of no use elsewhere.
const LABEL: &[u8] = b"twistlock defender tickets v1";
/// Bytes of the number of a period.
const NUMBER: usize = size_of::<u64>();

/// Makes and reads tickets.
pub struct Tickets {
    secret: hkdf::Prk,
    key: KeyId,
    /// What else the keys are bound to.
    context: [u8; 32],
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Tickets {
    /// Those of a cluster with this key, as long as it trusts these authorities (PEM).
    pub fn new(key: &ClusterKey, cluster: ClusterId, trusted: &str) -> Self {
        let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, LABEL).extract(key.bytes());
        let mut context = [0; 32];
        context[..16].copy_from_slice(&cluster.0.to_be_bytes());
        context[16..].copy_from_slice(&digest_of(trusted.as_bytes()).to_be_bytes());
        Self { secret, key: key.id(), context }
    }

    /// The cluster key that they come from.
    pub fn key(&self) -> KeyId {
        self.key
    }

    fn cipher(&self, period: u64) -> Option<LessSafeKey> {
        let info: [&[u8]; 2] = [&self.context, &period.to_be_bytes()];
        let key = self.secret.expand(&info, &AES_256_GCM).ok()?;
        Some(LessSafeKey::new(UnboundKey::from(key)))
    }

    /// Nonces are random: of one key there are far fewer than 2^32.
    fn seal(&self, plain: &[u8], now: u64) -> Option<Vec<u8>> {
        let (number, nonce): ([u8; NUMBER], [u8; NONCE_LEN]) = ((now / PERIOD).to_be_bytes(), rand::random());
        let mut text = plain.to_vec();
        let bound = Aad::from(number);
        self.cipher(now / PERIOD)?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound, &mut text)
            .ok()?;
        Some([number.as_slice(), &nonce, &text].concat())
    }

    fn open(&self, ticket: &[u8], now: u64) -> Option<Vec<u8>> {
        let (number, rest) = ticket.split_first_chunk::<NUMBER>()?;
        let (nonce, text) = rest.split_first_chunk::<NONCE_LEN>()?;
        let period = u64::from_be_bytes(*number);
        if period.abs_diff(now / PERIOD) > 1 {
            return None;
        }
        let mut text = text.to_vec();
        let cipher = self.cipher(period)?;
        let plain = cipher.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(*number), &mut text).ok()?;
        Some(plain.to_vec())
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        PERIOD as u32
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain, unix_time())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.open(cipher, unix_time())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: ClusterId = ClusterId(0xabcd);
    const NOW: u64 = 1000 * PERIOD + 1;

    #[test]
    fn a_ticket_is_good_for_members_that_share_its_key_and_for_a_while() {
        let key = ClusterKey::generate();
        let [one, other] = [(); 2].map(|()| Tickets::new(&key, CLUSTER, "trusted"));
        let ticket = one.seal(b"session", NOW).unwrap();
        for now in [NOW, NOW - PERIOD, NOW + PERIOD, NOW + 2 * PERIOD - 2] {
            assert_eq!(other.open(&ticket, now).as_deref(), Some(&b"session"[..]), "{now}");
        }
        assert_eq!(other.open(&ticket, NOW + 2 * PERIOD), None);
        assert_eq!(other.open(&ticket, NOW - 2 * PERIOD), None);
        for stranger in [
            Tickets::new(&ClusterKey::generate(), CLUSTER, "trusted"),
            Tickets::new(&key, ClusterId(7), "trusted"),
            Tickets::new(&key, CLUSTER, "trusted and more"),
        ] {
            assert_eq!(stranger.open(&ticket, NOW), None, "{stranger:?}");
        }
    }

    #[test]
    fn what_is_not_a_ticket_is_refused() {
        let tickets = Tickets::new(&ClusterKey::generate(), CLUSTER, "");
        let ticket = tickets.seal(b"session", NOW).unwrap();
        for length in 0..ticket.len() {
            assert_eq!(tickets.open(&ticket[..length], NOW), None);
            let mut changed = ticket.clone();
            changed[length] ^= 1;
            assert_eq!(tickets.open(&changed, NOW), None, "{length}");
        }
        // Of the next period, by its number alone.
        assert_ne!(ticket, tickets.seal(b"session", NOW).unwrap(), "each has a nonce of its own");
    }
}
