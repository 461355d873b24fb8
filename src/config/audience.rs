//! Who is answered on a port: everybody, the members, some addresses and networks. Pure; must never look a name up.

use std::{fmt, net::IpAddr};

/// The value of `HEALTH_ALLOW`. A host always answers itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audience {
    everybody: bool,
    members: bool,
    networks: Vec<Network>,
}

/// An address and how many of its bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u8,
}

impl Audience {
    /// Most words of a list.
    pub const MOST: usize = 32;

    /// Whoever reaches the port.
    pub fn everybody() -> Self {
        Self { everybody: true, ..Self::default() }
    }

    /// True if the addresses of the members belong to it.
    pub fn has_members(&self) -> bool {
        self.everybody || self.members
    }

    /// True if it has this address, whether or not a member has it.
    pub fn has(&self, address: IpAddr) -> bool {
        self.everybody || self.networks.iter().any(|network| network.has(address.to_canonical()))
    }

    /// `all`, or a list of words separated by commas; `None` for anything else.
    pub(super) fn read(text: &str) -> Option<Self> {
        if text == "all" {
            return Some(Self::everybody());
        }
        let mut audience = Self::default();
        let words: Vec<&str> = text.split(',').map(str::trim).filter(|_| !text.is_empty()).collect();
        if words.len() > Self::MOST {
            return None;
        }
        for word in words {
            match word {
                "members" => audience.members = true,
                _ => audience.networks.push(Network::read(word)?),
            }
        }
        Some(audience)
    }
}

impl fmt::Display for Audience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.everybody.then(|| "all".to_owned()).into_iter();
        let words = words.chain(self.members.then(|| "members".to_owned()));
        f.write_str(&words.chain(self.networks.iter().map(Network::to_string)).collect::<Vec<_>>().join(","))
    }
}

impl Network {
    /// An address, or an address and a length of which the rest is zero: `10.1.0.0/16`.
    fn read(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let plain = |bits: &&str| bits.bytes().all(|byte| byte.is_ascii_digit());
        let bits = match bits {
            Some(bits) => Some(bits).filter(plain)?.parse().ok().filter(|bits| *bits <= most)?,
            None => most,
        };
        let network = Self { address, bits };
        (network.part(address) == number(address)).then_some(network)
    }

    /// The bits of an address that count, in their places.
    fn part(self, address: IpAddr) -> u128 {
        let all = if address.is_ipv4() { 32 } else { 128 };
        number(address).checked_shr(all - u32::from(self.bits)).unwrap_or(0) << (all - u32::from(self.bits)).min(127)
    }

    fn has(self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && self.part(address) == number(self.address)
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = if self.address.is_ipv4() { 32 } else { 128 };
        match self.bits == all {
            true => write!(f, "{}", self.address),
            false => write!(f, "{}/{}", self.address, self.bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(audience: &str, address: &str) -> bool {
        Audience::read(audience).unwrap().has(address.parse().unwrap())
    }

    #[test]
    fn addresses_and_networks_are_told_apart() {
        assert!(has("10.1.0.0/16", "10.1.255.255") && !has("10.1.0.0/16", "10.2.0.0"));
        assert!(has("members, 192.0.2.7", "192.0.2.7") && !has("members,192.0.2.7", "192.0.2.8"));
        assert!(has("192.0.2.7", "::ffff:192.0.2.7"), "a socket of both families names it like this");
        assert!(has("0.0.0.0/0", "192.0.2.7") && !has("0.0.0.0/0", "2001:db8::1"));
        assert!(has("::/0", "2001:db8::1") && !has("::/0", "192.0.2.7"));
        assert!(has("2001:db8::/32", "2001:db8:ffff::1") && !has("2001:db8::/32", "2001:db9::1"));
        assert!(has("all", "192.0.2.7") && !has("", "192.0.2.7"));
        assert!(Audience::read("all").unwrap().has_members() && !Audience::read("").unwrap().has_members());
    }

    #[test]
    fn what_is_read_is_written_and_nonsense_is_refused() {
        for text in ["", "all", "members", "members,10.0.0.0/8,192.0.2.7,2001:db8::/32,::1"] {
            assert_eq!(Audience::read(text).unwrap().to_string(), text);
        }
        let long = ["192.0.2.7"; Audience::MOST + 1].join(",");
        for bad in
            ["all,members", "everybody", "10.1.2.3/16", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0.0/", ",", "host", &long]
        {
            assert_eq!(Audience::read(bad), None, "{bad}");
        }
    }
}
