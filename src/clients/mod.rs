//! Who a connection comes from, how many places each gets, and how long those who guess must wait. Must never let one
//! client have all of them, nor turn somebody away without a trace.

pub mod places;
pub mod throttle;

use std::net::{IpAddr, Ipv6Addr};

/// What counts as one client: a host of IPv6 usually has a whole /64 of addresses (RFC 6177).
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !0 << 64)),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_host_of_ipv6_is_one_client() {
        let of = |text: &str| network(address(text));
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
