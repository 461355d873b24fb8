//! The sockets that clients reach, who a connection comes from, how many places each gets, and how long those who guess
//! must wait. Must never let one client have all of them, nor turn somebody away without a trace.

pub mod places;
pub mod throttle;

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

/// A TCP socket with this address, which does not listen yet. The unspecified IPv6 address means all interfaces of both
/// families.
///
/// # Errors
/// When the address is not one of this host, or the port is taken.
pub fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // For the connections of an earlier process or opening that the kernel still remembers. Never SO_REUSEPORT: with it
    // a second daemon could share the port unnoticed.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// The certificate (DER) that a client has proven to have, as an extension of its requests. TLS has checked who signed
/// it; whose it is, is up to whoever serves the request.
#[derive(Clone, Debug)]
pub struct ClientCertificate(pub Vec<u8>);

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
